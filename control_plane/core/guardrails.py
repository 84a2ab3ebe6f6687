"""Absolute limits that halt a rollout at once, whatever the comparison says."""

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from contract.messages import Aftermath, AssignmentState
from control_plane.core.assignment import ON_NEW_VERSION
from control_plane.core.policy import Guardrails
from control_plane.core.strata import share

CRASH_CODES: Final = frozenset({"trial.crashed", "probe.crashed"})
_UNREACHED: Final = frozenset({AssignmentState.PLANNED, AssignmentState.OFFERED, AssignmentState.UNREACHED})


class DeviceFacts(Struct, frozen=True):
    """What the guardrails see of one device."""

    device: str
    state: AssignmentState
    treated: bool = False
    code: str | None = None
    aftermath: Aftermath | None = None
    silent: bool | None = None
    """Whether it fell silent since it was (re)activated; None while that cannot be said."""
    windows: int = 0
    """Windows that were tried lately, with those that failed."""
    errors: int = 0


class Breach(Struct, frozen=True):
    """A limit that was reached, with the devices that reached it."""

    guardrail: str
    reason: str
    devices: tuple[str, ...]
    limit: float


def check(limits: Guardrails, devices: Sequence[DeviceFacts]) -> Breach | None:
    """Return the first limit that is reached, the gravest first, or None."""
    reached = sum(d.state not in _UNREACHED for d in devices)
    failed = [d for d in devices if d.state in {AssignmentState.ROLLED_BACK, AssignmentState.REFUSED}]
    counts = (
        (
            "unable_to_roll_back",
            [d for d in devices if d.aftermath is Aftermath.UNABLE_TO_ROLL_BACK],
            limits.unable_to_roll_back,
            "could not roll back",
        ),
        ("crashed", [d for d in failed if d.code in CRASH_CODES], limits.crashed, "crashed"),
        (
            "rolled_back",
            [d for d in failed if d.state is AssignmentState.ROLLED_BACK],
            max(limits.rolled_back, share(limits.rolled_back_percent, reached)),
            "rolled back by themselves",
        ),
        (
            "refused",
            [d for d in failed if d.state is AssignmentState.REFUSED],
            max(limits.refused, share(limits.refused_percent, reached)),
            "refused the version",
        ),
    )
    for guardrail, found, limit, words in counts:
        if len(found) >= limit:
            return _breach(guardrail, found, limit, f"{len(found)} of {reached} devices {words}")
    return _silent(limits, devices) or _erring(limits, devices)


def _silent(limits: Guardrails, devices: Sequence[DeviceFacts]) -> Breach | None:
    canaries = [d for d in devices if d.treated and d.silent is not None]
    controls = [d for d in devices if not d.treated and d.silent is not None]
    silent = [d for d in canaries if d.silent]
    if len(silent) < limits.silent_canaries:
        return None
    # When the controls are as silent, it is the network and not the version: the gate holds then.
    quiet = sum(bool(d.silent) for d in controls)
    if controls and quiet * len(canaries) >= len(silent) * len(controls):
        return None
    words = f"{len(silent)} of {len(canaries)} canaries fell silent"
    return _breach("silent_canaries", silent, limits.silent_canaries, words)


def _erring(limits: Guardrails, devices: Sequence[DeviceFacts]) -> Breach | None:
    erring = [
        d
        for d in devices
        if d.treated
        and d.state in ON_NEW_VERSION
        and d.windows >= limits.error_windows
        and d.errors >= limits.error_rate * d.windows
    ]
    if not erring:
        return None
    worst = max(erring, key=lambda d: d.errors / d.windows)
    words = f"{worst.errors / worst.windows:.0%} of the windows fail on {worst.device}"
    return _breach("error_rate", erring, limits.error_rate, words)


def _breach(guardrail: str, found: Sequence[DeviceFacts], limit: float, words: str) -> Breach:
    codes = sorted({d.code for d in found if d.code})
    reason = f"guardrail {guardrail}: {words} (limit {limit:g})"
    if codes:
        reason += f": {', '.join(codes)}"
    return Breach(guardrail, reason, tuple(d.device for d in found), limit)
