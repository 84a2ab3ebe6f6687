"""Small facts of the supervisor by key: the last desired document, fits, what receipts have told."""

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from agent.store import database

SCHEMA: Final = "CREATE TABLE IF NOT EXISTS fact (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
T = TypeVar("T")


class StateStore:
    """Keys to JSON values. Used by one thread. Errors are ``storage.*``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = database.connect(path, SCHEMA)

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return the value as a ``kind``; None when there is none or an older agent wrote another shape."""
        rows = self._rows("SELECT key, value FROM fact WHERE key = ?", (key,))
        return _decode(rows[0][1], kind) if rows else None

    def scan(self, prefix: str, kind: type[T]) -> dict[str, T]:
        """Return all values whose key begins with ``prefix``, by the rest of their key."""
        rows = self._rows(
            "SELECT key, value FROM fact WHERE key >= ? AND key < ?", (prefix, prefix + "\U0010ffff")
        )
        values = {key[len(prefix) :]: _decode(value, kind) for key, value in rows}
        return {key: value for key, value in values.items() if value is not None}

    def put(self, values: Mapping[str, object]) -> None:
        """Store values durably, all of them or none; None deletes a key."""
        gone = [(key,) for key, value in values.items() if value is None]
        kept = [(key, msgspec.json.encode(value)) for key, value in values.items() if value is not None]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM fact WHERE key = ?", gone)
            self._db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", kept)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise database.translate(error, self.path) from error

    def _rows(self, sql: str, arguments: tuple[str, ...]) -> list[tuple[str, bytes]]:
        try:
            return self._db.execute(sql, arguments).fetchall()
        except sqlite3.Error as error:
            raise database.translate(error, self.path) from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _decode(value: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.MsgspecError:
        return None
