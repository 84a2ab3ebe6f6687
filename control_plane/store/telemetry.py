"""Reading telemetry: pages with the newest first. See ``store.ingest`` for writing it."""

from typing import Any, Final, TypeVar

import msgspec
from sqlalchemy import Select
from sqlmodel import Session, SQLModel, col, select

from control_plane.store.tables import telemetry as tables

T = TypeVar("T", bound=msgspec.Struct)
NEWEST: Final = 200
"""Summaries of a device among which the newest of each model are looked for."""


class Window(msgspec.Struct, frozen=True):
    """Which part of a table is asked for; None does not narrow it.

    ``since`` (inclusive) and ``until`` (exclusive) are receipt times in
    microseconds, ``before`` the id at which the last page ended.
    """

    device: str | None = None
    model: str | None = None
    version: str | None = None
    since: int | None = None
    until: int | None = None
    before: int | None = None
    limit: int = 100


class ReceiptRecord(msgspec.Struct, frozen=True):
    """One step of a device towards one version."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    model_name: str
    version: str
    state: str
    activation: int
    attempt: int
    rollout: str | None
    code: str | None
    detail: str
    aftermath: str | None
    facts: dict[str, Any]


class AnomalyRecord(msgspec.Struct, frozen=True):
    """One alarm of one model."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    model_name: str
    version: str
    t: int
    score: float
    threshold: float
    variant: str | None
    source: str
    source_ref: str | None
    contributions: dict[str, float]


class HealthRecord(msgspec.Struct, frozen=True):
    """How a device was at one moment."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    body: dict[str, Any]


class SummaryRecord(msgspec.Struct, frozen=True):
    """What one model did on one device during one bucket of time."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    model_name: str
    version: str
    activation: int
    bucket_start: int
    bucket_s: float
    count: int
    errors: int
    alarms: int
    missing: int
    suppressed: int
    muted: int
    queue: int
    variant: str | None
    accelerator: str | None
    source: str
    latency_p50_us: float | None
    latency_p95_us: float | None
    latency_p99_us: float | None
    score_p50: float | None
    score_p95: float | None


class DeadLetterRecord(msgspec.Struct, frozen=True):
    """A message that was refused for good."""

    id: int
    device_id: str
    topic: str
    code: str
    detail: str
    length: int
    payload: str
    """Its beginning, with what is not UTF-8 replaced."""
    first_received: int
    last_received: int
    count: int


def receipts(tx: Session, window: Window) -> list[ReceiptRecord]:
    """Return receipts, the newest first."""
    return [_record(row, ReceiptRecord) for row in tx.exec(_select(tables.Receipt, window))]


def anomalies(tx: Session, window: Window) -> list[AnomalyRecord]:
    """Return anomalies, the newest first."""
    return [_record(row, AnomalyRecord) for row in tx.exec(_select(tables.Anomaly, window))]


def health(tx: Session, window: Window) -> list[HealthRecord]:
    """Return samples of health, the newest first."""
    return [_record(row, HealthRecord) for row in tx.exec(_select(tables.HealthSample, window))]


def summaries(tx: Session, window: Window) -> list[SummaryRecord]:
    """Return summaries, the newest first."""
    return [_record(row, SummaryRecord) for row in tx.exec(_select(tables.Summary, window))]


def newest_summaries(tx: Session, device_id: str) -> list[SummaryRecord]:
    """Return a device's newest summary of each model and source, as far as it is among its last ones."""
    table = tables.Summary
    statement = (
        select(table)
        .where(col(table.device_id) == device_id)
        .order_by(col(table.bucket_start).desc(), col(table.id).desc())
        .limit(NEWEST)
    )
    found: dict[tuple[str, str], SummaryRecord] = {}
    for row in tx.exec(statement):
        found.setdefault((row.model_name, row.source), _record(row, SummaryRecord))
    return [found[key] for key in sorted(found)]


def dead_letters(tx: Session, window: Window) -> list[DeadLetterRecord]:
    """Return refused messages, those that came first the last."""
    table = tables.DeadLetter
    statement = select(table).order_by(col(table.id).desc()).limit(window.limit)
    if window.device is not None:
        statement = statement.where(col(table.device_id) == window.device)
    if window.before is not None:
        statement = statement.where(col(table.id) < window.before)
    return [
        DeadLetterRecord(
            id=row.id or 0,
            device_id=row.device_id,
            topic=row.topic,
            code=row.code,
            detail=row.detail,
            length=row.length,
            payload=row.payload.decode(errors="replace"),
            first_received=row.first_received,
            last_received=row.last_received,
            count=row.count,
        )
        for row in tx.exec(statement)
    ]


def _select(table: type[Any], window: Window) -> Any:
    statement: Select[Any] = select(table).order_by(col(table.id).desc()).limit(window.limit)
    if window.device is not None:
        statement = statement.where(col(table.device_id) == window.device)
    if window.model is not None:
        statement = statement.where(col(table.model_name) == window.model)
    if window.version is not None:
        statement = statement.where(col(table.version) == window.version)
    if window.since is not None:
        statement = statement.where(col(table.t_received) >= window.since)
    if window.until is not None:
        statement = statement.where(col(table.t_received) < window.until)
    if window.before is not None:
        statement = statement.where(col(table.id) < window.before)
    return statement


_JSON_COLUMNS: Final = frozenset({"facts", "contributions", "body"})


def _record(row: SQLModel, kind: type[T]) -> T:
    values = {
        name: msgspec.json.decode(getattr(row, name)) if name in _JSON_COLUMNS else getattr(row, name)
        for name in kind.__struct_fields__
    }
    return kind(**values)
