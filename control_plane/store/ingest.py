"""Writing telemetry: whole batches, by executemany. See ``store.telemetry`` for reading it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Table, bindparam, delete, func, tuple_, update
from sqlalchemy import select as sql_select
from sqlalchemy.dialects import postgresql, sqlite
from sqlmodel import Session, SQLModel, col, select

from contract.messages import Anomaly, Envelope, Health, ModelSummary, Receipt, Reported, Sketch
from contract.sketch import quantile
from control_plane.store.tables import telemetry as tables
from control_plane.store.tables.device import Device

Row = dict[str, Any]
WatermarkKey = tuple[str, str, str]
"""(device, epoch, class)"""
Ranges = tuple[tuple[int, int], ...]

DEAD_PAYLOAD: Final = 4096
"""Bytes kept of a refused payload."""
DEAD_PER_DEVICE: Final = 1_000
"""Refused messages kept of one device, the newest."""
MARKS_PER_DEVICE: Final = 200
"""Watermarks kept of one device, the newest. An agent has one epoch and five classes."""

_ranges = msgspec.json.Decoder(Ranges)


class DeadRecord(msgspec.Struct, frozen=True):
    """A refused message."""

    device_id: str
    topic: str
    sha256: str
    code: str
    detail: str
    payload: bytes
    t_received: int


def insert_records(tx: Session, records: Sequence[tuple[Envelope, int]]) -> None:
    """Insert ``(envelope, receipt time)``; those that are there already are left as they are."""
    rows: dict[type[SQLModel], list[Row]] = {}
    for envelope, received in records:
        match envelope.body:
            case Receipt() as body:
                rows.setdefault(tables.Receipt, []).append(_base(envelope, received) | _receipt(body))
            case Anomaly() as body:
                rows.setdefault(tables.Anomaly, []).append(_base(envelope, received) | _anomaly(body))
            case Health() as body:
                rows.setdefault(tables.HealthSample, []).append(_base(envelope, received) | _health(body))
            case ModelSummary() as body:
                rows.setdefault(tables.Summary, []).append(_base(envelope, received) | _summary(body))
            case Reported():
                pass  # kept on the device's own row, the newest only
    for kind, values in rows.items():
        statement = _insert(tx, _table(kind)).on_conflict_do_nothing(
            index_elements=["device_id", "epoch", "priority", "seq"]
        )
        tx.connection().execute(statement, values)


def watermarks(tx: Session, keys: Collection[WatermarkKey]) -> dict[WatermarkKey, tuple[int, Ranges]]:
    """Return ``(prefix, ranges)`` of each key that has any."""
    mark = tables.Watermark
    found: dict[WatermarkKey, tuple[int, Ranges]] = {}
    wanted = sorted(keys)
    for start in range(0, len(wanted), 200):  # below SQLite's limit of variables
        statement = select(mark).where(
            tuple_(col(mark.device_id), col(mark.epoch), col(mark.priority)).in_(wanted[start : start + 200])
        )
        for row in tx.exec(statement):
            found[row.device_id, row.epoch, row.priority] = (row.prefix, _ranges.decode(row.ranges))
    return found


def put_watermarks(tx: Session, marks: Mapping[WatermarkKey, tuple[int, Ranges]], now: int) -> None:
    """Store ``(prefix, ranges)`` of each key."""
    if not marks:
        return
    statement = _insert(tx, _table(tables.Watermark))
    statement = statement.on_conflict_do_update(
        index_elements=["device_id", "epoch", "priority"],
        set_={name: statement.excluded[name] for name in ("prefix", "ranges", "t")},
    )
    rows = [
        {
            "device_id": device,
            "epoch": epoch,
            "priority": priority,
            "prefix": prefix,
            "ranges": msgspec.json.encode(ranges).decode(),
            "t": now,
        }
        for (device, epoch, priority), (prefix, ranges) in sorted(marks.items())
    ]
    tx.connection().execute(statement, rows)
    _keep_newest(tx, _table(tables.Watermark), {device for device, _, _ in marks}, "t", MARKS_PER_DEVICE)


def insert_dead(tx: Session, records: Sequence[DeadRecord]) -> None:
    """Keep refused messages, the newest of each device; one that comes again is counted."""
    if not records:
        return
    table = _table(tables.DeadLetter)
    statement = _insert(tx, table)
    statement = statement.on_conflict_do_update(
        index_elements=["device_id", "sha256"],
        set_={"last_received": statement.excluded.last_received, "count": table.c.count + 1},
    )
    for record in records:
        row = {
            "device_id": record.device_id,
            "topic": record.topic,
            "sha256": record.sha256,
            "code": record.code,
            "detail": record.detail,
            "length": len(record.payload),
            "payload": record.payload[:DEAD_PAYLOAD],
            "first_received": record.t_received,
            "last_received": record.t_received,
            "count": 1,
        }
        tx.connection().execute(statement, row)
    _keep_newest(tx, table, {record.device_id for record in records}, "last_received", DEAD_PER_DEVICE)


def prune_dead(tx: Session, before: int, keep: int) -> int:
    """Delete refused messages older than ``before``, and all but the newest ``keep``; return how many."""
    letter = tables.DeadLetter
    oldest_kept = tx.exec(
        select(letter.last_received).order_by(col(letter.last_received).desc()).offset(keep).limit(1)
    ).first()
    limit = before if oldest_kept is None else max(before, oldest_kept + 1)
    return int(tx.connection().execute(delete(letter).where(col(letter.last_received) < limit)).rowcount)


def _keep_newest(tx: Session, table: Table, devices: Collection[str], age: str, keep: int) -> None:
    """Delete all but the ``keep`` rows of each of ``devices`` whose column ``age`` is the newest."""
    connection = tx.connection()
    key = tuple(table.primary_key.columns)
    full = (
        sql_select(table.c.device_id)
        .where(table.c.device_id.in_(sorted(devices)))
        .group_by(table.c.device_id)
        .having(func.count() > keep)
    )
    for (device,) in connection.execute(full).all():
        old = (
            sql_select(*key)
            .where(table.c.device_id == device)
            .order_by(table.c[age].desc(), *(column.desc() for column in key))
            .offset(keep)
        )
        connection.execute(table.delete().where(tuple_(*key).in_(old)))


def known_devices(tx: Session, devices: Collection[str]) -> set[str]:
    """Return those of ``devices`` that have enrolled and are not revoked."""
    statement = select(Device.id).where(col(Device.id).in_(sorted(devices)), col(Device.state) == "active")
    return set(tx.exec(statement))


def update_reported(tx: Session, envelope: Envelope, body: Reported, received: int) -> None:
    """Keep what a device reports, unless a newer report is there already."""
    tx.connection().execute(
        update(Device)
        .where(
            col(Device.id) == envelope.device,
            (col(Device.reported_epoch) != envelope.epoch) | (col(Device.reported_seq) < envelope.seq),
        )
        .values(
            reported=msgspec.json.encode(body).decode(),
            reported_at=received,
            reported_epoch=envelope.epoch,
            reported_seq=envelope.seq,
            **_facts(body),
        )
    )


def update_health(tx: Session, envelope: Envelope, body: Health, received: int) -> None:
    """Keep a device's newest health."""
    tx.connection().execute(
        update(Device)
        .where(
            col(Device.id) == envelope.device,
            (col(Device.health_epoch) != envelope.epoch) | (col(Device.health_seq) < envelope.seq),
        )
        .values(
            health=msgspec.json.encode(body).decode(),
            health_at=received,
            health_epoch=envelope.epoch,
            health_seq=envelope.seq,
        )
    )


