"""What devices report of themselves, taken into the assignments of a rollout."""

import logging
from collections.abc import Iterable, Sequence

from msgspec.structs import replace
from sqlmodel import Session

from contract.errors import PitheadError
from contract.messages import Aftermath, AssignmentState
from control_plane.core.assignment import FAILED, REPORTED, AssignmentEvent, follow
from control_plane.services import events
from control_plane.services.rollouts_steps import ENDED
from control_plane.store import devices as device_store
from control_plane.store import rollouts as store
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord
from control_plane.store.rollouts_seen import SeenReceipt

log = logging.getLogger(__name__)


def take_receipts(
    tx: Session,
    record: RolloutRecord,
    members: Sequence[AssignmentRecord],
    receipts: Iterable[SeenReceipt],
    now: int,
) -> tuple[RolloutRecord, list[AssignmentRecord]]:
    """Bring assignments up to what devices have reported, and return them all."""
    by_device = {m.device_id: m for m in members}
    changed: set[str] = set()
    last = record.receipts_to
    for receipt in receipts:
        last = max(last, receipt.id)
        before = by_device.get(receipt.device_id)
        if before is None or receipt.rollout not in {None, record.id}:
            continue
        after = _after_receipt(record, before, receipt, now)
        if after != before:
            by_device[receipt.device_id] = after
            changed.add(receipt.device_id)
            _tell(tx, record, before, after, now)
    if last != record.receipts_to:
        record = replace(record, receipts_to=last)
        store.put(tx, record)
    store.put_assignments(tx, [by_device[device] for device in sorted(changed)])
    return record, [by_device[m.device_id] for m in members]


def _after_receipt(
    record: RolloutRecord, m: AssignmentRecord, receipt: SeenReceipt, now: int
) -> AssignmentRecord:
    if receipt.version != record.version:
        return _back(m, receipt, now)
    event = REPORTED.get(receipt.state)
    if event is None or receipt.attempt != m.attempt:
        return m
    try:
        state = follow(m.state, event)
    except PitheadError:
        facts = {"rollout": record.id, "device": m.device_id, "state": m.state.value, "receipt": receipt.id}
        log.warning("rollout.receipt_out_of_place", extra={"facts": facts})
        return m
    if state is not receipt.state or (state in ENDED and state is m.state):
        return m
    code, detail, aftermath = receipt.code, receipt.detail, receipt.aftermath
    if (state, code, detail, aftermath) == (m.state, m.code, m.detail, m.aftermath):
        return m
    return replace(m, state=state, code=code, detail=detail, aftermath=aftermath, changed_at=now)


def _back(m: AssignmentRecord, receipt: SeenReceipt, now: int) -> AssignmentRecord:
    """A receipt of the old version: whether a device that was told to go back has done so."""
    if not m.returning or m.previous is None or receipt.version != m.previous.version:
        return m
    if receipt.activation < m.activation:
        return m
    if receipt.state is AssignmentState.CONFIRMED:
        return returned(m, Aftermath.ROLLED_BACK, now)
    if receipt.state in FAILED:
        unable = returned(m, Aftermath.UNABLE_TO_ROLL_BACK, now)
        return replace(unable, code=receipt.code, detail=receipt.detail)
    return m


def give_up(tx: Session, m: AssignmentRecord, now: int) -> None:
    """Wait no longer for a device that was revoked or deleted."""
    state = follow(m.state, AssignmentEvent.SUPERSEDED)
    store.put_assignments(tx, [replace(m, state=state, returning=False, changed_at=now)])


def returned(m: AssignmentRecord, aftermath: Aftermath, now: int) -> AssignmentRecord:
    """Return ``m`` after its way back has ended."""
    state = follow(m.state, AssignmentEvent.ROLLED_BACK)
    return replace(m, state=state, aftermath=aftermath, returning=False, changed_at=now)


def removed(tx: Session, m: AssignmentRecord, model_name: str) -> bool:
    """Whether a device that had no version before says that it has none again."""
    reported = device_store.device(tx, m.device_id).reported
    if reported is None or reported.revision < m.activation:
        return False
    return not any(r.model_name == model_name and r.active is not None for r in reported.models)


def _tell(
    tx: Session, record: RolloutRecord, before: AssignmentRecord, after: AssignmentRecord, now: int
) -> None:
    facts = {
        "rollout": record.id,
        "device": after.device_id,
        "from": before.state.value,
        "to": after.state.value,
        "code": after.code,
        "detail": after.detail,
        "aftermath": after.aftermath.value if after.aftermath else None,
    }
    log.info("assignment.changed", extra={"facts": facts})
    if after.state in FAILED or after.aftermath is Aftermath.UNABLE_TO_ROLL_BACK:
        kind = f"assignment.{after.state.value}"
        events.record(tx, actor=after.device_id, kind=kind, subject=record.id, facts=facts, t=now)
