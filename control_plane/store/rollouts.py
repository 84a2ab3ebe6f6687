"""Queries on rollouts, their devices and their decisions."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import func, update
from sqlmodel import Session, col, select

from contract.errors import PitheadError
from contract.messages import Aftermath, AssignmentState, ModelAssignment
from control_plane.core.policy import Policy
from control_plane.core.progress import Arm, Pause
from control_plane.core.rollout import FINAL, RolloutState
from control_plane.store.tables.device import Device
from control_plane.store.tables.rollouts import AssignmentRow, GateEvidenceRow, RolloutRow, VerdictRow
from control_plane.store.tables.telemetry import Receipt, Summary

FINAL_NAMES: Final = tuple(sorted(state.value for state in FINAL))
VARIABLES: Final = 500
"""Values in one ``IN``, below SQLite's limit."""


class Selection(msgspec.Struct, frozen=True, omit_defaults=True):
    """Which devices a rollout was made for; nothing given means all."""

    group: str | None = None
    labels: dict[str, str] = {}
    devices: tuple[str, ...] = ()


class RolloutRecord(msgspec.Struct, frozen=True):
    """One rollout. Times are microseconds UTC."""

    id: str
    model_name: str
    version: str
    assignment: ModelAssignment
    selection: Selection
    policy: Policy
    state: RolloutState
    stages: int
    created_at: int
    created_by: str
    changed_at: int
    stage: int = 0
    pause: Pause = Pause.NOT
    waived: bool = False
    reason: str = ""
    start_at: int | None = None
    offered_at: int | None = None
    first_ordered_at: int | None = None
    ordered_at: int | None = None
    soak_from: int | None = None
    looked_at: int = 0
    receipts_to: int = 0


class AssignmentRecord(msgspec.Struct, frozen=True):
    """One device in one rollout."""

    rollout_id: str
    device_id: str
    stratum: str
    state: AssignmentState
    changed_at: int
    arm: Arm = Arm.NONE
    stage: int | None = None
    activation: int = 0
    attempt: int = 0
    previous: ModelAssignment | None = None
    code: str | None = None
    detail: str = ""
    aftermath: Aftermath | None = None
    returning: bool = False


class VerdictRecord(msgspec.Struct, frozen=True):
    """One decision."""

    rollout_id: str
    t: int
    stage: int
    kind: str
    verdict: str
    reason: str
    numbers: dict[str, Any]
    bucket: int | None = None
    evidence_sha256: str | None = None
    id: int = 0


class SeenReceipt(msgspec.Struct, frozen=True):
    """A receipt, as far as a rollout cares."""

    id: int
    device_id: str
    version: str
    state: AssignmentState
    activation: int
    attempt: int
    rollout: str | None
    code: str | None
    detail: str
    aftermath: Aftermath | None


class SeenBucket(msgspec.Struct, frozen=True):
    """A summary, as far as the gate cares."""

    device_id: str
    t_received: int
    version: str
    activation: int
    bucket_start: int
    bucket_s: float
    count: int
    errors: int
    alarms: int
    latency_p95_us: float | None


_JSON_FIELDS: Final = {"assignment": ModelAssignment, "selection": Selection, "policy": Policy}


def put(tx: Session, record: RolloutRecord) -> None:
    """Store a rollout, new or changed."""
    values = msgspec.structs.asdict(record)
    for name in _JSON_FIELDS:
        values[name] = _json(values[name])
    values["state"] = record.state.value
    values["pause"] = record.pause.value
    tx.merge(RolloutRow(**values))
    tx.flush()


def get(tx: Session, rollout_id: str) -> RolloutRecord:
    """Return a rollout; ``request.not_found`` when there is none."""
    row = tx.get(RolloutRow, rollout_id)
    if row is None:
        raise PitheadError("request.not_found", f"no rollout {rollout_id}")
    return _rollout(row)


def newest(
    tx: Session, *, model: str | None = None, state: str | None = None, before: str | None = None, limit: int
) -> list[RolloutRecord]:
    """Return rollouts, the newest first; ``before`` is the id at which the last page ended."""
    statement = select(RolloutRow).order_by(col(RolloutRow.id).desc()).limit(limit)
    if model is not None:
        statement = statement.where(RolloutRow.model_name == model)
    if state is not None:
        statement = statement.where(RolloutRow.state == state)
    if before is not None:
        statement = statement.where(col(RolloutRow.id) < before)
    return [_rollout(row) for row in tx.exec(statement)]


