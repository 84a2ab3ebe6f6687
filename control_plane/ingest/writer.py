"""Stores batches of messages: rows, watermarks and the twin's newest state in one transaction.

After the commit, and only then, the devices' acknowledgements are returned.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlmodel import Session

from contract import codec, topics
from contract.messages import PROTOCOL_VERSION, Ack, AckRange, Envelope, Health, PriorityClass, Reported
from control_plane.ingest.decode import Decoded, Inbound, Number, Refused, decode
from control_plane.ingest.watermark import Mark
from control_plane.ports import Clock
from control_plane.store import ingest as store
from control_plane.store.database import Database

log = logging.getLogger(__name__)

ACK_BYTES: Final = 64 * 1024
"""Of one acknowledgement: a quarter of what the protocol, and a sixteenth of what the broker, lets pass."""
LETTERS: Final = 10
"""Dead letters kept of one message; the last of them counts the others."""
LIMIT_EXCEEDED: Final = "54"
"""Class of those of PostgreSQL's operational errors that a statement brings about by its size."""


class Written(msgspec.Struct, frozen=True):
    """What became of a batch."""

    acks: tuple[Ack, ...] = ()
    records: int = 0
    """New ones, without repetitions."""
    refused: int = 0


class Writer:
    """Stores messages. One call is one transaction; raises nothing but what means "try again".

    Whatever else happens is the fault of one message, which is looked for,
    refused, and at the very last dropped: none is ever tried again for ever.
    """

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def write(self, messages: Sequence[Inbound]) -> Written:
        """Store ``messages`` and return what may be acknowledged.

        A record that cannot be stored, for whatever reason, is found by
        storing one at a time, and becomes a dead letter. Raises SQLAlchemy's
        ``OperationalError`` or ``InterfaceError`` when the database cannot be
        reached or is full: nothing is stored then, and the same call may be
        repeated.
        """
        return self._write([_decode(message) for message in messages])

    def _write(self, decoded: Sequence[Decoded]) -> Written:
        try:
            return self._store(decoded)
        except Exception as error:
            if _means_try_again(error):
                raise
            parts = [part for item in decoded for part in _single(item)]
            if len(parts) > 1:
                return _joined([self._write([part]) for part in parts])
            return _joined([self._refuse(part, error) for part in parts])

    def _refuse(self, part: Decoded, error: Exception) -> Written:
        """Put what cannot be stored to the dead letters: with its number, else without, else nowhere."""
        log.error("ingest.cannot_store", exc_info=error, extra={"facts": {"device": part.device}})
        refused = _all_refused(part, error)
        unnumbered = tuple(msgspec.structs.replace(entry, number=None) for entry in refused.refused)
        for attempt in (refused, msgspec.structs.replace(refused, refused=unnumbered)):
            try:
                return self._store([attempt])
            except Exception as again:
                if _means_try_again(again):
                    raise
                error = again
        log.error("ingest.dropped", exc_info=error, extra={"facts": {"device": part.device}})
        return Written(refused=1)

    def _store(self, decoded: Sequence[Decoded]) -> Written:
        with self._database.transaction() as tx:
            written = _store(tx, decoded, self._clock())
        for item in decoded:
            for refused in item.refused[:LETTERS]:
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


def _decode(message: Inbound) -> Decoded:
    try:
        return decode(message)
    except Exception as error:
        log.exception("ingest.decoder_failed", extra={"facts": {"topic": message.topic}})
        refused = Refused(
            device="",
            topic=message.topic.replace("\0", "\\0"),
            payload=message.payload,
            code="message.malformed",
            detail=f"the decoder failed: {type(error).__name__}",
            t_received=message.t_received,
        )
        return Decoded("", refused=(refused,))


def _means_try_again(error: Exception) -> bool:
    if not isinstance(error, OperationalError | InterfaceError):
        return False
    return not str(getattr(error.orig, "sqlstate", None) or "").startswith(LIMIT_EXCEEDED)


def _store(tx: Session, decoded: Sequence[Decoded], now: int) -> Written:
    known = store.known_devices(tx, {item.device for item in decoded if item.device})
    letters = [letter for item in decoded for letter in _letters(item.refused)]
    count = sum(len(item.refused) for item in decoded)
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
    store.insert_dead(tx, [*letters, *(_dead(entry) for entry in strangers)])
    changed = {key: (mark.prefix, mark.ranges) for key, mark in marks.items() if mark != before[key]}
    store.put_watermarks(tx, changed, now)
    return Written(_acks(marks), len(fresh), count + len(strangers))


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
            if _newer(envelope, reported.get(envelope.device)):
                reported[envelope.device] = (envelope, envelope.body, received)
        elif isinstance(envelope.body, Health) and _newer(envelope, health.get(envelope.device)):
            health[envelope.device] = (envelope, envelope.body, received)
    for device in sorted(reported):
        store.update_reported(tx, *reported[device])
    for device in sorted(health):
        store.update_health(tx, *health[device])


def _newer(envelope: Envelope, held: tuple[Envelope, object, int] | None) -> bool:
    """Whether ``envelope`` comes after what is held: numbers count within an epoch, else the arrival."""
    return held is None or held[0].epoch != envelope.epoch or held[0].seq < envelope.seq


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
    return tuple(
        Ack(PROTOCOL_VERSION, device, part) for device, acks in by_device.items() for part in _parts(acks)
    )


def _parts(acks: Sequence[AckRange]) -> Iterator[tuple[AckRange, ...]]:
    """Divide a device's acknowledgement into parts that pass the broker."""
    part: list[AckRange] = []
    size = 0
    for one in acks:
        length = len(codec.encode(one)) + 1
        if part and size + length > ACK_BYTES:
            yield tuple(part)
            part, size = [], 0
        part.append(one)
        size += length
    if part:
        yield tuple(part)


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
    """Return ``item`` with nothing left to store but the reason; a status is simply forgotten."""
    reason = type(getattr(error, "orig", None) or error).__name__
    refused = [
        Refused(
            device=item.device,
            topic=topics.records(item.device, entry.envelope.priority),
            payload=msgspec.json.encode(entry.envelope),
            code="message.malformed",
            detail=f"it cannot be stored: {reason}",
            t_received=entry.t_received,
            number=Number(entry.envelope.epoch, entry.envelope.priority, entry.envelope.seq),
        )
        for entry in item.accepted
    ]
    return Decoded(item.device, refused=(*item.refused, *refused))


def _letters(refused: Sequence[Refused]) -> list[store.DeadRecord]:
    """Return what is kept of the refused records of one message."""
    letters = [_dead(entry) for entry in refused[:LETTERS]]
    more = len(refused) - len(letters)
    if more:
        detail = f"{letters[-1].detail[:1900]} (and {more} more records of the same message)"
        letters[-1] = msgspec.structs.replace(letters[-1], detail=detail)
    return letters


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
