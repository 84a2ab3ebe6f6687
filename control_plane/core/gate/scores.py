"""One number per device and look, and from it the standardised rank that is permuted.

Nothing here knows who is a canary, but for the harm (or margin) that the
null hypothesis takes away from the canaries beforehand. So the labels can be
permuted afterwards without computing any of this again.
"""

from typing import Final

import msgspec
import numpy as np

from control_plane.core.gate.evidence import Booleans, Evidence, Floats, Integers
from control_plane.core.policy import Metric

REGRESSION_NEEDS: Final = 8
"""With fewer devices the period before is subtracted instead of regressed on."""
SILENCE_FROM: Final = 0.5
"""Missing less than this share of the recent buckets is not silence."""
FEWEST: Final = 2
ROUNDING: Final = 1e-12
LOWEST: Final = float(np.log(np.finfo(np.float64).tiny))
"""Stands on the log scale for what is 0 or less, where lower is worse: worse than any other value."""


class Strata:
    """Which devices may be compared with which."""

    def __init__(self, labels: Integers) -> None:
        self.labels = labels
        self.members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]

    def means(self, values: Floats) -> Floats:
        """Return for each device the mean over its stratum of what is not NaN, or NaN."""
        seen = ~np.isnan(values)
        n = np.bincount(self.labels, weights=seen, minlength=len(self.members))
        total = np.bincount(self.labels, weights=np.where(seen, values, 0.0), minlength=len(self.members))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(n > 0, total / n, np.nan)[self.labels]

    def medians(self, values: Floats) -> Floats:
        """Return for each device the median over its stratum of what is finite, or NaN."""
        result = np.full(len(values), np.nan)
        for members in self.members:
            ordered = np.sort(values[members][np.isfinite(values[members])])
            n = len(ordered)
            if n:
                result[members] = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        return result


class Panel:
    """The evidence of one metric, prepared for means over any span of buckets."""

    def __init__(self, evidence: Evidence, metric: Metric) -> None:
        values = np.asarray(evidence.series[metric.name], dtype=np.float64)
        seen = ~np.isnan(values)
        if metric.logarithmic:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = np.where(seen, np.where(values > 0, np.log(values), LOWEST), np.nan)
        if not metric.higher_is_worse:
            values = -values
        self.accounted: Booleans = seen | muted(evidence)
        """Where the device gave the metric, or had a reason not to."""
        self.pre = evidence.pre
        self._sums = _running(np.where(seen, values, 0.0))
        self._counts = _running(seen.astype(np.float64))
        self.before = self.mean(-self.pre, 0)

    def mean(self, start: int, end: int) -> Floats:
        """Return each device's mean over buckets ``start`` to ``end`` (counted from activation), or NaN."""
        a, b = self.pre + start, self.pre + end
        n = self._counts[:, b] - self._counts[:, a]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(n > 0, (self._sums[:, b] - self._sums[:, a]) / n, np.nan)

    def adjusted(self, start: int, end: int, shift: Floats, strata: Strata) -> Floats:
        """Return the means less ``shift``, adjusted for the period before (analysis of covariance)."""
        return _adjust(self.mean(start, end) - shift, self.before, strata)


class Column(msgspec.Struct, frozen=True):
    """Weights of the devices: a row of the choices times ``weights`` is one standardised rank sum."""

    name: str
    weights: Floats


def presence(evidence: Evidence) -> Booleans:
    """Return devices x buckets: whether the device gave any value of any metric."""
    present: Booleans = np.any([~np.isnan(series) for series in evidence.series.values()], axis=0)
    return present


def muted(evidence: Evidence) -> Booleans:
    """Return devices x buckets: whether nothing could be seen since the machine did not run."""
    if evidence.muted is not None:
        return np.asarray(evidence.muted, dtype=bool)
    return np.zeros(np.shape(next(iter(evidence.series.values()))), dtype=bool)


def recent_silence(present: Booleans, pre: int, bucket: int, window: int) -> Floats:
    """Return the share of the last ``window`` buckets before ``bucket`` in which each device was silent."""
    span = min(bucket, window)
    silent: Floats = 1.0 - present[:, pre + bucket - span : pre + bucket].mean(axis=1)
    return silent


def silence_column(name: str, silence: Floats, treated: Booleans, strata: Strata) -> Column | None:
    """Return the weights for "more canaries than controls fell silent", in all metrics or in one."""
    scores = np.where(silence < SILENCE_FROM, 0.0, silence)
    return column(name, scores, treated, strata)


def column(name: str, scores: Floats, treated: Booleans, strata: Strata) -> Column | None:
    """Return the weights of ``scores`` (larger is worse, NaN counts nothing), or None if they say nothing.

    Aligned ranks: each stratum is centred at its median, all are ranked
    together (ties share their mean rank), and the ranks are centred in each
    stratum again. The variance of their sum over a random choice within
    strata is exact.
    """
    aligned = scores - strata.medians(scores)
    seen = ~np.isnan(aligned)
    if seen.sum() < FEWEST:
        return None
    ranks = np.zeros(len(scores))
    ranks[seen] = _ranks(aligned[seen]) / (seen.sum() + 1)
    weights = np.zeros(len(scores))
    variance = 0.0
    for members in strata.members:
        here = members[seen[members]]
        if not len(here):
            continue
        weights[here] = ranks[here] - ranks[here].sum() / len(here)
        n = len(members)
        share = treated[members].sum() / n
        variance += share * (1 - share) * n / max(n - 1, 1) * float(weights[here] @ weights[here])
    if variance <= ROUNDING:
        return None
    return Column(name, weights / np.sqrt(variance))


def contrast(scores: Floats, treated: Booleans, strata: Strata) -> float | None:
    """Return the mean of the canaries less that of the controls, weighted over the strata."""
    total = weight = 0.0
    for members in strata.members:
        here = members[np.isfinite(scores[members])]
        canaries, controls = scores[here[treated[here]]], scores[here[~treated[here]]]
        if len(canaries) and len(controls):
            w = len(canaries) * len(controls) / (len(canaries) + len(controls))
            total += w * float(canaries.mean() - controls.mean())
            weight += w
    return total / weight if weight else None


def _adjust(after: Floats, before: Floats, strata: Strata) -> Floats:
    both = ~np.isnan(after) & ~np.isnan(before)
    n = int(both.sum())
    if not n:
        return after
    x = np.where(both, before, np.nan)
    means = strata.means(x)
    slope = 1.0
    if n >= REGRESSION_NEEDS:
        y = np.where(both, after, np.nan)
        x0 = (x - means)[both]
        y0 = (y - strata.means(y))[both]
        spread = float(x0 @ x0)
        slope = float(x0 @ y0) / spread if spread > ROUNDING else 0.0
    # A device without a period before is judged as if it had been an average one.
    missing = np.where(np.isnan(means), x[both].sum() / n, means)
    return after - slope * np.where(np.isnan(before), missing, before)


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _running(values: Floats) -> Floats:
    return np.concatenate([np.zeros((values.shape[0], 1)), np.cumsum(values, axis=1)], axis=1)