def open_ids(tx: Session) -> list[str]:
    """Return the ids of the rollouts that have not ended, in the order of their making."""
    statement = (
        select(RolloutRow.id).where(col(RolloutRow.state).not_in(FINAL_NAMES)).order_by(col(RolloutRow.id))
    )
    return list(tx.exec(statement))


def unfinished_ids(tx: Session) -> list[str]:
    """Return the ids of the rollouts that have succeeded while some devices are still on their way."""
    under_way = [s.value for s in AssignmentState if s not in _ENDED]
    statement = (
        select(RolloutRow.id)
        .join(AssignmentRow, col(AssignmentRow.rollout_id) == col(RolloutRow.id))
        .where(RolloutRow.state == RolloutState.SUCCEEDED.value, col(AssignmentRow.state).in_(under_way))
        .distinct()
        .order_by(col(RolloutRow.id))
    )
    return list(tx.exec(statement))


_ENDED: Final = frozenset(
    {
        AssignmentState.CONFIRMED,
        AssignmentState.ROLLED_BACK,
        AssignmentState.REFUSED,
        AssignmentState.SUPERSEDED,
    }
)


def put_assignments(tx: Session, records: Iterable[AssignmentRecord]) -> None:
    """Store assignments, new or changed."""
    for record in records:
        values = msgspec.structs.asdict(record)
        values["state"] = record.state.value
        values["arm"] = record.arm.value
        values["previous"] = None if record.previous is None else _json(record.previous)
        values["aftermath"] = None if record.aftermath is None else record.aftermath.value
        tx.merge(AssignmentRow(**values))
    tx.flush()


def assignments(tx: Session, rollout_id: str) -> list[AssignmentRecord]:
    """Return a rollout's devices, by id."""
    statement = (
        select(AssignmentRow)
        .where(AssignmentRow.rollout_id == rollout_id)
        .order_by(col(AssignmentRow.device_id))
    )
    return [_assignment(row) for row in tx.exec(statement)]


def locked(tx: Session, model_name: str, devices: Collection[str]) -> dict[str, str]:
    """Return device -> rollout for those of ``devices`` that an open rollout of the model has."""
    found: dict[str, str] = {}
    for part in _parts(devices):
        statement = (
            select(AssignmentRow.device_id, AssignmentRow.rollout_id)
            .join(RolloutRow, col(AssignmentRow.rollout_id) == col(RolloutRow.id))
            .where(
                RolloutRow.model_name == model_name,
                col(RolloutRow.state).not_in(FINAL_NAMES),
                col(AssignmentRow.device_id).in_(part),
            )
        )
        found.update((device, rollout) for device, rollout in tx.exec(statement))
    return found


def supersede(tx: Session, model_name: str, devices: Collection[str], now: int) -> None:
    """End what closed rollouts of the model still expect of ``devices``."""
    closed = select(RolloutRow.id).where(
        RolloutRow.model_name == model_name, col(RolloutRow.state).in_(FINAL_NAMES)
    )
    ended = [s.value for s in _ENDED]
    for part in _parts(devices):
        tx.execute(
            update(AssignmentRow)
            .where(
                col(AssignmentRow.device_id).in_(part),
                col(AssignmentRow.rollout_id).in_(closed),
                col(AssignmentRow.state).not_in(ended),
            )
            .values(state=AssignmentState.SUPERSEDED.value, changed_at=now)
        )


def of_device(tx: Session, device_id: str) -> list[AssignmentRecord]:
    """Return all that rollouts ever wanted of a device, the newest rollout first."""
    statement = (
        select(AssignmentRow)
        .where(AssignmentRow.device_id == device_id)
        .order_by(col(AssignmentRow.rollout_id).desc())
    )
    return [_assignment(row) for row in tx.exec(statement)]


def add_verdict(tx: Session, record: VerdictRecord) -> None:
    """Append a decision."""
    values = msgspec.structs.asdict(record)
    del values["id"]
    values["numbers"] = _json(record.numbers)
    tx.add(VerdictRow(**values))
    tx.flush()