def update_seen(tx: Session, seen: Mapping[str, tuple[int, int]]) -> None:
    """Note of each device ``(receipt time, receipt time less the device's time)`` of its newest record."""
    if not seen:
        return
    statement = (
        update(_table(Device))
        .where(_table(Device).c.id == bindparam("of"))
        .values(last_seen=bindparam("at"), clock_skew_us=bindparam("skew"))
    )
    rows = [{"of": device, "at": at, "skew": skew} for device, (at, skew) in sorted(seen.items())]
    tx.connection().execute(statement, rows)


def update_status(
    tx: Session, device: str, *, online: bool, boot_id: str, t_wall: int, received: int
) -> None:
    """Note that a device came or went."""
    row = tx.get(Device, device)
    if row is None:
        return
    if row.online != online:
        row.online = online
        row.online_at = received
    row.boot_id = boot_id
    row.status_t = t_wall
    if online:
        row.last_seen = received
    tx.flush()


def _table(kind: type[SQLModel]) -> Table:
    table: Table = SQLModel.metadata.tables[str(kind.__tablename__)]
    return table


def _insert(tx: Session, table: Table) -> "sqlite.Insert | postgresql.Insert":
    if tx.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def _base(envelope: Envelope, received: int) -> Row:
    return {
        "device_id": envelope.device,
        "epoch": envelope.epoch,
        "priority": envelope.priority.value,
        "seq": envelope.seq,
        "t_wall": envelope.t_wall,
        "t_received": received,
    }


