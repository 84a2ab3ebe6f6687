"""Queries on the append-only event table."""

from collections.abc import Mapping

import msgspec
from sqlmodel import Session, col, select

from control_plane.store.tables.event import Event


class EventRecord(msgspec.Struct, frozen=True):
    """One deed."""

    id: int
    t: int
    actor: str
    kind: str
    subject: str
    facts: dict[str, object]


def append(tx: Session, *, t: int, actor: str, kind: str, subject: str, facts: Mapping[str, object]) -> None:
    """Add one event."""
    tx.add(
        Event(t=t, actor=actor, kind=kind, subject=subject, facts=msgspec.json.encode(dict(facts)).decode())
    )


def query(
    tx: Session,
    *,
    since: int | None = None,
    until: int | None = None,
    kind: str | None = None,
    subject: str | None = None,
    before: int | None = None,
    limit: int = 100,
) -> list[EventRecord]:
    """Return the newest events first; ``before`` is the id at which the last page ended."""
    statement = select(Event).order_by(col(Event.id).desc()).limit(limit)
    if since is not None:
        statement = statement.where(col(Event.t) >= since)
    if until is not None:
        statement = statement.where(col(Event.t) < until)
    if kind is not None:
        statement = statement.where(col(Event.kind) == kind)
    if subject is not None:
        statement = statement.where(col(Event.subject) == subject)
    if before is not None:
        statement = statement.where(col(Event.id) < before)
    return [
        EventRecord(
            id=row.id or 0,
            t=row.t,
            actor=row.actor,
            kind=row.kind,
            subject=row.subject,
            facts=msgspec.json.decode(row.facts, type=dict[str, object]),
        )
        for row in tx.exec(statement)
    ]
