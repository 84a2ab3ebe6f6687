"""Carry out what the pure core decides: one step of one rollout in one transaction."""

import logging
from typing import Final

from msgspec.structs import replace
from sqlmodel import Session

from contract.messages import AssignmentState, Desired, ModelAssignment, Reporting
from control_plane.core import orders
from control_plane.core.assignment import FAILED, ON_NEW_VERSION, AssignmentEvent, follow
from control_plane.core.progress import (
    ActivateStage,
    Arm,
    BeginSoak,
    Happen,
    MarkUnreached,
    Offer,
    Pause,
    Step,
    is_whole,
)
from control_plane.core.rollout import FINAL, Rollout, RolloutEvent, RolloutState, advance
from control_plane.services import desired, events
from control_plane.store import rollouts as store
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord, VerdictRecord

log = logging.getLogger(__name__)

SYSTEM: Final = "system"
ENDED: Final = FAILED | {AssignmentState.SUPERSEDED}


def core(record: RolloutRecord) -> Rollout:
    """Return the rollout as its state machine sees it."""
    return Rollout(
        id=record.id,
        state=record.state,
        stages=record.stages,
        stage=record.stage,
        changed_at=record.changed_at,
    )


def happen(
    tx: Session,
    record: RolloutRecord,
    event: RolloutEvent,
    *,
    actor: str,
    reason: str,
    now: int,
    pause: Pause = Pause.NOT,
) -> RolloutRecord:
    """Let ``event`` happen with all that follows from it; ``rollout.illegal_transition`` when it cannot."""
    after = advance(core(record), event, now)
    changed = replace(
        record, state=after.state, stage=after.stage, changed_at=now, reason=reason[:2000], pause=pause
    )
    match event:
        case RolloutEvent.STAGE_PASSED:
            # ``watch_from`` stays: until the next stage is activated, this one's arms are watched on.
            changed = replace(changed, ordered_at=None, waived=False)
        case RolloutEvent.LAST_STAGE_PASSED:
            _close(tx, changed, now)
        case RolloutEvent.HALTED | RolloutEvent.ROLLBACK_ORDERED:
            _turn_back(tx, changed, now)
        case RolloutEvent.ABORT_ORDERED if record.state is not RolloutState.ROLLING_BACK:
            _withdraw(tx, changed, now)
    store.put(tx, changed)
    if changed.state in FINAL:
        _leave_reporting(tx, changed, now)
    facts: dict[str, object] = {
        "model": record.model_name,
        "version": record.version,
        "from": record.state.value,
        "to": changed.state.value,
        "stage": record.stage + 1,
        "reason": changed.reason,
    }
    events.record(tx, actor=actor, kind=f"rollout.{event.value}", subject=record.id, facts=facts, t=now)
    log.info("rollout.%s", event.value, extra={"facts": {"rollout": record.id, "actor": actor, **facts}})
    return changed


def execute(tx: Session, record: RolloutRecord, step: Step, now: int) -> RolloutRecord:
    """Carry out one step of the planner."""
    match step:
        case Offer(devices):
            return _offer(tx, record, frozenset(devices), now)
        case MarkUnreached(devices):
            return _mark_unreached(tx, record, frozenset(devices), now)
        case ActivateStage():
            return _activate(tx, record, step, now)
        case BeginSoak():
            changed = replace(record, watch_from=now, looked_at=0, changed_at=now)
            store.put(tx, changed)
            facts = {"stage": record.stage + 1}
            events.record(tx, actor=SYSTEM, kind="rollout.soaking", subject=record.id, facts=facts, t=now)
            return changed
        case Happen():
            return happen(tx, record, step.event, actor=SYSTEM, reason=step.reason, now=now, pause=step.pause)