def _receipt(body: Receipt) -> Row:
    return {
        "model_name": body.model_name,
        "version": body.version,
        "state": body.state.value,
        "activation": body.activation,
        "attempt": body.attempt,
        "rollout": body.rollout,
        "code": body.code,
        "detail": body.detail,
        "aftermath": None if body.aftermath is None else body.aftermath.value,
        "facts": msgspec.json.encode(body.facts).decode(),
    }


def _anomaly(body: Anomaly) -> Row:
    return {
        "model_name": body.model_name,
        "version": body.version,
        "t": body.t,
        "score": body.score,
        "threshold": body.threshold,
        "variant": body.variant,
        "source": body.source,
        "source_ref": body.source_ref,
        "contributions": msgspec.json.encode(body.contributions).decode(),
    }


def _health(body: Health) -> Row:
    return {
        "uptime_s": body.uptime_s,
        "cpu_percent": body.cpu_percent,
        "memory_percent": body.memory_percent,
        "agent_pss_bytes": body.agent_pss_bytes,
        "disk_free_bytes": body.disk_free_bytes,
        "temperature_c": body.temperature_c,
        "engine_restarts": body.engine_restarts,
        "outbox": msgspec.json.encode(body.outbox).decode(),
        "body": msgspec.json.encode(body).decode(),
    }


def _summary(body: ModelSummary) -> Row:
    return {
        "model_name": body.model_name,
        "version": body.version,
        "activation": body.activation,
        "bucket_start": body.bucket_start,
        "bucket_s": body.bucket_s,
        "count": body.count,
        "errors": body.errors,
        "alarms": body.alarms,
        "missing": body.missing,
        "suppressed": body.suppressed,
        "muted": body.muted,
        "queue": body.queue,
        "variant": body.variant,
        "accelerator": body.accelerator,
        "source": body.source,
        "latency_p50_us": _quantile(body.latency_us, 0.5),
        "latency_p95_us": _quantile(body.latency_us, 0.95),
        "latency_p99_us": _quantile(body.latency_us, 0.99),
        "score_p50": _quantile(body.score, 0.5),
        "score_p95": _quantile(body.score, 0.95),
        "latency": _json(body.latency_us),
        "score": _json(body.score),
    }


def _facts(body: Reported) -> Row:
    """What a report says of the device itself; nothing where it is silent."""
    facts: Row = {}
    if body.hardware:
        facts["hardware"] = body.hardware
    if body.arch:
        facts["arch"] = body.arch
    if body.agent_version:
        facts["agent_version"] = body.agent_version
    if body.accelerators:
        facts["accelerators"] = msgspec.json.encode(body.accelerators).decode()
    return facts


def _quantile(sketch: Sketch | None, q: float) -> float | None:
    return None if sketch is None else quantile(sketch, q)


def _json(sketch: Sketch | None) -> str | None:
    return None if sketch is None else msgspec.json.encode(sketch).decode()
