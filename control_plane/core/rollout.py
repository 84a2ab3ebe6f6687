"""The life of a rollout: one table, and the function that follows it."""

import enum
from collections.abc import Mapping
from typing import Final

import msgspec

from contract.errors import PitheadError


class RolloutState(enum.Enum):
    """Where a rollout stands."""

    DRAFT = "draft"
    AWAITING_APPROVAL = "awaiting_approval"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    ABORTED = "aborted"


class RolloutEvent(enum.Enum):
    """What can happen to a rollout."""

    SUBMITTED = "submitted"
    APPROVAL_ASKED = "approval_asked"
    APPROVED = "approved"
    STARTED = "started"
    STAGE_PASSED = "stage_passed"
    LAST_STAGE_PASSED = "last_stage_passed"
    HALTED = "halted"
    HALTED_FOR_A_PERSON = "halted_for_a_person"
    HELD_TOO_LONG = "held_too_long"
    PAUSE_ORDERED = "pause_ordered"
    RESUMED = "resumed"
    ROLLBACK_ORDERED = "rollback_ordered"
    ROLLBACK_COMPLETE = "rollback_complete"
    ABORT_ORDERED = "abort_ordered"


_S = RolloutState
_E = RolloutEvent

TRANSITIONS: Final[Mapping[tuple[RolloutState, RolloutEvent], RolloutState]] = {
    (_S.DRAFT, _E.SUBMITTED): _S.SCHEDULED,
    (_S.DRAFT, _E.APPROVAL_ASKED): _S.AWAITING_APPROVAL,
    (_S.DRAFT, _E.ABORT_ORDERED): _S.ABORTED,
    (_S.AWAITING_APPROVAL, _E.APPROVED): _S.SCHEDULED,
    (_S.AWAITING_APPROVAL, _E.ABORT_ORDERED): _S.ABORTED,
    (_S.SCHEDULED, _E.STARTED): _S.RUNNING,
    (_S.SCHEDULED, _E.ABORT_ORDERED): _S.ABORTED,
    (_S.RUNNING, _E.STAGE_PASSED): _S.RUNNING,
    (_S.RUNNING, _E.LAST_STAGE_PASSED): _S.SUCCEEDED,
    (_S.RUNNING, _E.HALTED): _S.ROLLING_BACK,
    (_S.RUNNING, _E.HALTED_FOR_A_PERSON): _S.PAUSED,
    (_S.RUNNING, _E.HELD_TOO_LONG): _S.PAUSED,
    (_S.RUNNING, _E.PAUSE_ORDERED): _S.PAUSED,
    (_S.RUNNING, _E.ROLLBACK_ORDERED): _S.ROLLING_BACK,
    (_S.RUNNING, _E.ABORT_ORDERED): _S.ABORTED,
    # A pause stops growth, not watchfulness: harm that shows meanwhile still halts.
    (_S.PAUSED, _E.RESUMED): _S.RUNNING,
    (_S.PAUSED, _E.STAGE_PASSED): _S.RUNNING,
    (_S.PAUSED, _E.LAST_STAGE_PASSED): _S.SUCCEEDED,
    (_S.PAUSED, _E.HALTED): _S.ROLLING_BACK,
    (_S.PAUSED, _E.HALTED_FOR_A_PERSON): _S.PAUSED,
    (_S.PAUSED, _E.ROLLBACK_ORDERED): _S.ROLLING_BACK,
    (_S.PAUSED, _E.ABORT_ORDERED): _S.ABORTED,
    (_S.ROLLING_BACK, _E.ROLLBACK_COMPLETE): _S.ROLLED_BACK,
    # A person stops waiting for devices that are gone; their order to go back stands.
    (_S.ROLLING_BACK, _E.ABORT_ORDERED): _S.ROLLED_BACK,
}

FINAL: Final = frozenset({_S.SUCCEEDED, _S.ROLLED_BACK, _S.ABORTED})
"""States that a rollout never leaves, and in which it locks no device."""


class Rollout(msgspec.Struct, frozen=True):
    """A rollout as far as its state machine cares. ``stage`` counts from 0, times are microseconds UTC."""

    id: str
    state: RolloutState
    stages: int
    stage: int = 0
    changed_at: int = 0


def advance(rollout: Rollout, event: RolloutEvent, now: int) -> Rollout:
    """Return ``rollout`` after ``event``, or raise ``rollout.illegal_transition``.

    ``STAGE_PASSED`` moves to the next stage and is illegal on the last one;
    ``LAST_STAGE_PASSED`` is legal on the last one only.
    """
    state = TRANSITIONS.get((rollout.state, event))
    if state is None:
        raise _illegal(rollout, event, f"in state {rollout.state.value}")
    last = rollout.stage + 1 >= rollout.stages
    if event is RolloutEvent.STAGE_PASSED and last:
        raise _illegal(rollout, event, "on the last stage")
    if event is RolloutEvent.LAST_STAGE_PASSED and not last:
        raise _illegal(rollout, event, f"on stage {rollout.stage + 1} of {rollout.stages}")
    stage = rollout.stage + (event is RolloutEvent.STAGE_PASSED)
    return msgspec.structs.replace(rollout, state=state, stage=stage, changed_at=now)


def _illegal(rollout: Rollout, event: RolloutEvent, where: str) -> PitheadError:
    return PitheadError(
        "rollout.illegal_transition",
        f"{event.value} is not possible {where}",
        rollout=rollout.id,
        state=rollout.state.value,
        event=event.value,
    )