def verdicts(tx: Session, rollout_id: str, *, newest_only: int | None = None) -> list[VerdictRecord]:
    """Return a rollout's decisions in their order, or only the newest."""
    statement = (
        select(VerdictRow).where(VerdictRow.rollout_id == rollout_id).order_by(col(VerdictRow.id).desc())
    )
    if newest_only is not None:
        statement = statement.limit(newest_only)
    found = [
        VerdictRecord(
            id=row.id or 0,
            rollout_id=row.rollout_id,
            t=row.t,
            stage=row.stage,
            kind=row.kind,
            verdict=row.verdict,
            bucket=row.bucket,
            reason=row.reason,
            numbers=msgspec.json.decode(row.numbers, type=dict[str, Any]),
            evidence_sha256=row.evidence_sha256,
        )
        for row in tx.exec(statement)
    ]
    return found[::-1]


def put_evidence(tx: Session, rollout_id: str, sha256: str, content: bytes) -> None:
    """Keep what a decision was based on."""
    tx.merge(GateEvidenceRow(sha256=sha256, rollout_id=rollout_id, content=content))
    tx.flush()


def evidence(tx: Session, rollout_id: str, sha256: str) -> bytes:
    """Return what was kept, compressed as it was; ``request.not_found`` when there is none."""
    row = tx.get(GateEvidenceRow, sha256)
    if row is None or row.rollout_id != rollout_id:
        raise PitheadError("request.not_found", f"rollout {rollout_id} has no evidence {sha256}")
    return row.content


def newest_receipt(tx: Session) -> int:
    """Return the id of the newest receipt, or 0."""
    return tx.exec(select(Receipt.id).order_by(col(Receipt.id).desc()).limit(1)).first() or 0


def receipts_after(tx: Session, model_name: str, after: int, limit: int = 10_000) -> list[SeenReceipt]:
    """Return the receipts on a model above the id ``after``, in order."""
    fields = SeenReceipt.__struct_fields__
    statement = (
        select(*(getattr(Receipt, name) for name in fields))
        .where(col(Receipt.id) > after, Receipt.model_name == model_name)
        .order_by(col(Receipt.id))
        .limit(limit)
    )
    return [
        msgspec.convert(dict(zip(fields, row, strict=True)), SeenReceipt) for row in tx.execute(statement)
    ]


def buckets(
    tx: Session, model_name: str, devices: Collection[str], *, since: int, received_since: int
) -> list[SeenBucket]:
    """Return summaries of ``devices``, from ``since`` by their clocks and from ``received_since`` by ours."""
    fields = SeenBucket.__struct_fields__
    wanted = set(devices)
    statement = (
        select(*(getattr(Summary, name) for name in fields))
        .where(
            Summary.model_name == model_name,
            col(Summary.bucket_start) >= since,
            col(Summary.t_received) >= received_since,
        )
        .order_by(col(Summary.id))
    )
    return [SeenBucket(*row) for row in tx.execute(statement) if row[0] in wanted]


def worst_skew(tx: Session) -> int:
    """Return by how much the clock of any device is known to be wrong, in microseconds."""
    skew = col(Device.clock_skew_us)
    lowest, highest = tx.execute(select(func.min(skew), func.max(skew))).one()
    return max(abs(int(lowest or 0)), abs(int(highest or 0)))


def _rollout(row: RolloutRow) -> RolloutRecord:
    values: dict[str, Any] = {name: getattr(row, name) for name in RolloutRecord.__struct_fields__}
    for name, kind in _JSON_FIELDS.items():
        values[name] = msgspec.json.decode(values[name], type=kind)
    values["state"] = RolloutState(row.state)
    values["pause"] = Pause(row.pause)
    return RolloutRecord(**values)


def _assignment(row: AssignmentRow) -> AssignmentRecord:
    values: dict[str, Any] = {name: getattr(row, name) for name in AssignmentRecord.__struct_fields__}
    values["state"] = AssignmentState(row.state)
    values["arm"] = Arm(row.arm)
    if row.previous is not None:
        values["previous"] = msgspec.json.decode(row.previous, type=ModelAssignment)
    values["aftermath"] = None if row.aftermath is None else Aftermath(row.aftermath)
    return AssignmentRecord(**values)


def _parts(devices: Collection[str]) -> Iterable[Sequence[str]]:
    line = sorted(devices)
    return (line[start : start + VARIABLES] for start in range(0, len(line), VARIABLES))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
