"""SQLite as the supervisor uses it: durable at each commit, small in memory, put aside when damaged."""

import logging
import secrets
import sqlite3
from pathlib import Path
from typing import Final

from agent.errors import from_os
from agent.store import durable
from contract.errors import PitheadError

log = logging.getLogger(__name__)
MEMORY: Final = ":memory:"
BUSY: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})


def connect(path: Path, schema: str) -> sqlite3.Connection:
    """Open or make a database. A damaged one is renamed and a new one takes its place.

    On a disk that is full, broken or read-only the database lives in memory
    until the next start: models shall serve all the same. Raises
    ``storage.failed`` while another process uses it.
    """
    try:
        durable.make_directory(path.parent)
        try:
            return _open(str(path), schema)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            put_aside(path, error)
            return _open(str(path), schema)
    except (sqlite3.Error, OSError, PitheadError) as error:
        if isinstance(error, sqlite3.Error) and _primary(error) in BUSY:
            raise translate(error, path) from error
        log.error(  # noqa: TRY400 - it is handled here
            "database.in_memory", extra={"facts": {"path": str(path), "detail": str(error)}}
        )
        return _open(MEMORY, schema)


def put_aside(path: Path, error: Exception) -> Path:
    """Rename a damaged database, closed before; of those only the newest is kept. Raises ``storage.*``."""
    aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
    facts = {"path": str(path), "aside": str(aside), "detail": str(error)}
    log.error("database.damaged", extra={"facts": facts})
    try:
        for older in path.parent.glob(f"{path.name}.damaged-*"):
            older.unlink(missing_ok=True)
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
    except OSError as failed:
        raise from_os(failed, f"putting {path} aside") from failed
    return aside


def in_memory(connection: sqlite3.Connection) -> bool:
    """Whether nothing of this database will outlive the process."""
    (_, _, file), *_ = connection.execute("PRAGMA database_list").fetchall()
    return not file


def _open(place: str, schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(place, timeout=5.0, isolation_level=None)
    try:
        # One process owns the file, so no index is shared: one file less that a full disk can refuse.
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA cache_size=-256")
        # A short log: what is in it needs as much room again when it is moved into the file.
        connection.execute("PRAGMA wal_autocheckpoint=48")
        connection.execute("PRAGMA journal_size_limit=262144")
        connection.executescript(f"BEGIN;{schema};COMMIT;")
        _check(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check(connection: sqlite3.Connection) -> None:
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)


def _primary(error: sqlite3.Error) -> int:
    return (getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF


def translate(error: sqlite3.Error, path: Path) -> PitheadError:
    """Return our error for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    primary = _primary(error)
    ours = {
        sqlite3.SQLITE_FULL: "storage.full",
        sqlite3.SQLITE_CORRUPT: "storage.corrupt",
        sqlite3.SQLITE_NOTADB: "storage.corrupt",
    }
    return PitheadError(ours.get(primary, "storage.failed"), f"{path}: {error}", sqlite=code)
