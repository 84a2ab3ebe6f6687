"""The outbox: records are kept until the control plane has acknowledged them.

Sequence numbers count within (epoch, priority class). The epoch is new
whenever the file is, so a lost outbox can never give one number twice.
"""

import contextlib
import sqlite3
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import quote

from msgspec import Struct

from agent.core import outbox as rules
from agent.store import database, durable
from contract import codec
from contract.errors import PitheadError
from contract.messages import (
    PROTOCOL_VERSION,
    AckRange,
    Body,
    Count,
    Envelope,
    Micros,
    OutboxHealth,
    PriorityClass,
)

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS record (
    class TEXT NOT NULL, seq INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (class, seq)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS counter (
    class TEXT PRIMARY KEY, last INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS mark (source TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID
"""
RESERVE: Final = 384 * 1024
"""Bytes set aside, so that records can be deleted when the disk is full."""
BIT: Final = 16
"""Records that are deleted at once when there is hardly any room."""
GIVEN_UP: Final = 64 * 1024
"""Bytes of less important records that are given up at once on a full disk, beyond what is needed."""
MEMORY_LIMIT: Final = 4 * 1024 * 1024
"""Bytes of records while there is no disk to keep them on."""
T = TypeVar("T")
MAX_RECORD: Final = codec.MAX_PAYLOAD - 1024
"""Bytes; a larger record could never be sent and is given up at once."""


class Entry(Struct, frozen=True):
    """A record before it has its place in a sequence."""

    priority: PriorityClass
    t_wall: Micros
    t_mono: Micros
    body: Body


class Batch(Struct, frozen=True):
    """Records of one class as they are to be sent, encoded."""

    priority: PriorityClass
    last: Count
    records: tuple[bytes, ...]


class Outbox:
    """Records of one device. Used by one thread. Errors are ``storage.*`` and change nothing.

    A file that turns out to be damaged is put aside, a new one with a new
    epoch takes its place, and what was in it counts as lost.
    """

    def __init__(self, path: Path, *, device: str, boot_id: str, limit: int) -> None:
        self.path = path
        self.device = device
        self.boot_id = boot_id
        self._limit = limit
        self._reserve = path.with_name(path.name + ".reserve")
        self._records: dict[PriorityClass, int] = {}
        self._bytes: dict[PriorityClass, int] = {}
        damaged = set(self._damaged())
        self._open()
        new = set(self._damaged()) - damaged
        if new:
            self._count(_records_in(new.pop()))

    def append(
        self,
        entries: Sequence[Entry],
        mark: tuple[str, int] | None = None,
        lost: Mapping[PriorityClass, int] | None = None,
    ) -> None:
        """Store records in one transaction, giving up less important ones when there is no room.

        ``mark`` is (source, n): remembered in the same transaction, so that
        what a source repeats after a crash can be recognised. ``lost`` counts
        records that never came here.
        """
        encoded = [(e, codec.encode(self._envelope(e, 2**53))) for e in entries]
        try:
            self._mended(lambda: self._append(encoded, mark, lost or {}))
        except PitheadError as error:
            if error.code != "storage.full" or not self._give_up_less_important(encoded):
                raise
            self._append(encoded, mark, lost or {})
            durable.set_reserve(self._reserve, RESERVE)

    def marked(self, source: str) -> int:
        """Return the number last stored with ``append(..., mark)`` for a source, 0 if none."""
        rows = self._read("SELECT n FROM mark WHERE source = ?", (source,))
        return int(rows[0][0]) if rows else 0

    def forget_marks(self, keep: str) -> None:
        """Delete the marks of all other sources."""

        def forget() -> None:
            with self._transaction() as db:
                db.execute("DELETE FROM mark WHERE source != ?", (keep,))

        self._mended(forget)

    def acknowledge(self, ack: AckRange) -> int:
        """Delete what the control plane has stored; return how many records that were."""
        if ack.epoch != self.epoch:
            return 0
        before = self._records.get(ack.priority, 0)
        if before == 0:
            return 0
        try:
            self._mended(lambda: self._delete(ack))
        except PitheadError as error:
            if error.code != "storage.full":
                raise
            self._delete_on_full_disk(ack)
        return before - self._records.get(ack.priority, 0)

    def unsent(self, priority: PriorityClass, after: int, *, records: int, size: int) -> Batch | None:
        """Return the next records of a class above sequence number ``after``, at most ``size`` bytes."""
        rows = self._read(
            "SELECT seq, body FROM record WHERE class = ? AND seq > ? ORDER BY seq LIMIT ?",
            (priority.value, after, records),
        )
        taken: list[bytes] = []
        last = after
        for seq, body in rows:
            if taken and sum(map(len, taken)) + len(body) > size:
                break
            taken.append(body)
            last = seq
        return Batch(priority, last, tuple(taken)) if taken else None

    def waiting(self, priority: PriorityClass, up_to: int) -> tuple[int, int]:
        """Return how many records of a class up to a sequence number are still here, and the first (or 0)."""
        ((count, first),) = self._read(
            "SELECT COUNT(*), COALESCE(MIN(seq), 0) FROM record WHERE class = ? AND seq <= ?",
            (priority.value, up_to),
        )
        return int(count), int(first)

    def health(self) -> OutboxHealth:
        """Return size and losses."""
        rows = self._read("SELECT class, lost FROM counter WHERE lost > 0", ())
        return OutboxHealth(
            records=sum(self._records.values()), bytes=sum(self._bytes.values()), lost=dict(rows)
        )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- the file

    def _open(self) -> None:
        self._db = database.connect(self.path, SCHEMA)
        self.limit = min(self._limit, MEMORY_LIMIT) if database.in_memory(self._db) else self._limit
        try:
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (uuid.uuid4().hex,))
            self._db.executemany(
                "INSERT OR IGNORE INTO counter (class) VALUES (?)", [(p.value,) for p in rules.ORDER]
            )
            (self.epoch,) = self._db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()
            self._measure()
        except sqlite3.Error as error:
            raise database.translate(error, self.path) from error
        durable.set_reserve(self._reserve, RESERVE)

    def _mended(self, act: Callable[[], T]) -> T:
        """Act, once more in a new file if the present one is damaged."""
        try:
            return act()
        except PitheadError as error:
            if error.code != "storage.corrupt":
                raise
            self._begin_anew(error)
            return act()

    def _begin_anew(self, error: PitheadError) -> None:
        held = dict(self._records)
        self._db.close()
        with contextlib.suppress(PitheadError):
            database.put_aside(self.path, error)
        self._open()
        self._count(held)

    def _damaged(self) -> list[Path]:
        return list(self.path.parent.glob(f"{self.path.name}.damaged-*"))

    def _count(self, lost: Mapping[PriorityClass, int]) -> None:
        with self._transaction():
            self._count_lost(lost)

    def _read(self, sql: str, arguments: tuple[object, ...]) -> list[Any]:
        def read() -> list[Any]:
            try:
                return self._db.execute(sql, arguments).fetchall()
            except sqlite3.Error as error:
                raise database.translate(error, self.path) from error

        return self._mended(read)

    def _append(
        self,
        encoded: Sequence[tuple[Entry, bytes]],
        mark: tuple[str, int] | None,
        lost: Mapping[PriorityClass, int],
    ) -> None:
        fitting = [(e, len(data)) for e, data in encoded if len(data) <= MAX_RECORD]
        coming: dict[PriorityClass, int] = {}
        for entry, length in fitting:
            coming[entry.priority] = coming.get(entry.priority, 0) + length
        given = rules.evictions(self._bytes, coming, self.limit)
        with self._transaction() as db:
            self._count_lost(Counter(e.priority for e, data in encoded if len(data) > MAX_RECORD))
            self._count_lost(lost)
            short = {p: share - self._evict(p, share) for p, share in given.items()}
            for entry, length in fitting:
                if short.get(entry.priority, 0) > 0:
                    short[entry.priority] -= length
                    self._count_lost({entry.priority: 1})
                    continue
                self._insert(entry)
            if mark is not None:
                db.execute("INSERT OR REPLACE INTO mark VALUES (?, ?)", mark)

    def _delete(self, ack: AckRange) -> None:
        with self._transaction() as db:
            for first, last in rules.acknowledged(ack):
                self._forget(db, ack.priority, first, last)

    # --- on a full disk

    def _give_up_less_important(self, encoded: Sequence[tuple[Entry, bytes]]) -> bool:
        """Make room in the file for records that matter more than others there; return whether there is some.

        The room of the reserve is used up for it, and for the append that follows.
        """
        best = min((rules.RANK[e.priority] for e, _ in encoded), default=len(rules.ORDER))
        needed = GIVEN_UP + 2 * sum(len(data) for _, data in encoded)
        for priority in reversed(rules.ORDER[best + 1 :]):
            while needed > 0 and self._records.get(priority, 0):
                self._reserve.unlink(missing_ok=True)
                self._shrink_log()
                rows = self._read(
                    "SELECT seq, LENGTH(body) FROM record WHERE class = ? ORDER BY seq LIMIT ?",
                    (priority.value, BIT),
                )
                with self._transaction() as db:
                    self._forget(db, priority, 1, rows[-1][0])
                    self._count_lost({priority: len(rows)})
                needed -= sum(length for _, length in rows)
        self._shrink_log()
        return needed <= 0

    def _delete_on_full_disk(self, ack: AckRange) -> None:
        """Delete bit by bit in the room of the reserve, since even deleting needs room."""
        self._reserve.unlink(missing_ok=True)
        self._shrink_log()
        for first, last in rules.acknowledged(ack):
            while True:
                rows = self._read(
                    "SELECT seq FROM record WHERE class = ? AND seq BETWEEN ? AND ? ORDER BY seq LIMIT ?",
                    (ack.priority.value, first, last, BIT),
                )
                if not rows:
                    break
                with self._transaction() as db:
                    self._forget(db, ack.priority, first, rows[-1][0])
                self._shrink_log()
        durable.set_reserve(self._reserve, RESERVE)

    def _shrink_log(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _envelope(self, entry: Entry, seq: int) -> Envelope:
        return Envelope(
            v=PROTOCOL_VERSION,
            device=self.device,
            priority=entry.priority,
            epoch=self.epoch,
            seq=seq,
            boot_id=self.boot_id,
            t_wall=entry.t_wall,
            t_mono=entry.t_mono,
            body=entry.body,
        )

    def _insert(self, entry: Entry) -> None:
        ((seq,),) = self._db.execute(
            "UPDATE counter SET last = last + 1 WHERE class = ? RETURNING last", (entry.priority.value,)
        ).fetchall()
        data = codec.encode(self._envelope(entry, seq))
        self._db.execute("INSERT INTO record VALUES (?, ?, ?)", (entry.priority.value, seq, data))
        self._records[entry.priority] = self._records.get(entry.priority, 0) + 1
        self._bytes[entry.priority] = self._bytes.get(entry.priority, 0) + len(data)

    def _evict(self, priority: PriorityClass, share: int) -> int:
        """Delete the oldest records of a class until ``share`` bytes are free; return the bytes."""
        rows = self._db.execute(
            "SELECT seq, LENGTH(body) FROM record WHERE class = ? ORDER BY seq", (priority.value,)
        )
        freed, count, last = 0, 0, 0
        for seq, length in rows:
            if freed >= share:
                break
            freed, count, last = freed + length, count + 1, seq
        rows.close()
        if count:
            self._forget(self._db, priority, 1, last)
            self._count_lost({priority: count})
        return freed

    def _forget(self, db: sqlite3.Connection, priority: PriorityClass, first: int, last: int) -> None:
        span = (priority.value, first, last)
        count, length = db.execute(
            "SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM record"
            " WHERE class = ? AND seq BETWEEN ? AND ?",
            span,
        ).fetchone()
        if count:
            db.execute("DELETE FROM record WHERE class = ? AND seq BETWEEN ? AND ?", span)
            self._records[priority] -= count
            self._bytes[priority] -= length

    def _count_lost(self, lost: Mapping[PriorityClass, int]) -> None:
        self._db.executemany(
            "UPDATE counter SET lost = lost + ? WHERE class = ?", [(n, p.value) for p, n in lost.items()]
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db
            self._db.execute("COMMIT")
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                self._measure()
            if isinstance(error, sqlite3.Error):
                raise database.translate(error, self.path) from error
            raise

    def _measure(self) -> None:
        """Read the sizes from the file."""
        rows = self._db.execute("SELECT class, COUNT(*), SUM(LENGTH(body)) FROM record GROUP BY class")
        measured = [(PriorityClass(name), count, length) for name, count, length in rows]
        self._records = {priority: count for priority, count, _ in measured}
        self._bytes = {priority: length for priority, _, length in measured}


def _records_in(path: Path) -> dict[PriorityClass, int]:
    """Return how many records a damaged file holds; one at least, where it cannot be told."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as db:
            rows = db.execute("SELECT class, COUNT(*) FROM record GROUP BY class").fetchall()
        return {PriorityClass(name): count for name, count in rows}
    except (sqlite3.Error, ValueError):
        return {rules.ORDER[0]: 1}
