"""How many rows may run at once: additive increase, multiplicative decrease, as Clipper does it.

Crankshaw et al., "Clipper: A Low-Latency Online Prediction Serving System",
NSDI 2017, section 4.3: the batch grows by a constant while it meets the
latency objective, and shrinks by a tenth when it does not.
"""

from typing import Final

DECREASE: Final = 0.9


class BatchLimit:
    """The limit of one model, in rows."""

    __slots__ = ("_most", "_objective_s", "_size", "_step")

    def __init__(self, objective_s: float, most: int, start: int = 8, step: float = 1.0) -> None:
        self._objective_s, self._most, self._step = objective_s, max(1, most), step
        self._size = float(min(max(1, start), self._most))

    @property
    def rows(self) -> int:
        """At most so many, at least 1."""
        return int(self._size)

    def saw(self, rows: int, seconds: float) -> None:
        """Learn from a batch that ran; one that was not full says nothing good of larger ones."""
        if seconds > self._objective_s:
            self._size = max(1.0, min(self._size, float(rows)) * DECREASE)
        elif rows >= int(self._size):
            self._size = min(float(self._most), self._size + self._step)
