"""Whether one more request may wait for its turn: as long as who is taken gets a timely answer. Pure.

What waits for ever is no use to anybody, and a queue that stands only makes
all answers late by its length. So a request is taken where those before it
are expected to be done within the model's latency objective. Where nobody has
stated one, nobody knows what is late: sixteen clients of a model of 30 ms may
well want to share it. Then a request may wait for a second.

A burst is not overload. As CoDel does it (Nichols and Jacobson, "Controlling
Queue Delay", ACM Queue 2012), a queue that is too long is borne if it goes
away by itself: after a calm time so many may wait for longer. If still more
come it does not go away, and those are told too.
"""

import enum
import math
from typing import Final

FLOOR_S: Final = 0.01
"""Nobody is refused for the sake of less: the network and the machine's own noise are as large."""
BURST: Final = 16
"""Requests that may wait for longer..."""
MOST_S: Final = 1.0
"""...but not for longer than this, which is also what anybody may wait where nobody said anything..."""
CALM_S: Final = 1.0
"""...once nobody had to for this long."""
_SMOOTH: Final = 0.1
_OUTLIER: Final = 4.0


class Verdict(enum.Enum):
    """What becomes of a request."""

    TAKEN = enum.auto()
    REFUSED = enum.auto()
    SHED = enum.auto()
    """Refused, and so are those that wait for longer than ``allowed_s`` by the grace of a burst."""


class Admission:
    """The measured times of one session, and what follows from them. All times are in seconds."""

    __slots__ = ("_left", "_lent", "_max_wait_s", "_objective_s", "_over", "_run_s", "row_s")

    def __init__(
        self, run_s: float, row_s: float, objective_s: float | None, max_wait_s: float | None
    ) -> None:
        """Begin with ``run_s`` of one row and ``row_s`` of one more in a run; 0 where they are not known.

        ``max_wait_s`` is an operator's word, beside which nothing else counts.
        """
        self._run_s = run_s
        self.row_s = row_s
        self._objective_s, self._max_wait_s = objective_s, max_wait_s
        self._left, self._lent = BURST, False
        self._over = -math.inf

    @property
    def derived(self) -> bool:
        """Whether nobody has said how long a request may wait."""
        return self._max_wait_s is None

    def allowed_s(self, rows: int) -> float:
        """Return how long a request of ``rows`` may wait."""
        if self._max_wait_s is not None:
            return self._max_wait_s
        if self._objective_s is None:
            return MOST_S
        return max(FLOOR_S, self._objective_s - self.takes_s(rows))

    def takes_s(self, rows: int, runs: int = 1) -> float:
        """Return how long so many rows are expected to take in so many runs."""
        return runs * self._run_s + max(0, rows - runs) * self.row_s

    def hopeless(self, wait: float, now: float) -> bool:
        """Whether nobody of one row would be taken, and it would teach nothing to ask."""
        if wait <= self.allowed_s(1):
            return False
        if self._max_wait_s is None and (self._left or self._lent or now - self._over > CALM_S):
            return False
        self._over = now
        return True

    def ask(self, wait: float, rows: int, now: float) -> Verdict:
        """Say whether a request of ``rows`` is taken that would wait for so long."""
        allowed = self.allowed_s(rows)
        if wait <= allowed:
            return Verdict.TAKEN
        if self._max_wait_s is not None:
            return Verdict.REFUSED
        if now - self._over > CALM_S:
            self._left, self._lent = BURST, False
        self._over = now
        if not self._left:
            lent, self._lent = self._lent, False
            return Verdict.SHED if lent else Verdict.REFUSED
        if wait > max(MOST_S, allowed):
            return Verdict.REFUSED
        self._left, self._lent = self._left - 1, True
        return Verdict.TAKEN

    def saw(self, rows: int, seconds: float) -> None:
        """Learn from a run.

        What took much longer than usual was kept from the processor, most likely: it counts, but not in full.
        """
        if rows > 1:
            self.row_s = _towards(self.row_s, max(0.0, seconds - self._run_s) / (rows - 1))
        else:
            self._run_s = _towards(self._run_s, seconds)


def _towards(before: float, now: float) -> float:
    return before + _SMOOTH * (min(now, _OUTLIER * before) - before) if before else now
