"""Decisions of a rollout that no comparison took: kept with all that they rest on, and made again from it.

What a person has acknowledged stands among the decisions too. A person who
lets a halted rollout go on takes that breach upon himself, and no other: the
next device, the next stage or the next guardrail halts again.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from control_plane.core import guardrails
from control_plane.core.gate import Outcome, Verdict
from control_plane.core.guardrails import DeviceFacts
from control_plane.core.progress import Happen, Pause, Situation, next_step
from control_plane.core.rollout import RolloutEvent
from control_plane.store.rollouts import VerdictRecord

COMPARISONS: Final = frozenset({"gate", "watch"})
_HALTS: Final = frozenset({RolloutEvent.HALTED, RolloutEvent.HALTED_FOR_A_PERSON})
_PASSES: Final = frozenset({RolloutEvent.STAGE_PASSED, RolloutEvent.LAST_STAGE_PASSED})

Comparison = tuple[int, str, int]
"""(stage, kind, period): one sequential test, which has halted for good once it has."""


class Acknowledged(msgspec.Struct, frozen=True):
    """What people have taken upon themselves."""

    guardrails: dict[str, frozenset[str]] = {}
    """Guardrail -> the devices that had reached it."""
    comparisons: frozenset[Comparison] = frozenset()


class Basis(msgspec.Struct, frozen=True):
    """All that a decision rests on, besides the evidence of the comparison."""

    now: int
    situation: Situation
    devices: tuple[DeviceFacts, ...]
    acknowledged: dict[str, frozenset[str]] = {}


def acknowledged(verdicts: Iterable[VerdictRecord]) -> Acknowledged:
    """Return what the decisions of people among ``verdicts`` have acknowledged."""
    guards: dict[str, frozenset[str]] = {}
    comparisons: set[Comparison] = set()
    for verdict in verdicts:
        found = msgspec.convert(verdict.numbers.get("acknowledged", {}), Acknowledged)
        comparisons |= found.comparisons
        for name, devices in found.guardrails.items():
            guards[name] = guards.get(name, frozenset()) | devices
    return Acknowledged(guards, frozenset(comparisons))


def to_acknowledge(halts: Iterable[VerdictRecord]) -> Acknowledged:
    """Return what a person acknowledges who has seen ``halts``."""
    guards: dict[str, frozenset[str]] = {}
    comparisons = set()
    for halt in halts:
        if halt.kind in COMPARISONS:
            comparisons.add(comparison(halt))
        elif halt.kind == "guardrail":
            name = str(halt.numbers["guardrail"])
            guards[name] = guards.get(name, frozenset()) | frozenset(halt.numbers["devices"])
    return Acknowledged(guards, frozenset(comparisons))


def comparison(verdict: VerdictRecord) -> Comparison:
    """Return which comparison took a verdict."""
    return (verdict.stage, verdict.kind, int(verdict.numbers.get("period", 0)))


def standing(verdicts: Sequence[VerdictRecord], stage: int | None, taken: Acknowledged) -> Verdict | None:
    """Return the verdict that holds now: a halt that nobody has acknowledged, else the newest of the gate.

    ``stage`` is the one that soaks, None between stages. A gate whose halt
    was acknowledged holds until the longest soak is over: what was shown
    cannot be refuted any more.
    """
    halts = [
        v for v in verdicts if v.verdict == Outcome.HALT.value and comparison(v) not in taken.comparisons
    ]
    gate = [v for v in verdicts if v.kind == "gate" and v.stage == stage]
    if not halts and not gate:
        return None
    chosen = halts[-1] if halts else gate[-1]
    outcome, reason = Outcome(chosen.verdict), chosen.reason
    if not halts and outcome is Outcome.HALT:
        outcome, reason = Outcome.HOLD, f"acknowledged: {reason}"
    return Verdict(
        verdict=outcome,
        reason=reason,
        bucket=chosen.bucket,
        too_few=bool(chosen.numbers.get("too_few")),
        exhausted=bool(chosen.numbers.get("exhausted")),
    )


def kind(situation: Situation, step: Happen) -> str | None:
    """Return the kind of a decision that must be kept, or None where it stands as the comparison's own."""
    if step.event is RolloutEvent.STARTED:
        return None
    if situation.breach is not None and step.event in _HALTS:
        return "guardrail"
    if situation.policy.strategy == "all_at_once":
        return "count"
    if step.pause is Pause.HELD:
        return "soak"
    verdict = situation.verdict
    if verdict is not None and verdict.verdict is outcome(step) and verdict.reason == step.reason:
        return None
    return "coverage"


def outcome(step: Happen) -> Outcome:
    """Return what a step says as a verdict."""
    if step.event in _HALTS:
        return Outcome.HALT
    return Outcome.ADVANCE if step.event in _PASSES else Outcome.HOLD


def numbers(situation: Situation) -> dict[str, object]:
    """Return what a person wants to see at once."""
    counts: dict[str, int] = {}
    for m in situation.members:
        counts[m.state.value] = counts.get(m.state.value, 0) + 1
    breach: Mapping[str, object] = msgspec.to_builtins(situation.breach) if situation.breach else {}
    return {"states": counts, **breach}


def pack(basis: Basis) -> bytes:
    """Return ``basis`` as it is kept: one line of JSON."""
    return msgspec.json.encode(basis, order="deterministic") + b"\n"


def again(content: bytes) -> Verdict:
    """Make a decision again from what was kept of it."""
    basis = msgspec.json.decode(content, type=Basis)
    limits = basis.situation.policy.guardrails
    breach = guardrails.check(limits, basis.devices, basis.acknowledged)
    step = next_step(replace(basis.situation, breach=breach), basis.now)
    if not isinstance(step, Happen):
        return Verdict(verdict=Outcome.HOLD, reason="", bucket=None)
    return Verdict(verdict=outcome(step), reason=step.reason, bucket=None)
