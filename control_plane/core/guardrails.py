"""Absolute limits that halt a rollout at once, whatever the comparison says."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from msgspec import Struct

from contract.messages import Aftermath, AssignmentState
from control_plane.core.assignment import ON_NEW_VERSION
from control_plane.core.policy import Guardrails
from control_plane.core.strata import share

CRASH_CODES: Final = frozenset({"trial.crashed", "trial.over_memory", "probe.crashed"})
CHANCE: Final = 0.02
"""Silence that comes about by chance more often than this is not laid to the version."""
_UNREACHED: Final = frozenset({AssignmentState.PLANNED, AssignmentState.OFFERED, AssignmentState.UNREACHED})


NONE: Final[Mapping[str, frozenset[str]]] = {}


class DeviceFacts(Struct, frozen=True):
    """What the guardrails see of one device."""

    device: str
    state: AssignmentState
    treated: bool = False
    code: str | None = None
    aftermath: Aftermath | None = None
    silent: bool | None = None
    """Whether it spoke after it was (re)activated and is silent now; None when it never spoke."""
    windows: int = 0
    """Windows that were tried lately, with those that failed."""
    errors: int = 0
    restarts: int = 0
    """How often its engine died since the soak began."""


class Breach(Struct, frozen=True):
    """A limit that was reached, with the devices that reached it."""

    guardrail: str
    reason: str
    devices: tuple[str, ...]
    limit: float


def check(
    limits: Guardrails, devices: Sequence[DeviceFacts], acknowledged: Mapping[str, frozenset[str]] = NONE
) -> Breach | None:
    """Return the first limit that is reached, the gravest first, or None.

    ``acknowledged`` names, by guardrail, the devices with which a person has
    taken a breach upon himself: it counts again when another device joins.
    """
    for found in _breaches(limits, devices):
        if not acknowledged.get(found.guardrail, frozenset()).issuperset(found.devices):
            return found
    return None


def _breaches(limits: Guardrails, devices: Sequence[DeviceFacts]) -> Iterator[Breach]:
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
            yield _breach(guardrail, found, limit, f"{len(found)} of {reached} devices {words}")
    for breach in (_silent(limits, devices), _erring(limits, devices), _restarting(limits, devices)):
        if breach is not None:
            yield breach


def _silent(limits: Guardrails, devices: Sequence[DeviceFacts]) -> Breach | None:
    """Many canaries that spoke are silent, and more than a lottery over both arms would make so.

    Devices go offline for reasons of their own, and when the controls are as
    silent it is the network: the gate holds then. Fewer dead canaries than
    this limit asks for are left to the gate's comparison.
    """
    canaries = [d for d in devices if d.treated and d.silent is not None]
    controls = [d for d in devices if not d.treated and d.silent is not None]
    silent = [d for d in canaries if d.silent]
    limit = max(limits.silent_canaries, share(limits.silent_percent, len(canaries)))
    if len(silent) < limit:
        return None
    quiet = sum(bool(d.silent) for d in controls)
    chance = by_chance(len(silent), len(canaries), quiet, len(controls))
    if controls and chance > CHANCE:
        return None
    words = f"{len(silent)} of {len(canaries)} canaries and {quiet} of {len(controls)} controls fell silent"
    return _breach("silent_canaries", silent, limit, words)


def by_chance(silent: int, canaries: int, quiet: int, controls: int) -> float:
    """Return how likely ``silent`` canaries or more are, were the silent ones drawn from both arms alike.

    The upper tail of the hypergeometric distribution (Fisher's exact test).
    """
    total = silent + quiet
    ways = sum(
        math.comb(canaries, k) * math.comb(controls, total - k)
        for k in range(silent, min(canaries, total) + 1)
    )
    return ways / math.comb(canaries + controls, total)


def _restarting(limits: Guardrails, devices: Sequence[DeviceFacts]) -> Breach | None:
    """An engine that dies again and again, on a canary and on no control."""
    most = max((d.restarts for d in devices if not d.treated), default=0)
    found = [d for d in devices if d.treated and d.restarts >= limits.engine_restarts and d.restarts > most]
    if not found:
        return None
    worst = max(found, key=lambda d: d.restarts)
    words = f"the engine died {worst.restarts} times on {worst.device}"
    return _breach("engine_restarts", found, limits.engine_restarts, words)


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