def _offer(tx: Session, record: RolloutRecord, devices: frozenset[str], now: int) -> RolloutRecord:
    policy = record.policy
    at_once = policy.strategy == "all_at_once"
    others = store.reporting_of_others(tx, record.id, devices)
    changed: list[AssignmentRecord] = []
    for m in store.assignments(tx, record.id):
        if m.device_id not in devices:
            continue
        new = replace(record.assignment, attempt=m.attempt)
        previous = orders.active(desired.read(tx, m.device_id), record.model_name)
        wanted_reports = [*others.get(m.device_id, ()), record.reporting]

        def edit(
            document: Desired, new: ModelAssignment = new, reports: list[Reporting] = wanted_reports
        ) -> Desired:
            staged = orders.report(orders.stage(document, new), reports)
            return orders.activate(staged, new) if at_once else staged

        wanted = desired.change(tx, m.device_id, edit, now=now)
        offered = replace(
            m,
            state=follow(m.state, AssignmentEvent.OFFERED),
            previous=previous if previous is None or previous.version != record.version else m.previous,
            changed_at=now,
            code=None,
            detail="",
            aftermath=None,
        )
        if at_once:
            active = orders.active(wanted, record.model_name)
            assert active is not None
            offered = replace(offered, arm=Arm.CANARY, stage=0, activation=active.activation)
        changed.append(offered)
    store.put_assignments(tx, changed)
    record = replace(record, offered_at=now, changed_at=now)
    store.put(tx, record)
    facts = {"devices": len(changed), "strategy": policy.strategy}
    events.record(tx, actor=SYSTEM, kind="rollout.offered", subject=record.id, facts=facts, t=now)
    return record


def _mark_unreached(tx: Session, record: RolloutRecord, devices: frozenset[str], now: int) -> RolloutRecord:
    members = [m for m in store.assignments(tx, record.id) if m.device_id in devices]
    store.put_assignments(
        tx,
        [replace(m, state=follow(m.state, AssignmentEvent.DEADLINE_PASSED), changed_at=now) for m in members],
    )
    events.record(
        tx,
        actor=SYSTEM,
        kind="rollout.unreached",
        subject=record.id,
        facts={"devices": sorted(devices)},
        t=now,
    )
    return record


def _activate(tx: Session, record: RolloutRecord, step: ActivateStage, now: int) -> RolloutRecord:
    """(Re)activate both arms in one transaction, so that both hear of it at the same moment."""
    choice = step.choice
    canaries, held = frozenset(choice.canaries), frozenset(choice.hold_out)
    controls = frozenset(choice.controls)
    changed: list[AssignmentRecord] = []
    for m in store.assignments(tx, record.id):
        if m.device_id in canaries:
            arm, stage = Arm.CANARY, record.stage
            changed.append(_to_new(tx, record, replace(m, arm=arm, stage=stage), now))
        elif m.device_id in controls:
            wanted = desired.change(
                tx,
                m.device_id,
                lambda document: orders.restart(document, record.model_name, record.id),
                now=now,
            )
            active = orders.active(wanted, record.model_name)
            assert active is not None
            changed.append(
                replace(
                    m,
                    arm=Arm.HOLD_OUT if m.device_id in held else Arm.CONTROL,
                    activation=active.activation,
                    changed_at=now,
                )
            )
        elif m.arm in {Arm.CONTROL, Arm.HOLD_OUT}:
            changed.append(replace(m, arm=Arm.NONE, changed_at=now))
    store.put_assignments(tx, changed)
    first = record.first_ordered_at if record.first_ordered_at is not None else now
    record = replace(
        record, ordered_at=now, first_ordered_at=first, watch_from=None, looked_at=0, changed_at=now
    )
    store.put(tx, record)
    facts = {
        "stage": record.stage + 1,
        "canaries": list(choice.canaries),
        "controls": len(choice.controls),
        "hold_out": list(choice.hold_out),
    }
    events.record(tx, actor=SYSTEM, kind="rollout.activated", subject=record.id, facts=facts, t=now)
    return record


def _to_new(tx: Session, record: RolloutRecord, m: AssignmentRecord, now: int) -> AssignmentRecord:
    new = replace(record.assignment, attempt=m.attempt)
    before = orders.active(desired.read(tx, m.device_id), record.model_name)
    wanted = desired.change(tx, m.device_id, lambda document: orders.activate(document, new), now=now)
    active = orders.active(wanted, record.model_name)
    assert active is not None
    previous = before if before is not None and before.version != record.version else m.previous
    return replace(m, previous=previous, activation=active.activation, changed_at=now)


