"""Queries on desired documents."""

import msgspec
from sqlalchemy import update
from sqlmodel import Session, col, select

from contract.messages import Desired
from control_plane.store.tables.desired import DesiredDocument

_decoder = msgspec.json.Decoder(Desired)


def read(tx: Session, device_id: str) -> Desired | None:
    """Return the device's document, or None when nothing was ever wanted of it."""
    row = tx.get(DesiredDocument, device_id)
    return None if row is None else _decoder.decode(row.document)


def read_all(tx: Session) -> list[Desired]:
    """Return every device's document, by device id."""
    rows = tx.exec(select(DesiredDocument).order_by(col(DesiredDocument.device_id)))
    return [_decoder.decode(row.document) for row in rows]


def write(tx: Session, desired: Desired, now: int) -> None:
    """Store a document and mark its device as not yet told."""
    tx.merge(
        DesiredDocument(
            device_id=desired.device,
            revision=desired.revision,
            document=msgspec.json.encode(desired).decode(),
            dirty=True,
            changed_at=now,
        )
    )
    tx.flush()


def dirty(tx: Session, limit: int) -> list[tuple[str, int]]:
    """Return ``(device id, revision)`` of devices that were not told yet, the longest waiting first."""
    statement = (
        select(DesiredDocument.device_id, DesiredDocument.revision)
        .where(col(DesiredDocument.dirty).is_(True))
        .order_by(col(DesiredDocument.changed_at))
        .limit(limit)
    )
    return [(device_id, revision) for device_id, revision in tx.exec(statement)]


def clear(tx: Session, device_id: str, revision: int) -> None:
    """Note that a device was told of ``revision``; a newer one stays marked."""
    tx.execute(
        update(DesiredDocument)
        .where(col(DesiredDocument.device_id) == device_id, col(DesiredDocument.revision) == revision)
        .values(dirty=False)
    )
