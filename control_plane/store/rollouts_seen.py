"""Queries on what devices have said, as far as rollouts care."""

from collections.abc import Collection

import msgspec
from sqlalchemy import func
from sqlmodel import Session, col, select

from contract.messages import Aftermath, AssignmentState
from control_plane.store.rollouts import parts
from control_plane.store.tables.device import Device
from control_plane.store.tables.telemetry import HealthSample, Receipt, Summary


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
    source: str
    muted: int = 0

    @property
    def stands(self) -> bool:
        """Whether nothing was scored because the machine did not run: that is no evidence of anything."""
        return self.muted > 0 and self.count + self.errors == 0


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
    tx: Session,
    model_name: str,
    devices: Collection[str],
    *,
    since: int,
    received_since: int,
    received_until: int | None = None,
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
    if received_until is not None:
        statement = statement.where(col(Summary.t_received) < received_until)
    return [SeenBucket(*row) for row in tx.execute(statement) if row[0] in wanted]


def spoke(tx: Session, model_name: str, devices: Collection[str], since: int) -> dict[tuple[str, str], int]:
    """Return (device, version) -> the newest activation of which a summary came since ``since``."""
    found: dict[tuple[str, str], int] = {}
    for part in parts(devices):
        statement = (
            select(Summary.device_id, Summary.version, func.max(Summary.activation))
            .where(
                col(Summary.device_id).in_(part),
                Summary.model_name == model_name,
                col(Summary.t_received) >= since,
            )
            .group_by(Summary.device_id, Summary.version)
        )
        found.update(((device, version), activation) for device, version, activation in tx.execute(statement))
    return found


def restarts(tx: Session, devices: Collection[str], since: int) -> dict[str, int]:
    """Return by device how often its engine died since ``since``; an agent that restarts counts anew."""
    found: dict[str, int] = {}
    for part in parts(devices):
        count = col(HealthSample.engine_restarts)
        before = func.lag(count).over(partition_by=HealthSample.device_id, order_by=col(HealthSample.id))
        steps = (
            select(HealthSample.device_id, (count - before).label("more"))
            .where(col(HealthSample.device_id).in_(part), col(HealthSample.t_received) >= since)
            .subquery()
        )
        statement = (
            select(steps.c.device_id, func.sum(steps.c.more))
            .where(steps.c.more > 0)
            .group_by(steps.c.device_id)
        )
        found.update((device, int(more)) for device, more in tx.execute(statement))
    return found


def worst_skew(tx: Session) -> int:
    """Return by how much the clock of any device is known to be wrong, in microseconds."""
    skew = col(Device.clock_skew_us)
    lowest, highest = tx.execute(select(func.min(skew), func.max(skew))).one()
    return max(abs(int(lowest or 0)), abs(int(highest or 0)))