def _close(tx: Session, record: RolloutRecord, now: int) -> None:
    """The release has passed: the hold-out, and whoever came late or not at all, get it too.

    Unless the policy's last stage was not meant for all: nobody has said that
    more may run the version, so the others keep what they have.
    """
    members = store.assignments(tx, record.id)
    left = [m for m in members if m.arm is not Arm.CANARY and m.state not in ENDED]
    if not is_whole(record.policy, len(members)):
        store.put_assignments(tx, [_drop(tx, record, m, now) for m in left])
        return
    offered = [
        replace(m, state=follow(m.state, AssignmentEvent.OFFERED))
        if m.state is AssignmentState.PLANNED
        else m
        for m in left
    ]
    store.put_assignments(tx, [_to_new(tx, record, m, now) for m in offered])


def _leave_reporting(tx: Session, record: RolloutRecord, now: int) -> None:
    """Give devices on which rollouts of other models go on the intervals that those need."""
    devices = [m.device_id for m in store.assignments(tx, record.id)]
    for device, reports in store.reporting_of_others(tx, record.id, devices).items():
        desired.change(
            tx,
            device,
            lambda document, reports=reports: orders.report(document, reports),  # type: ignore[misc]
            now=now,
        )


def _turn_back(tx: Session, record: RolloutRecord, now: int) -> None:
    """Every device goes back to the version that it had; what was only staged is withdrawn."""
    changed: list[AssignmentRecord] = []
    for m in store.assignments(tx, record.id):
        if m.arm is not Arm.CANARY:
            changed.append(_drop(tx, record, m, now))
            continue
        # A device that rolled back by itself serves the old version already: it is not disturbed again.
        again = m.state not in FAILED
        wanted = put_back(tx, record, m, again=again, now=now)
        active = orders.active(wanted, record.model_name)
        activation = active.activation if active is not None else wanted.revision
        changed.append(replace(m, activation=activation, returning=again, changed_at=now))
    store.put_assignments(tx, changed)


def _withdraw(tx: Session, record: RolloutRecord, now: int) -> None:
    """End what has not begun. Devices that serve the new version keep it."""
    members = [m for m in store.assignments(tx, record.id) if m.state not in ON_NEW_VERSION]
    store.put_assignments(tx, [_drop(tx, record, m, now) for m in members])


def _drop(tx: Session, record: RolloutRecord, m: AssignmentRecord, now: int) -> AssignmentRecord:
    if m.arm is Arm.CANARY:  # told to activate, not begun: it stays what it was
        put_back(tx, record, m, again=m.state not in FAILED, now=now)
    else:
        desired.change(
            tx, m.device_id, lambda document: orders.withdraw(document, record.model_name), now=now
        )
    if m.state in ENDED:
        return m
    return replace(m, state=follow(m.state, AssignmentEvent.SUPERSEDED), changed_at=now)


def put_back(tx: Session, record: RolloutRecord, m: AssignmentRecord, *, again: bool, now: int) -> Desired:
    """Have the device serve the version that it had; ``again`` tells it to activate that once more."""

    def edit(document: Desired) -> Desired:
        return orders.put_back(document, record.model_name, m.previous, record.id, again=again)

    return desired.change(tx, m.device_id, edit, now=now)


def note_verdict(tx: Session, record: VerdictRecord) -> None:
    """Keep a decision, and tell of it when it is one."""
    store.add_verdict(tx, record)
    facts = {
        "stage": record.stage + 1,
        "kind": record.kind,
        "verdict": record.verdict,
        "bucket": record.bucket,
        "reason": record.reason,
    }
    log.info("rollout.verdict", extra={"facts": {"rollout": record.rollout_id, **facts}})
    if record.verdict != "hold":
        events.record(
            tx, actor=SYSTEM, kind="rollout.verdict", subject=record.rollout_id, facts=facts, t=record.t
        )
