"""Queries on rollouts, their devices and their decisions."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import ColumnElement, and_, or_, update
from sqlmodel import Session, col, select

from contract.errors import PitheadError
from contract.messages import Aftermath, AssignmentState, ModelAssignment, Reporting
from control_plane.core.policy import Policy
from control_plane.core.progress import Arm, Pause
from control_plane.core.rollout import FINAL, RolloutState
from control_plane.store.tables.device import Device
from control_plane.store.tables.rollouts import AssignmentRow, GateEvidenceRow, RolloutRow, VerdictRow

FINAL_NAMES: Final = tuple(sorted(state.value for state in FINAL))
_UNDER_WAY_NAMES: Final = tuple(
    s.value for s in (RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.ROLLING_BACK)
)
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
    watch_from: int | None = None
    looked_at: int = 0
    receipts_to: int = 0

    @property
    def soak_from(self) -> int | None:
        """Since when this stage soaks; None while its devices are not activated yet."""
        return self.watch_from if self.ordered_at is not None else None

    @property
    def watched_stage(self) -> int:
        """The stage whose canaries and controls are compared: between two stages, the one before."""
        return self.stage if self.ordered_at is not None else self.stage - 1

    @property
    def reporting(self) -> Reporting:
        """How often its devices must report."""
        policy = self.policy
        return Reporting(bucket_s=policy.bucket_s, health_s=policy.health_s, trial_s=policy.trial_s)


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


_JSON_FIELDS: Final = {"assignment": ModelAssignment, "selection": Selection, "policy": Policy}


def put(tx: Session, record: RolloutRecord) -> None:
    """Store a rollout, new or changed."""
    values = msgspec.structs.asdict(record)
    for name in _JSON_FIELDS:
        values[name] = _json(values[name])
    values["state"] = record.state.value
    values["pause"] = record.pause.value
    values["soak_from"] = values.pop("watch_from")
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
    """Return the ids of the rollouts that have ended while some devices are still on their way."""
    statement = (
        select(RolloutRow.id)
        .join(AssignmentRow, col(AssignmentRow.rollout_id) == col(RolloutRow.id))
        .where(col(RolloutRow.state).in_(FINAL_NAMES), _under_way())
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


def _under_way() -> ColumnElement[bool]:
    ended = [s.value for s in _ENDED]
    return or_(col(AssignmentRow.state).not_in(ended), col(AssignmentRow.returning))


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
    """Return device -> rollout for those of ``devices`` that an open rollout of the model has.

    A rollout that goes back has only those that have not said that they did.
    """
    found: dict[str, str] = {}
    for part in parts(devices):
        statement = (
            select(AssignmentRow.device_id, AssignmentRow.rollout_id)
            .join(RolloutRow, col(AssignmentRow.rollout_id) == col(RolloutRow.id))
            .where(
                RolloutRow.model_name == model_name,
                col(RolloutRow.state).not_in(FINAL_NAMES),
                or_(col(RolloutRow.state) != RolloutState.ROLLING_BACK.value, col(AssignmentRow.returning)),
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
    for part in parts(devices):
        tx.execute(
            update(AssignmentRow)
            .where(
                col(AssignmentRow.device_id).in_(part),
                col(AssignmentRow.rollout_id).in_(closed),
                _under_way(),
            )
            .values(state=AssignmentState.SUPERSEDED.value, returning=False, changed_at=now)
        )


def attempts(tx: Session, model_name: str, version: str, sha256: str) -> dict[str, int]:
    """Return, by device, the highest attempt at a version (its manifest) that any rollout has made."""
    statement = select(RolloutRow).where(RolloutRow.model_name == model_name, RolloutRow.version == version)
    found: dict[str, int] = {}
    for record in [_rollout(row) for row in tx.exec(statement)]:
        if record.assignment.manifest_sha256 == sha256:
            for m in assignments(tx, record.id):
                found[m.device_id] = max(found.get(m.device_id, 0), m.attempt)
    return found


def reporting_of_others(tx: Session, rollout_id: str, devices: Collection[str]) -> dict[str, list[Reporting]]:
    """Return, by device, how often the other rollouts under way on it need its reports."""
    found: dict[str, list[Reporting]] = {}
    for part in parts(devices):
        statement = (
            select(AssignmentRow.device_id, RolloutRow)
            .join(RolloutRow, col(AssignmentRow.rollout_id) == col(RolloutRow.id))
            .where(
                col(RolloutRow.state).in_(_UNDER_WAY_NAMES),
                RolloutRow.id != rollout_id,
                col(AssignmentRow.device_id).in_(part),
            )
        )
        for device, row in tx.exec(statement):
            found.setdefault(device, []).append(_rollout(row).reporting)
    return found


def gone(tx: Session, devices: Collection[str]) -> set[str]:
    """Return those of ``devices`` that are revoked or no longer known."""
    there: set[str] = set()
    for part in parts(devices):
        there.update(tx.exec(select(Device.id).where(col(Device.id).in_(part), Device.state == "active")))
    return set(devices) - there


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
    return [_verdict(row) for row in tx.exec(statement)][::-1]


def standing(tx: Session, rollout_id: str, since: int) -> list[VerdictRecord]:
    """Return the comparison's decisions from ``since`` on: all of a stage's gate, and every halt."""
    statement = (
        select(VerdictRow)
        .where(
            VerdictRow.rollout_id == rollout_id,
            col(VerdictRow.t) >= since,
            or_(
                col(VerdictRow.kind) == "gate",
                and_(col(VerdictRow.kind) == "watch", col(VerdictRow.verdict) == "halt"),
            ),
        )
        .order_by(col(VerdictRow.id))
    )
    return [_verdict(row) for row in tx.exec(statement)]


def of_people(tx: Session, rollout_id: str) -> list[VerdictRecord]:
    """Return what people have decided, in order."""
    return _verdicts(tx, rollout_id, col(VerdictRow.kind) == "person")


def halts(tx: Session, rollout_id: str) -> list[VerdictRecord]:
    """Return every decision to halt, in order."""
    return _verdicts(tx, rollout_id, col(VerdictRow.verdict) == "halt")


def _verdicts(tx: Session, rollout_id: str, which: ColumnElement[bool]) -> list[VerdictRecord]:
    statement = (
        select(VerdictRow).where(VerdictRow.rollout_id == rollout_id, which).order_by(col(VerdictRow.id))
    )
    return [_verdict(row) for row in tx.exec(statement)]


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


def _rollout(row: RolloutRow) -> RolloutRecord:
    names = set(RolloutRecord.__struct_fields__) - {"watch_from"}
    values: dict[str, Any] = {name: getattr(row, name) for name in names} | {"watch_from": row.soak_from}
    for name, kind in _JSON_FIELDS.items():
        values[name] = msgspec.json.decode(values[name], type=kind)
    values["state"] = RolloutState(row.state)
    values["pause"] = Pause(row.pause)
    return RolloutRecord(**values)


def _verdict(row: VerdictRow) -> VerdictRecord:
    return VerdictRecord(
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


def _assignment(row: AssignmentRow) -> AssignmentRecord:
    values: dict[str, Any] = {name: getattr(row, name) for name in AssignmentRecord.__struct_fields__}
    values["state"] = AssignmentState(row.state)
    values["arm"] = Arm(row.arm)
    if row.previous is not None:
        values["previous"] = msgspec.json.decode(row.previous, type=ModelAssignment)
    values["aftermath"] = None if row.aftermath is None else Aftermath(row.aftermath)
    return AssignmentRecord(**values)


def parts(devices: Collection[str]) -> Iterable[Sequence[str]]:
    """Yield ``devices`` in parts that one ``IN`` can take."""
    line = sorted(devices)
    return (line[start : start + VARIABLES] for start in range(0, len(line), VARIABLES))


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
