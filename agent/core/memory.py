"""How much memory a process with models may take, and when it takes too much.

Two lines. What a process *holds* (its private pages, swapped out or not) may
stay above the limit for a moment only: it then leaks, or keeps what a huge
run has left, and a fresh one costs less than the machine. What it *asks for*
may not go far beyond: the system refuses it at once, so that one
run that wants 8 GB fails, and not whatever process the kernel would choose.
"""

from typing import Final

_MB: Final = 1024 * 1024
SHARE: Final = 0.75
"""Of the machine's memory, or of its container's, where nobody says how much."""
AHEAD: Final = 0.25
"""By how much of the limit requests may go beyond it..."""
AHEAD_BYTES: Final = 128 * _MB
"""...at least by this: stacks and reserves, some 80 MB of an engine, are asked for and never held."""
OUTGROWN_S: Final = 5.0
"""Above the limit for so long."""
FIRST_TO_GO: Final = 500
"""``oom_score_adj`` of a process with models: should memory be short all the same, it goes first."""


def limit(said_mb: int | None, machine_bytes: int) -> int:
    """Return the limit in bytes, 0 for none; ``machine_bytes`` is 0 where that is not known."""
    return round(machine_bytes * SHARE) if said_mb is None else said_mb * _MB


def asked_at_most(limit_bytes: int) -> int:
    """Return how much may be asked for."""
    return limit_bytes + max(round(limit_bytes * AHEAD), AHEAD_BYTES)


class Scales:
    """Notices that a process has outgrown its limit."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit = limit_bytes
        self.held = 0
        """Bytes at the last look."""
        self._above_since: float | None = None

    def outgrown(self, held: int, now: float) -> str:
        """Return what to say of a process that has held too much for too long; empty while it has not."""
        self.held = held
        if not self.limit or held <= self.limit:
            self._above_since = None
            return ""
        if self._above_since is None:
            self._above_since = now
        if now - self._above_since < OUTGROWN_S:
            return ""
        return f"it held {held // _MB} MB of memory, and may hold {self.limit // _MB} MB"

    def forget(self) -> None:
        """Begin anew, for another process."""
        self.held, self._above_since = 0, None
