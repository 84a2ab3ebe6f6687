"""High-water marks: the highest version of every role that this device has ever verified.

They live apart from the metadata, so that metadata that were zeroed, lost or
put back do not let an older repository in. A mark counts as long as the
present root would still accept the keys that had signed it: so a stolen
online key cannot strand the device for ever with a version of 2^60, once the
root has replaced that key.
"""

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from agent.errors import from_os
from contract.errors import PitheadError

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 10.0

_SCHEMA: Final = """CREATE TABLE IF NOT EXISTS mark (
    repository TEXT NOT NULL, role TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL,
    keyids TEXT NOT NULL, signed_at INTEGER NOT NULL, PRIMARY KEY (repository, role))"""


class Mark(Struct, frozen=True):
    """One role's verified file: its version, and enough to know it again."""

    version: int
    digest: str
    """SHA-256 of what was signed."""
    keyids: frozenset[str]
    """Whose signatures were valid."""
    signed_at: int = 0
    """Signed time of a timestamp, microseconds UTC."""


class Authority(Struct, frozen=True):
    """Who may sign a role now."""

    keyids: frozenset[str]
    threshold: int


Key = tuple[str, str]
"""(repository, role)"""


def counts(mark: Mark, authority: Authority | None) -> bool:
    """Whether a mark still binds. A root's mark (no authority above it) always does."""
    return authority is None or len(mark.keyids & authority.keyids) >= authority.threshold


def check(marks: Mapping[Key, Mark], new: Mapping[Key, Mark], authorities: Mapping[Key, Authority]) -> None:
    """Raise unless every new version is at or above its mark, and equal where the versions are equal.

    ``update.metadata_rollback`` for an older version,
    ``update.metadata_invalid`` for a version that has two contents.
    """
    for key, mark in marks.items():
        found = new.get(key)
        if found is None or not counts(mark, authorities.get(key)):
            continue
        repository, role = key
        if found.version < mark.version:
            raise PitheadError(
                "update.metadata_rollback",
                f"{repository} {role} version {found.version}, but {mark.version} was seen",
                repository=repository,
                role=role,
                version=found.version,
                seen=mark.version,
            )
        if found.version == mark.version and found.digest != mark.digest:
            raise PitheadError(
                "update.metadata_invalid",
                f"{repository} {role} version {found.version} was seen with another content",
                repository=repository,
                role=role,
            )


def time_floor(marks: Mapping[Key, Mark], authorities: Mapping[Key, Authority]) -> int:
    """Return the latest signed time among the marks that count, microseconds UTC."""
    return max(
        (mark.signed_at for key, mark in marks.items() if counts(mark, authorities.get(key))), default=0
    )


class MarkStore:
    """The marks on disk. Reading creates nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[Key, Mark]:
        """Return the marks; none when the file is missing, empty or damaged."""
        if not self.path.exists():
            return {}
        try:
            with contextlib.closing(
                sqlite3.connect(f"file:{self.path}?mode=rw", uri=True, timeout=TIMEOUT_S)
            ) as connection:
                rows = connection.execute(
                    "SELECT repository, role, version, digest, keyids, signed_at FROM mark"
                ).fetchall()
        except sqlite3.DatabaseError as error:
            log.warning("marks.unreadable", extra={"facts": {"path": str(self.path), "error": str(error)}})
            return {}
        return {
            (repository, role): Mark(version, digest, frozenset(keyids.split()), signed_at)
            for repository, role, version, digest, keyids, signed_at in rows
        }

    def write(self, marks: Mapping[Key, Mark]) -> None:
        """Replace the marks of these roles, durably. A damaged file is replaced as a whole."""
        rows = [
            (*key, mark.version, mark.digest, " ".join(sorted(mark.keyids)), mark.signed_at)
            for key, mark in marks.items()
        ]
        try:
            self._write(rows)
        except sqlite3.OperationalError as error:
            raise PitheadError("storage.failed", f"writing {self.path}: {error}") from error
        except sqlite3.DatabaseError:
            try:
                self.path.unlink()
            except OSError as error:
                raise from_os(error, f"replacing {self.path}") from error
            self._write(rows)

    def _write(self, rows: Iterable[tuple[str | int, ...]]) -> None:
        with contextlib.closing(
            sqlite3.connect(self.path, timeout=TIMEOUT_S, isolation_level=None)
        ) as connection:
            connection.execute("PRAGMA synchronous=EXTRA")
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_SCHEMA)
            connection.executemany("INSERT OR REPLACE INTO mark VALUES (?, ?, ?, ?, ?, ?)", rows)
            connection.execute("COMMIT")
