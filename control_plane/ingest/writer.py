"""Stores batches of messages: rows, watermarks and the twin's newest state in one transaction.

After the commit, and only then, the devices' acknowledgements are returned.
"""

import hashlib
import logging
from collections.abc import Sequence

import msgspec
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlmodel import Session

from contract import topics
from contract.messages import PROTOCOL_VERSION, Ack, AckRange, Envelope, Health, PriorityClass, Reported
from control_plane.ingest.decode import Decoded, Inbound, Number, Refused, decode
from control_plane.ingest.watermark import Mark
from control_plane.ports import Clock
from control_plane.store import ingest as store
from control_plane.store.database import Database

log = logging.getLogger(__name__)


class Written(msgspec.Struct, frozen=True):
    """What became of a batch."""

    acks: tuple[Ack, ...] = ()
    records: int = 0
    """New ones, without repetitions."""
    refused: int = 0


class Writer:
    """Stores messages. One call is one transaction; raises nothing but what means "try again"."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def write(self, messages: Sequence[Inbound]) -> Written:
        """Store ``messages`` and return what may be acknowledged.

        A record that the database itself refuses (a NUL in a text, on
        PostgreSQL) is found by storing one record at a time, and becomes a
        dead letter. Raises SQLAlchemy's ``OperationalError`` or
        ``InterfaceError`` when the database cannot be reached or is full:
        nothing is stored then, and the same call may be repeated.
        """
        return self._write([decode(message) for message in messages])

    def _write(self, decoded: Sequence[Decoded]) -> Written:
        try:
            return self._store(decoded)
        except (OperationalError, InterfaceError):
            raise
        except (DBAPIError, OverflowError, ValueError) as error:
            parts = [part for item in decoded for part in _single(item)]
            if len(parts) > 1:
                return _joined([self._write([part]) for part in parts])
            return self._store([_all_refused(item, error) for item in decoded])

    def _store(self, decoded: Sequence[Decoded]) -> Written:
        with self._database.transaction() as tx:
            written = _store(tx, decoded, self._clock())
        for item in decoded:
            for refused in item.refused:
                log.warning(
                    "ingest.refused",
                    extra={
                        "facts": {
                            "device": refused.device,
                            "topic": refused.topic,
                            "code": refused.code,
                            "detail": refused.detail,
                        }
                    },
                )
        return written


def _store(tx: Session, decoded: Sequence[Decoded], now: int) -> Written:
    known = store.known_devices(tx, {item.device for item in decoded if item.device})
    refused = [entry for item in decoded for entry in item.refused]
    marks = _marks(tx, decoded, known)
    before = dict(marks)
    fresh: list[tuple[Envelope, int]] = []
    seen: dict[str, tuple[int, int]] = {}
    strangers: list[Refused] = []
    for item in decoded:
        if item.device not in known:
            strangers.extend(_stranger(item))
            continue
        fresh.extend(_fresh(item, marks))
        for entry in item.accepted:
            seen[item.device] = (entry.t_received, entry.t_received - entry.envelope.t_wall)
        if item.status is not None:
            store.update_status(
                tx,
                item.device,
                online=item.status.online,
                boot_id=item.status.boot_id,
                t_wall=item.status.t_wall,
                received=now,
            )
    store.insert_records(tx, fresh)
    _update_twins(tx, fresh)
    store.update_seen(tx, seen)
    store.insert_dead(tx, [_dead(entry) for entry in (*refused, *strangers)])
    changed = {key: (mark.prefix, mark.ranges) for key, mark in marks.items() if mark != before[key]}
    store.put_watermarks(tx, changed, now)
    return Written(_acks(marks), len(fresh), len(refused) + len(strangers))


def _marks(tx: Session, decoded: Sequence[Decoded], known: set[str]) -> dict[store.WatermarkKey, Mark]:
    keys: set[store.WatermarkKey] = set()
    for item in decoded:
        if item.device in known:
            keys.update(
                (item.device, entry.envelope.epoch, entry.envelope.priority.value) for entry in item.accepted
            )
            keys.update(
                (item.device, entry.number.epoch, entry.number.priority.value)
                for entry in item.refused
                if entry.number is not None
            )
    stored = store.watermarks(tx, keys)
    return {key: Mark(*stored[key]) if key in stored else Mark() for key in keys}


def _fresh(item: Decoded, marks: dict[store.WatermarkKey, Mark]) -> list[tuple[Envelope, int]]:
    """Return what is new of one message, and mark it."""
    fresh: list[tuple[Envelope, int]] = []
    numbers: dict[store.WatermarkKey, set[int]] = {}
    oldest: dict[store.WatermarkKey, int] = {}
    for entry in item.accepted:
        envelope = entry.envelope
        key = (item.device, envelope.epoch, envelope.priority.value)
        taken = numbers.setdefault(key, set())
        if envelope.seq not in taken and envelope.seq not in marks[key]:
            fresh.append((envelope, entry.t_received))
        taken.add(envelope.seq)
        # a device cannot have given up what it sends
        oldest[key] = max(oldest.get(key, 0), min(envelope.oldest, envelope.seq))
    for refused in item.refused:
        if refused.number is not None:
            key = (item.device, refused.number.epoch, refused.number.priority.value)
            numbers.setdefault(key, set()).add(refused.number.seq)
    for key, taken in numbers.items():
        marks[key] = marks[key].add(taken, oldest.get(key, 0))
    return fresh


def _update_twins(tx: Session, fresh: Sequence[tuple[Envelope, int]]) -> None:
    reported: dict[str, tuple[Envelope, Reported, int]] = {}
    health: dict[str, tuple[Envelope, Health, int]] = {}
    for envelope, received in fresh:
        if isinstance(envelope.body, Reported):
            reported[envelope.device] = (envelope, envelope.body, received)
        elif isinstance(envelope.body, Health):
            health[envelope.device] = (envelope, envelope.body, received)
    for device in sorted(reported):
        store.update_reported(tx, *reported[device])
    for device in sorted(health):
        store.update_health(tx, *health[device])


def _acks(marks: dict[store.WatermarkKey, Mark]) -> tuple[Ack, ...]:
    by_device: dict[str, list[AckRange]] = {}
    for (device, epoch, priority), mark in sorted(marks.items()):
        by_device.setdefault(device, []).append(
            AckRange(
                epoch=epoch,
                priority=PriorityClass(priority),
                prefix=mark.prefix,
                ranges=mark.ranges,
            )
        )
    return tuple(Ack(PROTOCOL_VERSION, device, tuple(acks)) for device, acks in by_device.items())


def _stranger(item: Decoded) -> list[Refused]:
    """Refuse what comes from a device that is not, or no more, enrolled here; it is not acknowledged."""
    if not item.accepted:
        return []
    first = item.accepted[0]
    return [
        Refused(
            device=item.device,
            topic=topics.records(item.device, first.envelope.priority),
            payload=msgspec.json.encode(first.envelope),
            code="message.wrong_device",
            detail=f"no device {item.device} is enrolled here ({len(item.accepted)} records)",
            t_received=first.t_received,
        )
    ]


def _single(item: Decoded) -> list[Decoded]:
    """Split what one message held into single records."""
    parts = [Decoded(item.device, accepted=(entry,)) for entry in item.accepted]
    parts += [Decoded(item.device, refused=(entry,)) for entry in item.refused]
    if item.status is not None:
        parts.append(Decoded(item.device, status=item.status))
    return parts


def _all_refused(item: Decoded, error: Exception) -> Decoded:
    reason = type(getattr(error, "orig", None) or error).__name__
    refused = [
        Refused(
            device=item.device,
            topic=topics.records(item.device, entry.envelope.priority),
            payload=msgspec.json.encode(entry.envelope),
            code="message.malformed",
            detail=f"the database refuses it: {reason}",
            t_received=entry.t_received,
            number=Number(entry.envelope.epoch, entry.envelope.priority, entry.envelope.seq),
        )
        for entry in item.accepted
    ]
    return Decoded(item.device, refused=(*item.refused, *refused))


def _dead(refused: Refused) -> store.DeadRecord:
    return store.DeadRecord(
        device_id=refused.device,
        topic=refused.topic,
        sha256=hashlib.sha256(refused.payload).hexdigest(),
        code=refused.code,
        detail=refused.detail.replace("\0", "\\0")[:2000],
        payload=refused.payload,
        t_received=refused.t_received,
    )


def _joined(parts: Sequence[Written]) -> Written:
    return Written(
        tuple(ack for part in parts for ack in part.acks),
        sum(part.records for part in parts),
        sum(part.refused for part in parts),
    )
