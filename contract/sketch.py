"""A mergeable quantile sketch with a stated relative error.

The DDSketch of Masson, Rim and Lee (VLDB 2019, "DDSketch: a fast and
fully-mergeable quantile sketch with relative-error guarantees"): a value x
falls into bin ceil(log_gamma x) with gamma = (1 + a) / (1 - a); each bin's
representative value is within a relative error a of all that fell into it.
Merging adds bins, so a fleet's quantiles keep the same error.
"""

import math
from collections.abc import Iterable
from typing import Final

from contract.messages import MAX_BINS, Sketch

ACCURACY: Final = 0.01
SMALLEST: Final = 1e-9
"""Magnitudes below this count as zero."""
_LARGEST_LOG: Final = 690.0
"""Log of about 1e300; a bin beyond counts as that."""


class SketchBuilder:
    """Collects values into a ``Sketch``. Not safe for use by several threads at once."""

    def __init__(self, accuracy: float = ACCURACY) -> None:
        self.accuracy = accuracy
        self._log_gamma = math.log((1 + accuracy) / (1 - accuracy))
        self._bins: dict[int, int] = {}
        self._negative: dict[int, int] = {}
        self._zeros = 0
        self._count = 0
        self._total = 0.0
        self._minimum = math.inf
        self._maximum = -math.inf

    def add(self, value: float, times: int = 1) -> None:
        """Add a finite ``value``; NaN and infinities raise ``ValueError``."""
        if not math.isfinite(value):
            raise ValueError(f"a sketch takes finite values, not {value}")
        if abs(value) < SMALLEST:
            self._zeros += times
        else:
            bins = self._bins if value > 0 else self._negative
            index = math.ceil(math.log(abs(value)) / self._log_gamma)
            bins[index] = bins.get(index, 0) + times
        self._count += times
        self._total += value * times
        self._minimum = min(self._minimum, value)
        self._maximum = max(self._maximum, value)

    def merge(self, other: Sketch) -> None:
        """Add all of ``other``, which must have the same accuracy."""
        if other.accuracy != self.accuracy:
            raise ValueError(
                f"cannot merge a sketch of accuracy {other.accuracy} into one of {self.accuracy}"
            )
        for mine, theirs in ((self._bins, other.bins), (self._negative, other.negative)):
            for index, n in theirs.items():
                mine[index] = mine.get(index, 0) + n
        self._zeros += other.zeros
        self._count += other.count
        self._total += other.total
        if other.minimum is not None:
            self._minimum = min(self._minimum, other.minimum)
        if other.maximum is not None:
            self._maximum = max(self._maximum, other.maximum)

    def build(self) -> Sketch:
        """Return what was collected; beyond ``MAX_BINS`` bins those nearest to zero are put together."""
        return Sketch(
            accuracy=self.accuracy,
            bins=_collapsed(self._bins),
            negative=_collapsed(self._negative),
            zeros=self._zeros,
            count=self._count,
            total=self._total,
            minimum=self._minimum if self._count else None,
            maximum=self._maximum if self._count else None,
        )


def _collapsed(bins: dict[int, int]) -> dict[int, int]:
    """Return ``bins`` with the lowest ones put together, as the paper does, where there are too many."""
    if len(bins) <= MAX_BINS:
        return dict(bins)
    order = sorted(bins)
    kept = {index: bins[index] for index in order[-MAX_BINS:]}
    kept[order[-MAX_BINS]] += sum(bins[index] for index in order[:-MAX_BINS])
    return kept


def merge(sketches: Iterable[Sketch], accuracy: float = ACCURACY) -> Sketch:
    """Return one sketch of everything in ``sketches``."""
    builder = SketchBuilder(accuracy)
    for sketch in sketches:
        builder.merge(sketch)
    return builder.build()


def quantile(sketch: Sketch, q: float) -> float | None:
    """Return the value at ``q`` in [0, 1] within the sketch's relative error, or None when it is empty."""
    if not 0 <= q <= 1:
        raise ValueError(f"a quantile lies in [0, 1], not {q}")
    if sketch.count == 0:
        return None
    rank = q * (sketch.count - 1)
    value = _at_rank(sketch, rank)
    if sketch.minimum is not None and sketch.maximum is not None:
        value = min(max(value, sketch.minimum), sketch.maximum)
    return value


def _at_rank(sketch: Sketch, rank: float) -> float:
    log_gamma = math.log((1 + sketch.accuracy) / (1 - sketch.accuracy))
    seen = 0
    for index in sorted(sketch.negative, reverse=True):
        seen += sketch.negative[index]
        if seen > rank:
            return -_middle(index, log_gamma)
    seen += sketch.zeros
    if seen > rank:
        return 0.0
    for index in sorted(sketch.bins):
        seen += sketch.bins[index]
        if seen > rank:
            return _middle(index, log_gamma)
    return sketch.maximum if sketch.maximum is not None else 0.0


def _middle(index: int, log_gamma: float) -> float:
    """Return 2 gamma^index / (gamma + 1)."""
    return 2 * math.exp(min(index * log_gamma, _LARGEST_LOG)) / (math.exp(log_gamma) + 1)
