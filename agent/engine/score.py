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
        if self._needed == 1:
            return above
        result = np.zeros(len(above), np.bool_)
        for i, (high, ordinal) in enumerate(zip(above.tolist(), ordinals.tolist(), strict=True)):
            in_a_row = self._last is not None and ordinal == self._last + 1
            self._row = (self._row if in_a_row else 0) + 1 if high else 0
            self._last = ordinal
            result[i] = self._row >= self._needed
        return result
