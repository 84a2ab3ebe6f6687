"""The life of one device in one rollout: one table, and the function that follows it.

Receipts can be lost, repeated and reordered. So a device may be seen to skip
steps, and a receipt of a step that lies behind it changes nothing.
"""

import enum
from collections.abc import Iterator, Mapping
from typing import Final

from contract.errors import PitheadError
from contract.messages import AssignmentState


class AssignmentEvent(enum.Enum):
    """What can happen to an assignment: what a device reports, and what the control plane does."""

    OFFERED = "offered"
    ACKNOWLEDGED = "acknowledged"
    FETCHING = "fetching"
    VERIFIED = "verified"
    PROBED = "probed"
    READY = "ready"
    SHADOWING = "shadowing"
    ACTIVATING = "activating"
    SOAKING = "soaking"
    CONFIRMED = "confirmed"
    ROLLED_BACK = "rolled_back"
    REFUSED = "refused"
    DEADLINE_PASSED = "deadline_passed"
    SUPERSEDED = "superseded"
    RETRIED = "retried"


_S = AssignmentState
_E = AssignmentEvent

PROGRESS: Final = (
    _S.OFFERED,
    _S.ACKNOWLEDGED,
    _S.FETCHING,
    _S.VERIFIED,
    _S.PROBED,
    _S.READY,
    _S.SHADOWING,
    _S.ACTIVATING,
    _S.SOAKING,
    _S.CONFIRMED,
)
"""The way forward, in order."""
FAILED: Final = frozenset({_S.ROLLED_BACK, _S.REFUSED})
ON_NEW_VERSION: Final = frozenset({_S.ACTIVATING, _S.SOAKING, _S.CONFIRMED})
REPORTED: Final[Mapping[AssignmentState, AssignmentEvent]] = {
    state: AssignmentEvent(state.value) for state in (*PROGRESS[1:], _S.ROLLED_BACK, _S.REFUSED)
}
"""The event that a receipt of a state is."""


def _table() -> Iterator[tuple[tuple[AssignmentState, AssignmentEvent], AssignmentState]]:
    yield (_S.PLANNED, _E.OFFERED), _S.OFFERED
    yield (_S.PLANNED, _E.DEADLINE_PASSED), _S.UNREACHED
    yield (_S.PLANNED, _E.SUPERSEDED), _S.SUPERSEDED
    steps = [(state, AssignmentEvent(state.value)) for state in PROGRESS]
    for here, state in enumerate(PROGRESS):
        for there, (target, event) in enumerate(steps):
            yield (state, event), target if there > here else state
        yield (state, _E.ROLLED_BACK), _S.ROLLED_BACK
        yield (state, _E.SUPERSEDED), _S.SUPERSEDED
        if state not in {_S.SOAKING, _S.CONFIRMED}:
            yield (state, _E.REFUSED), _S.REFUSED
        if state not in {_S.READY, _S.SOAKING, _S.CONFIRMED}:
            yield (state, _E.DEADLINE_PASSED), _S.UNREACHED
    for target, event in steps:
        # A device that comes late is welcome as long as the rollout is open.
        yield (_S.UNREACHED, event), target
        for ended in (_S.ROLLED_BACK, _S.REFUSED, _S.SUPERSEDED):
            yield (ended, event), ended
    yield (_S.UNREACHED, _E.ROLLED_BACK), _S.ROLLED_BACK
    yield (_S.UNREACHED, _E.REFUSED), _S.REFUSED
    yield (_S.UNREACHED, _E.SUPERSEDED), _S.SUPERSEDED
    for ended in (_S.ROLLED_BACK, _S.REFUSED, _S.SUPERSEDED):
        yield (ended, _E.ROLLED_BACK), ended
        yield (ended, _E.REFUSED), ended
    for ended in (_S.ROLLED_BACK, _S.REFUSED, _S.UNREACHED):
        yield (ended, _E.RETRIED), _S.PLANNED


TRANSITIONS: Final[Mapping[tuple[AssignmentState, AssignmentEvent], AssignmentState]] = dict(_table())


def follow(state: AssignmentState, event: AssignmentEvent) -> AssignmentState:
    """Return the state after ``event``, or raise ``rollout.illegal_transition``."""
    after = TRANSITIONS.get((state, event))
    if after is None:
        raise PitheadError(
            "rollout.illegal_transition",
            f"assignment: {event.value} is not possible in state {state.value}",
            state=state.value,
            event=event.value,
        )
    return after
