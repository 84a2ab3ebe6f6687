"""How far the device is with an assignment: what its receipts say.

A receipt is sent when this differs from what was told before, so a receipt
that a power cut swallowed is made up for.
"""

from typing import Final

from msgspec import Struct

from agent.core import slots as slot
from agent.core.plan import Fetch, Observed, Probe, Step
from contract.messages import Aftermath, AssignmentState, ErrorCode, ModelAssignment, Role, Text

RANK: Final = {
    AssignmentState.ACKNOWLEDGED: 0,
    AssignmentState.FETCHING: 1,
    AssignmentState.VERIFIED: 2,
    AssignmentState.PROBED: 3,
    AssignmentState.READY: 4,
    AssignmentState.ACTIVATING: 5,
    AssignmentState.SOAKING: 6,
    AssignmentState.CONFIRMED: 7,
    AssignmentState.ROLLED_BACK: 7,
    AssignmentState.REFUSED: 7,
}


class Standing(Struct, frozen=True):
    """A state with its reason."""

    state: AssignmentState
    code: ErrorCode | None = None
    detail: Text = ""
    aftermath: Aftermath | None = None


def standing(
    wanted: ModelAssignment,
    seen: Observed,
    *,
    task: Step | None = None,
    soaking: bool = False,
    trouble: tuple[ErrorCode, str] | None = None,
) -> Standing:
    """Return how far a model is with one of its assignments.

    ``task`` is what runs for it now, ``soaking`` whether the trial's session
    is in service, ``trouble`` the last error that will be tried again.
    """
    slots, digest = seen.slots, wanted.manifest_sha256
    reached = _in_service(wanted, slots, soaking=soaking)
    if reached is not None:
        return Standing(reached)
    refused = slot.rejection(slots, wanted)
    if refused is not None:
        state = AssignmentState.ROLLED_BACK if refused.stage == "trial" else AssignmentState.REFUSED
        return Standing(state, refused.code, refused.detail, refused.aftermath)
    if slots.find(digest) is not None and digest not in seen.broken:
        return Standing(AssignmentState.READY)
    if isinstance(task, Fetch | Probe) and task.wanted == wanted:
        return Standing(AssignmentState.FETCHING if isinstance(task, Fetch) else AssignmentState.VERIFIED)
    if trouble is not None:
        return Standing(AssignmentState.FETCHING, trouble[0], trouble[1][:2000], Aftermath.NO_CHANGE)
    return Standing(AssignmentState.ACKNOWLEDGED)


def _in_service(wanted: ModelAssignment, slots: slot.Slots, *, soaking: bool) -> AssignmentState | None:
    trial, active = slots.trial, slots.active
    if wanted.role is not Role.ACTIVE:
        return None
    if trial is not None:
        if trial.digest != wanted.manifest_sha256 or trial.activation < wanted.activation:
            return None
        return AssignmentState.SOAKING if soaking else AssignmentState.ACTIVATING
    if active is None or active.digest != wanted.manifest_sha256 or active.activation < wanted.activation:
        return None
    return AssignmentState.CONFIRMED


def news(told: Standing | None, now: Standing) -> bool:
    """Whether ``now`` is worth a receipt after ``told``: only forward, or another end, or another reason."""
    if told is None:
        return True
    before, after = RANK[told.state], RANK[now.state]
    return after > before or (after == before and (told.state, told.code) != (now.state, now.code))
