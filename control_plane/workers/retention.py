"""Deletes what was refused long ago. Records themselves stay."""

from typing import Final

from control_plane.ports import Clock
from control_plane.store import ingest
from control_plane.store.database import Database

DEAD_LETTERS_US: Final = 30 * 24 * 3600 * 1_000_000
DEAD_LETTERS: Final = 100_000
"""Kept of the whole fleet."""


class Retention:
    """Prunes the dead letters."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    def tick(self) -> int:
        """Prune; return how many were deleted."""
        with self._database.transaction() as tx:
            return ingest.prune_dead(tx, self._clock() - DEAD_LETTERS_US, DEAD_LETTERS)
