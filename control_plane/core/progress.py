"""The next step of a rollout, from what is wanted and what is seen.

Level-triggered like the agent's planner: only the arguments count, so a
worker that was away, or two that overlap, come to the same end.
"""

import enum
from typing import Final

from msgspec import Struct

from contract.messages import AssignmentState
from control_plane.core import strata
from control_plane.core.assignment import FAILED, ON_NEW_VERSION
from control_plane.core.gate.design import alpha_shares, can_decide
from control_plane.core.gate.evidence import Outcome, Verdict
from control_plane.core.guardrails import Breach
from control_plane.core.policy import Policy
from control_plane.core.rollout import Rollout, RolloutEvent, RolloutState

MICROS: Final = 1_000_000
PENDING: Final = frozenset(
    {
        AssignmentState.OFFERED,
        AssignmentState.ACKNOWLEDGED,
        AssignmentState.FETCHING,
        AssignmentState.VERIFIED,
        AssignmentState.PROBED,
    }
)
"""On the way to READY."""


class Arm(enum.Enum):
    """What a device is in the comparison."""

    NONE = "none"
    CANARY = "canary"
    """Runs the new version, since ``stage``."""
    CONTROL = "control"
    HOLD_OUT = "hold_out"
    """A control that keeps the old version until the rollout closes."""


class Pause(enum.Enum):
    """Why a rollout is paused."""

    NOT = "not"
    OPERATOR = "operator"
    HELD = "held"
    """The longest soak is over without a decision."""
    COVERAGE = "coverage"
    """Too few devices were ready in time."""
    HALTED = "halted"
    """Harm was shown, and the policy leaves the rest to a person."""


class Member(Struct, frozen=True):
    """One device of the rollout."""

    device: str
    stratum: str
    state: AssignmentState
    arm: Arm = Arm.NONE
    stage: int | None = None
    has_previous: bool = True
    """Whether there is a version to go back to and to compare with."""
    begun: bool = False
    """Whether it has served since it was (re)activated in this stage."""


class Situation(Struct, frozen=True):
    """All that the next step depends on. Times are microseconds UTC, None before they come."""

    rollout: Rollout
    policy: Policy
    members: tuple[Member, ...]
    pause: Pause = Pause.NOT
    start_at: int | None = None
    offered_at: int | None = None
    ordered_at: int | None = None
    """When this stage's canaries and controls were told to (re)activate."""
    soak_from: int | None = None
    """When both arms had begun."""
    waived: bool = False
    """Whether a person has waived the coverage."""
    before_known: bool = True
    """Whether the period before is long enough."""
    breach: Breach | None = None
    """The guardrail that is reached and that no person has taken upon himself."""
    verdict: Verdict | None = None
    """The comparison's, likewise."""


class Offer(Struct, frozen=True):
    """Stage the version on every planned device (or order it at once, where nothing is compared)."""

    devices: tuple[str, ...]


class MarkUnreached(Struct, frozen=True):
    """Give these devices up until they turn up."""

    devices: tuple[str, ...]


class ActivateStage(Struct, frozen=True):
    """(Re)activate canaries and controls at the same moment."""

    choice: strata.Choice


class BeginSoak(Struct, frozen=True):
    """Count buckets from now."""


class Happen(Struct, frozen=True):
    """An event of the rollout's state machine, and why."""

    event: RolloutEvent
    reason: str
    pause: Pause = Pause.NOT


Step = Offer | MarkUnreached | ActivateStage | BeginSoak | Happen


def next_step(seen: Situation, now: int) -> Step | None:
    """Return the one step that brings the rollout on, or None to wait. ``now`` in microseconds UTC."""
    state = seen.rollout.state
    if state is RolloutState.SCHEDULED:
        if seen.start_at is None or now >= seen.start_at:
            return Happen(RolloutEvent.STARTED, "its time has come")
        return None
    if state is RolloutState.PAUSED:
        return None if seen.pause is Pause.HALTED else _harm(seen)
    if state is not RolloutState.RUNNING:
        return None
    return _harm(seen) or _on(seen, now)


