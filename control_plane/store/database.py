"""The database: one transaction per use case, one writer at a time.

On SQLite a writer takes the lock at once (``BEGIN IMMEDIATE``); on
PostgreSQL it takes an advisory lock. So a use case may read, decide and
write without meeting another one in between, and auto-incremented ids
become visible in their order, which readers with a cursor rely on.
Readers are never held up.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, cast

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import Session

MIGRATIONS: Final = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS: Final = 20_000
WRITER_LOCK: Final = 0x70697468
"""Key of PostgreSQL's advisory lock; any constant that all processes share."""

_READING: Final = "pithead_reading"


class Database:
    """A database by its SQLAlchemy address; ``sqlite:///path`` and ``postgresql://...`` are supported."""

    def __init__(self, url: str) -> None:
        address = make_url(url)
        if address.drivername == "postgresql":
            address = address.set(drivername="postgresql+psycopg")
        self.is_sqlite = address.get_backend_name() == "sqlite"
        self.url = address
        self._writer = threading.Lock()
        self._writing = threading.local()
        if self.is_sqlite:
            self.engine = create_engine(address, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = create_engine(address, pool_pre_ping=True, pool_size=10, max_overflow=20)
        self._read_engine: Engine = self.engine.execution_options(**{_READING: True})

    def migrate(self) -> None:
        """Bring the schema to the newest revision."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Open a writing transaction; it commits at the end and rolls back on any error."""
        if getattr(self._writing, "now", False):
            raise RuntimeError("a use case has one transaction: pass the session on")
        with self._writer, Session(self.engine, expire_on_commit=False) as session, session.begin():
            self._writing.now = True
            try:
                if not self.is_sqlite:
                    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITER_LOCK})
                yield session
            finally:
                self._writing.now = False

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a transaction that sees one state of the database and changes nothing."""
        with Session(self._read_engine, expire_on_commit=False) as session, session.begin():
            if not self.is_sqlite:
                session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            yield session

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _prepare_sqlite(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin below, not by the driver's guess
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reading = cast("bool", connection.get_execution_options().get(_READING, False))
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")
