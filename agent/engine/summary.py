"""Gather what a lane did into one record per bucket of wall-clock time."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from contract.messages import Micros, ModelSummary, Sketch
from contract.sketch import ACCURACY, SMALLEST, SketchBuilder

FEW: Final = 24
"""Below this many values at once, a loop is quicker than numpy."""
_LOG_GAMMA: Final = math.log((1 + ACCURACY) / (1 - ACCURACY))


def add_all(builder: SketchBuilder, values: NDArray[np.float64]) -> None:
    """Add finite ``values`` to a sketch of the usual accuracy."""
    if len(values) < FEW:
        for value in values.tolist():
            builder.add(value)
        return
    size = np.abs(values)
    zero = size < SMALLEST
    builder.merge(
        Sketch(
            accuracy=builder.accuracy,
            bins=_bins(size[(values > 0) & ~zero]),
            negative=_bins(size[(values < 0) & ~zero]),
            zeros=int(zero.sum()),
            count=len(values),
            total=float(values.sum()),
            minimum=float(values.min()),
            maximum=float(values.max()),
        )
    )


def _bins(sizes: NDArray[np.float64]) -> dict[int, int]:
    if not len(sizes):
        return {}
    index, counts = np.unique(np.ceil(np.log(sizes) / _LOG_GAMMA).astype(np.int64), return_counts=True)
    return dict(zip(index.tolist(), counts.tolist(), strict=True))


class Bucket:
    """The counts of one bucket for one activation of one version."""

    def __init__(self) -> None:
        self.windows = 0
        self.errors = 0
        self.alarms = 0
        self.missing = 0
        self.suppressed = 0
        self._latency = SketchBuilder()
        self._score = SketchBuilder()

    def add(self, scores: NDArray[np.float64], latency_us: NDArray[np.float64]) -> None:
        """Count windows that were scored."""
        self.windows += len(scores)
        add_all(self._score, scores)
        add_all(self._latency, latency_us)

    def summary(self, head: ModelSummary, queue: int) -> ModelSummary:
        """Return the record; ``head`` says what ran and when."""
        return ModelSummary(
            model_name=head.model_name,
            version=head.version,
            bucket_start=head.bucket_start,
            bucket_s=head.bucket_s,
            count=self.windows,
            errors=self.errors,
            alarms=self.alarms,
            missing=self.missing,
            suppressed=self.suppressed,
            activation=head.activation,
            variant=head.variant,
            accelerator=head.accelerator,
            latency_us=self._latency.build() if self.windows else None,
            score=self._score.build() if self.windows else None,
            queue=queue,
        )


def bucket_start(now: Micros, bucket_s: float) -> Micros:
    """Return the multiple of ``bucket_s`` at or before ``now``."""
    width = round(bucket_s * 1_000_000)
    return now - now % width


class TokenBucket:
    """Lets through ``rate`` a second on average, and ``burst`` at once."""

    def __init__(self, rate: float, burst: int, now: Micros) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = float(burst), now

    def take(self, now: Micros) -> bool:
        """Return whether one more may pass now; ``now`` is monotonic."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) / 1e6 * self._rate)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