def _harm(seen: Situation) -> Step | None:
    if seen.breach is not None:
        reason = seen.breach.reason
    elif seen.verdict is not None and seen.verdict.verdict is Outcome.HALT:
        reason = seen.verdict.reason
    else:
        return None
    if seen.policy.on_halt == "pause":
        return Happen(RolloutEvent.HALTED_FOR_A_PERSON, reason, Pause.HALTED)
    return Happen(RolloutEvent.HALTED, reason)


def _on(seen: Situation, now: int) -> Step | None:
    planned = tuple(m.device for m in seen.members if m.state is AssignmentState.PLANNED)
    if planned:
        return Offer(planned)
    if seen.policy.strategy == "all_at_once":
        return _all_at_once(seen, now)
    if seen.ordered_at is None:
        return _gather(seen, now)
    if seen.soak_from is None:
        waiting = [m for m in seen.members if m.arm is not Arm.NONE and m.state in _COMPARED and not m.begun]
        late = now - seen.ordered_at >= seen.policy.activation_s * MICROS
        return BeginSoak() if late or not waiting else None
    return _judge(seen)


_COMPARED: Final = ON_NEW_VERSION | {AssignmentState.READY}
_REACHED: Final = _COMPARED | FAILED


def _gather(seen: Situation, now: int) -> Step | None:
    """Wait until enough devices are ready and known well enough to be compared."""
    assert seen.offered_at is not None
    waited = now - seen.offered_at
    policy = seen.policy
    pending = tuple(m.device for m in seen.members if m.state in PENDING)
    ready = [m for m in seen.members if m.state is AssignmentState.READY]
    if pending and waited >= policy.deadline_s * MICROS:
        return MarkUnreached(pending)
    if not pending and not ready and not any(m.state in ON_NEW_VERSION for m in seen.members):
        return _nobody_left(seen)
    lacking = None if seen.waived else coverage_gap(seen.members, policy.min_coverage)
    if lacking is not None and not pending:
        return Happen(RolloutEvent.HELD_TOO_LONG, lacking, Pause.COVERAGE)
    stragglers = pending and waited < policy.activation_s * MICROS
    patience = policy.activation_s + 2 * policy.min_pre_buckets * policy.bucket_s
    unknown = not seen.before_known and waited < patience * MICROS
    if lacking is not None or stragglers or unknown:
        return None
    return _begin(seen)


def _begin(seen: Situation) -> Step:
    choice = choose_stage(seen)
    if choice.canaries:
        return ActivateStage(choice)
    if any(m.arm is Arm.CANARY and m.state in ON_NEW_VERSION for m in seen.members):
        # Only devices of the hold-out are left, so this stage is the one before, which was judged.
        return _passed(seen, "no device is left to join in this stage")
    words = "nothing can be compared: no device that is ready has a version to go back to"
    return Happen(RolloutEvent.HELD_TOO_LONG, f"{words}; retry those that failed, or abort", Pause.COVERAGE)


def _nobody_left(seen: Situation) -> Step:
    if any(m.state is AssignmentState.REFUSED for m in seen.members):
        return Happen(RolloutEvent.HALTED, "no device is left: all that were reached refused the version")
    return Happen(RolloutEvent.HELD_TOO_LONG, "no device was ready in time", Pause.COVERAGE)


def _judge(seen: Situation) -> Step | None:
    verdict = seen.verdict
    if verdict is None:
        return None
    if verdict.verdict is Outcome.ADVANCE:
        return _passed(seen, verdict.reason)
    if verdict.exhausted:
        words = f"held for the longest soak; approve to go on, or roll back: {verdict.reason}"
        return Happen(RolloutEvent.HELD_TOO_LONG, words, Pause.HELD)
    return None


def _passed(seen: Situation, reason: str) -> Happen:
    last = seen.rollout.stage + 1 >= seen.rollout.stages
    return Happen(RolloutEvent.LAST_STAGE_PASSED if last else RolloutEvent.STAGE_PASSED, reason)


