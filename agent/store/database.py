"""SQLite as the supervisor uses it: durable at each commit, small in memory, put aside when damaged."""

import logging
import secrets
import sqlite3
from pathlib import Path

from agent.store import durable
from contract.errors import PitheadError

log = logging.getLogger(__name__)


def connect(path: Path, schema: str) -> sqlite3.Connection:
    """Open or make a database. A damaged one is renamed and a new one takes its place.

    Raises ``storage.*`` when not even that works.
    """
    try:
        durable.make_directory(path.parent)
        return _open(path, schema)
    except sqlite3.OperationalError as error:
        raise translate(error, path) from error
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
        log.error(  # noqa: TRY400 - it is handled here
            "database.damaged",
            extra={"facts": {"path": str(path), "aside": str(aside), "detail": str(error)}},
        )
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        return _open(path, schema)


def _open(path: Path, schema: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=5.0, isolation_level=None)
    try:
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


def translate(error: sqlite3.Error, path: Path) -> PitheadError:
    """Return our error for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", None)
    full = code == sqlite3.SQLITE_FULL
    return PitheadError("storage.full" if full else "storage.failed", f"{path}: {error}", sqlite=code)
