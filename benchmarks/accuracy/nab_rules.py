"""The rules by which the Numenta Anomaly Benchmark scores a detector, written anew from their description.

Lavin and Ahmad, "Evaluating Real-time Anomaly Detection Algorithms", 2015,
and the constants of NAB 1.1. A row above the threshold earns, once in each
labelled window, up to +1 the earlier it comes; outside of windows each row
costs up to ``false_positive``, less shortly after a window than far from one;
a window without any costs ``false_negative``. The first rows, in which a
detector may learn, count for nothing. One threshold holds for all series, and
is the one that gives the highest sum. Scores of several detectors are put on
a scale from 0, silence, to 100, every window found at its first row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

PROBATION: Final = 0.15
PROBATION_ROWS: Final = 5000
"""Of more rows than this the share is taken of this many."""
STEEPNESS: Final = 5.0
FAR: Final = 3.0
"""Window widths behind a window; a row further away has nothing to do with it."""


@dataclass(frozen=True)
class Profile:
    """What is worth how much."""

    true_positive: float = 1.0
    false_positive: float = 0.11
    false_negative: float = 1.0


STANDARD: Final = Profile()


@dataclass(frozen=True)
class Series:
    """One series as a detector scored it."""

    scores: NDArray[np.float64]
    """One for each row; NaN counts as no detection at any threshold."""
    windows: Sequence[tuple[int, int]]
    """First and last row of each labelled window, in order, not overlapping."""


def probation(rows: int) -> int:
    """Return how many of the first rows count for nothing."""
    return math.ceil(min(math.floor(PROBATION * rows), PROBATION * PROBATION_ROWS))


def sigmoid(position: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return +0.987 at -1, the first row of a window, 0 at its end, and -1 far behind it."""
    value: NDArray[np.float64] = 2.0 / (1.0 + np.exp(STEEPNESS * np.minimum(position, FAR))) - 1.0
    return np.where(position > FAR, -1.0, value)


def worth(series: Series, profile: Profile = STANDARD) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return what a detection at each row is worth, and the number of its window, -1 outside of all."""
    rows = np.arange(len(series.scores))
    value = np.full(len(rows), -profile.false_positive)
    inside = np.full(len(rows), -1)
    most = float(sigmoid(np.array([-1.0]))[0])
    for i, (first, last) in enumerate(series.windows):
        width = last - first + 1
        behind = rows > last
        value[behind] = profile.false_positive * sigmoid((rows[behind] - last) / (width - 1))
        here = (rows >= first) & (rows <= last)
        value[here] = profile.true_positive / most * sigmoid(-(last - rows[here] + 1) / width)
        inside[here] = i
    return value, inside


@dataclass(frozen=True)
class Swept:
    """The sum over all series at each threshold that makes a difference."""

    thresholds: NDArray[np.float64]
    """Falling; a row is a detection when its score is at or above."""
    sums: NDArray[np.float64]
    windows: int
    """That count: at least one row of them is behind the probation."""
    profile: Profile

    @property
    def best(self) -> tuple[float, float]:
        """Return the threshold with the highest sum, and the sum; the highest of equal thresholds."""
        i = int(np.argmax(self.sums))
        return float(self.thresholds[i]), float(self.sums[i])

    def at(self, threshold: float) -> float:
        """Return the sum at any threshold."""
        i = int(np.count_nonzero(self.thresholds >= threshold)) - 1
        return float(self.sums[max(i, 0)])

    def scaled(self, total: float) -> float:
        """Return ``total`` on NAB's scale from 0, no detection, to 100, all of them at once."""
        silent = -self.profile.false_negative * self.windows
        return 100 * (total - silent) / (self.profile.true_positive * self.windows - silent)


def sweep(corpus: Sequence[Series], profile: Profile = STANDARD) -> Swept:
    """Return the sums; the first threshold, infinity, is silence."""
    scores, values, owners, count = [], [], [], 0
    for series in corpus:
        value, inside = worth(series, profile)
        keep = np.isfinite(series.scores)
        keep[: probation(len(keep))] = False
        counted = sorted(set(inside[probation(len(inside)) :].tolist()) - {-1})
        number = {window: count + i for i, window in enumerate(counted)}
        count += len(counted)
        scores.append(series.scores[keep])
        values.append(value[keep])
        owners.append(np.array([number.get(i, -1) for i in inside[keep].tolist()], np.int64))
    score, value, owner = np.concatenate(scores), np.concatenate(values), np.concatenate(owners)
    order = np.argsort(-score, kind="stable")
    score, value, owner = score[order], value[order], owner[order]
    gain = np.where(owner < 0, value, 0.0)
    best = np.full(count, -profile.false_negative)
    for i in np.flatnonzero(owner >= 0).tolist():
        gain[i] = max(0.0, value[i] - best[owner[i]])
        best[owner[i]] += gain[i]
    sums = np.concatenate([[-profile.false_negative * count], gain]).cumsum()
    # Rows with one score are above a threshold together.
    last = np.append(np.diff(score) != 0, True) if len(score) else np.empty(0, np.bool_)
    return Swept(
        np.concatenate([[math.inf], score[last]]),
        sums[np.concatenate([[True], last])],
        count,
        profile,
    )