def _all_at_once(seen: Situation, now: int) -> Step | None:
    """No control is possible: confirmations are counted, and the guardrails watch."""
    assert seen.offered_at is not None
    total = len(seen.members)
    confirmed = sum(m.state is AssignmentState.CONFIRMED for m in seen.members)
    under_way = tuple(
        m.device
        for m in seen.members
        if m.state in PENDING
        or m.state in {AssignmentState.READY, AssignmentState.ACTIVATING, AssignmentState.SOAKING}
    )
    words = f"{confirmed} of {total} devices confirmed; nothing was compared (all at once), only guardrails"
    if under_way:
        if now - seen.offered_at < seen.policy.deadline_s * MICROS:
            return None
        unreached = tuple(m.device for m in seen.members if m.device in under_way and m.state in PENDING)
        if unreached:
            return MarkUnreached(unreached)
    if confirmed and confirmed >= seen.policy.min_coverage * total:
        return Happen(RolloutEvent.LAST_STAGE_PASSED, words)
    if not confirmed and any(m.state is AssignmentState.REFUSED for m in seen.members):
        return _nobody_left(seen)
    lacking = f"{words}; {seen.policy.min_coverage:.0%} are needed"
    return Happen(RolloutEvent.HELD_TOO_LONG, lacking, Pause.COVERAGE)


def coverage_gap(members: tuple[Member, ...], minimum: float) -> str | None:
    """Return which stratum has too few devices that were reached, or None. Failing is not being unreached."""
    totals: dict[str, int] = {}
    reached: dict[str, int] = {}
    for m in members:
        totals[m.stratum] = totals.get(m.stratum, 0) + (m.state is not AssignmentState.SUPERSEDED)
        reached[m.stratum] = reached.get(m.stratum, 0) + (m.state in _REACHED)
    for stratum, total in sorted(totals.items()):
        if reached[stratum] < minimum * total:
            return (
                f"coverage: {reached[stratum]} of {total} devices were reached in stratum {stratum}; "
                f"{minimum:.0%} are needed"
            )
    return None


def choose_stage(seen: Situation) -> strata.Choice:
    """Return canaries and controls of the stage that begins, chosen among the ready."""
    wanted = stage_size(seen.policy, seen.rollout.stage, len(seen.members))
    treated = sum(m.arm is Arm.CANARY for m in seen.members)
    free = {
        m.device: m.stratum
        for m in seen.members
        if m.state is AssignmentState.READY and m.arm is not Arm.CANARY and m.has_previous
    }
    kept = tuple(m.device for m in seen.members if m.arm is Arm.HOLD_OUT)
    return strata.choose(
        seen.rollout.id,
        free,
        canaries=wanted - treated,
        hold_out=max(len(kept), hold_out_size(seen.policy, len(seen.members))),
        kept=kept,
    )


def stage_size(policy: Policy, stage: int, devices: int) -> int:
    """Return how many devices shall run the new version in ``stage``, before the hold-out is taken off."""
    spec = policy.stages[stage]
    if spec.devices is not None:
        return min(spec.devices, devices)
    assert spec.percent is not None
    return strata.share(spec.percent, devices)


def is_whole(policy: Policy, devices: int) -> bool:
    """Whether the last stage is meant for all ``devices``: then the rest gets the version at the end."""
    return policy.strategy == "all_at_once" or stage_size(policy, len(policy.stages) - 1, devices) >= devices


def hold_out_size(policy: Policy, devices: int) -> int:
    """Return the hold-out: the policy's share, but no fewer than the last comparison needs to show harm.

    Never more than a third of the devices; 0 only where the policy says 0 %.
    """
    if policy.hold_out_percent == 0 or devices < 2:  # noqa: PLR2004 - one device cannot be split
        return 0
    wanted = strata.share(policy.hold_out_percent, devices)
    own, watch = alpha_shares(len(policy.stages))[-1]
    alpha = policy.alpha * (watch or own)
    most = max(1, devices // 3)
    while wanted < most and not can_decide([(wanted, devices)], alpha=alpha, extremes=len(policy.metrics)):
        wanted += 1
    return min(wanted, most)
