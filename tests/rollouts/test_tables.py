"""Every (state, event) pair of both tables, and the pictures drawn from them."""

import itertools
from typing import Any

import pytest

from contract.errors import PitheadError
from contract.messages import AssignmentState
from control_plane.core import assignment, rollout
from control_plane.core.assignment import PROGRESS, AssignmentEvent, follow
from control_plane.core.diagrams import mermaid
from control_plane.core.rollout import FINAL, Rollout, RolloutEvent, RolloutState, advance

ROLLOUT_PAIRS = list(itertools.product(RolloutState, RolloutEvent))
ASSIGNMENT_PAIRS = list(itertools.product(AssignmentState, AssignmentEvent))


@pytest.mark.parametrize(("state", "event"), ROLLOUT_PAIRS, ids=lambda value: value.value)
def test_rollout_pair(state: Any, event: Any):
    stage = 1 if event is RolloutEvent.LAST_STAGE_PASSED else 0
    before = Rollout(id="r", state=state, stages=2, stage=stage)
    wanted = rollout.TRANSITIONS.get((state, event))
    if wanted is None:
        with pytest.raises(PitheadError) as caught:
            advance(before, event, 7)
        assert caught.value.code == "rollout.illegal_transition"
        assert caught.value.facts["state"] == state.value
        return
    after = advance(before, event, 7)
    assert (after.state, after.changed_at) == (wanted, 7)
    assert after.stage == stage + (event is RolloutEvent.STAGE_PASSED)


def test_final_states_are_final():
    leaving = {state for state, _ in rollout.TRANSITIONS}
    assert leaving.isdisjoint(FINAL)
    assert leaving | FINAL == set(RolloutState)


def test_every_state_can_be_reached():
    assert set(rollout.TRANSITIONS.values()) | {RolloutState.DRAFT} == set(RolloutState)
    assert set(assignment.TRANSITIONS.values()) == set(AssignmentState)


@pytest.mark.parametrize(
    ("stage", "event"), [(1, RolloutEvent.STAGE_PASSED), (0, RolloutEvent.LAST_STAGE_PASSED)]
)
def test_a_stage_is_last_or_not(stage: int, event: Any):
    with pytest.raises(PitheadError, match="stage"):
        advance(Rollout(id="r", state=RolloutState.RUNNING, stages=2, stage=stage), event, 0)


@pytest.mark.parametrize(("state", "event"), ASSIGNMENT_PAIRS, ids=lambda value: value.value)
def test_assignment_pair(state: Any, event: Any):
    wanted = assignment.TRANSITIONS.get((state, event))
    if wanted is None:
        with pytest.raises(PitheadError) as caught:
            follow(state, event)
        assert caught.value.code == "rollout.illegal_transition"
        return
    assert follow(state, event) is wanted
    if state in PROGRESS and wanted in PROGRESS:
        assert PROGRESS.index(wanted) >= PROGRESS.index(state), "a late receipt never turns a device back"


def test_receipts_in_any_order_end_at_the_furthest():
    steps = [AssignmentEvent.FETCHING, AssignmentEvent.READY, AssignmentEvent.ACKNOWLEDGED]
    for order in itertools.permutations(steps):
        state = AssignmentState.OFFERED
        for event in order:
            state = follow(state, event)
        assert state is AssignmentState.READY


def test_diagrams_show_every_change():
    for table, start in (
        (rollout.TRANSITIONS, RolloutState.DRAFT),
        (assignment.TRANSITIONS, AssignmentState.PLANNED),
    ):
        drawn = mermaid(table, start)
        assert drawn.startswith(f"stateDiagram-v2\n    [*] --> {start.name}\n")
        for (state, event), target in table.items():
            if state is not target:
                line = next(
                    x for x in drawn.splitlines() if x.startswith(f"    {state.name} --> {target.name}:")
                )
                assert event.value in line


def test_a_line_is_drawn_as_one_box_and_names_its_exceptions():
    drawn = mermaid(assignment.TRANSITIONS, AssignmentState.PLANNED, PROGRESS)
    assert "        READY --> SHADOWING" in drawn
    assert "    UNDER_WAY --> ROLLED_BACK: rolled_back\n" in drawn
    assert "    UNDER_WAY --> REFUSED: refused (not from SOAKING or CONFIRMED)\n" in drawn
    assert "    UNREACHED --> UNDER_WAY: offered, reported\n" in drawn
    assert len(drawn.splitlines()) < 40
