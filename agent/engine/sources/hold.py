"""Rows at a steady rate, out of values that come one by one when they change.

A row has for each channel the newest value whose time is not after the row's.
A row waits ``delay`` for values that are on their way; a value that comes
after the row it belongs to is late: it counts as a lost sample, and stands
from the next row on. Two values in order that are both far older than the
one before them say that the sensor's clock was set back; the second is then
the newest. All times are microseconds UTC.
"""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

MAX_PENDING: Final = 4096
"""Values of one channel that wait for their row; older ones are lost."""
MAX_BEHIND_US: Final = 10_000_000
"""Rows that are due for longer are lost: the thread did not get to run, or the clock jumped."""
MAX_AHEAD_US: Final = 1_000_000
"""A value from further in the future is taken as of now: that clock is wrong."""
NOTHING: Final = float("nan")
Row = tuple[int, list[float]]


@dataclass(frozen=True, slots=True)
class Due:
    """Rows that are due, and what is missing before them."""

    rows: list[Row]
    lost: int = 0
    gap: bool = False


class Hold:
    """Used by one thread."""

    def __init__(
        self, name: str, width: int, rate_hz: float, delay_us: int = 0, max_age_us: int | None = None
    ) -> None:
        self._name, self._width = name, width
        self._period = max(1, round(1e6 / rate_hz))
        self._delay, self._max_age = delay_us, max_age_us
        self._pending: list[deque[tuple[int, float]]] = [deque() for _ in range(width)]
        self._current = [NOTHING] * width
        self._since: list[int | None] = [None] * width
        """Time of the newest value of each channel, None before the first."""
        self._older: list[int | None] = [None] * width
        """Time of the last value that came far too late, while no other has come."""
        self._next: int | None = None
        """Time of the next row, None before the first value."""
        self._lost = 0
        self._gap = False
        self._offline = False
        self._complained = False

    def put(self, place: int, value: float, t: int | None, now: int) -> None:
        """Take a value; NaN is one that is known to be bad. Without ``t`` it is of now."""
        taken = self._believed(t, now)
        if self._next is None:
            self._next = now + self._period
        self._offline = False
        newest = self._since[place]
        if newest is not None and taken < newest and not self._was_set_back(place, taken, newest):
            self._lost += 1
            return
        self._older[place] = None
        if newest is not None and taken <= self._next - self._period and t is not None:
            self._lost += 1
        self._since[place] = taken
        waiting = self._pending[place]
        waiting.append((taken, value))
        if len(waiting) > MAX_PENDING:
            waiting.popleft()
            self._lost += 1

    def offline(self) -> None:
        """The sensor is gone: from here on rows are lost, until there is a value again."""
        self._current = [NOTHING] * self._width
        self._since = [None] * self._width
        for waiting in self._pending:
            waiting.clear()
        self._offline = self._gap = True

    def miss(self, samples: int) -> None:
        """Count values that are known to have been lost on the way."""
        self._lost += samples

    def due(self, now: int) -> Due:
        """Return the rows whose time, and delay, has passed."""
        if self._next is None:
            lost, self._lost = self._lost, 0
            return Due([], lost)
        self._follow_jumps(now)
        rows: list[Row] = []
        while self._next + self._delay <= now:
            if self._offline:
                self._lost += 1
            else:
                rows.append((self._next, self._row(self._next)))
            self._next += self._period
        lost, self._lost = self._lost, 0
        if not rows:
            return Due([], lost)
        gap, self._gap = self._gap, False
        return Due(rows, lost, gap)

    def _follow_jumps(self, now: int) -> None:
        assert self._next is not None
        behind = now - self._delay - self._next
        if behind > MAX_BEHIND_US:
            skipped = behind // self._period
            self._lost += skipped
            self._next += skipped * self._period
            self._gap = True
        elif behind < -(self._delay + 2 * self._period + MAX_AHEAD_US):
            self._next = now + self._period
            self._since = [None if t is None else min(t, now) for t in self._since]
            self._pending = [deque((min(t, now), value) for t, value in w) for w in self._pending]
            self._gap = True

    def _row(self, t: int) -> list[float]:
        for place, waiting in enumerate(self._pending):
            while waiting and waiting[0][0] <= t:
                self._current[place] = waiting.popleft()[1]
        row = self._current.copy()
        if self._max_age is not None:
            for place, since in enumerate(self._since):
                if since is not None and t - since > self._max_age:
                    row[place] = NOTHING
        return row

    def _was_set_back(self, place: int, taken: int, newest: int) -> bool:
        """Return whether the sensor's clock was: then what it said before is older than what it says now."""
        older, self._older[place] = self._older[place], taken
        if newest - taken <= MAX_BEHIND_US or older is None or taken < older:
            return False
        self._gap = True
        self._pending[place].clear()
        facts = {"source": self._name, "seconds": round((newest - taken) / 1e6, 1)}
        log.warning("source.clock_back", extra={"facts": facts})
        return True

    def _believed(self, t: int | None, now: int) -> int:
        if t is None or t - now > MAX_AHEAD_US:
            if t is not None and not self._complained:
                self._complained = True
                facts = {"source": self._name, "seconds": round((t - now) / 1e6, 1)}
                log.warning("source.clock_ahead", extra={"facts": facts})
            return now
        return t
