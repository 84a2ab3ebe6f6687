"""From scores to alarms: debounce. The scores themselves come from ``inference.scoring``."""

import numpy as np
from numpy.typing import NDArray


class Debounce:
    """An alarm is ``needed`` windows above the threshold in a row; each further one is an alarm too.

    A window that was left out, or has no score, breaks the row.
    """

    def __init__(self, needed: int) -> None:
        self._needed = needed
        self._row = 0
        self._last: int | None = None

    def alarms(self, above: NDArray[np.bool_], ordinals: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which windows are alarms; ``ordinals`` number them."""
        if self._needed == 1 or not len(above):
            return above
        n, place = len(above), np.arange(len(above))
        # A row of windows begins behind one that is not above, and where one was left out.
        begins = np.zeros(n, np.int64)
        broken = np.flatnonzero(np.diff(ordinals) != 1) + 1
        begins[broken] = broken
        low = np.flatnonzero(~above)
        begins[low] = low + 1
        begins = np.maximum.accumulate(begins)
        row = place + 1 - begins
        if self._last is not None and int(ordinals[0]) == self._last + 1:
            row[begins == 0] += self._row
        self._row, self._last = max(0, int(row[-1])), int(ordinals[-1])
        result: NDArray[np.bool_] = above & (row >= self._needed)
        return result
