"""Gather what a lane did into one record per bucket of wall-clock time."""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from contract.messages import Micros, ModelSummary, Sketch
from contract.sketch import ACCURACY, SMALLEST, SketchBuilder

GATHERED: Final = 4096
"""Values that wait to be put into a sketch together."""
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
    index = np.ceil(np.log(sizes) / _LOG_GAMMA).astype(np.int64)
    low = index.min()
    counts = np.bincount(index - low)
    seen = np.flatnonzero(counts)
    return dict(zip((seen + low).tolist(), counts[seen].tolist(), strict=True))


class Gathered:
    """A sketch that takes its values many at a time: numpy costs more to call than to let work."""

    def __init__(self) -> None:
        self._sketch = SketchBuilder()
        self._waiting = np.empty(GATHERED)
        self._n = 0

    def add(self, values: NDArray[np.float64]) -> None:
        """Take finite ``values``."""
        n = len(values)
        if self._n + n > GATHERED:
            self._flush()
            if n > GATHERED // 2:
                add_all(self._sketch, values)
                return
        self._waiting[self._n : self._n + n] = values
        self._n += n

    def build(self) -> Sketch:
        """Return the sketch of everything so far."""
        self._flush()
        return self._sketch.build()

    def _flush(self) -> None:
        if self._n:
            add_all(self._sketch, self._waiting[: self._n])
            self._n = 0


class Bucket:
    """The counts of one bucket for one activation of one version."""

    def __init__(self) -> None:
        self.windows = 0
        self.errors = 0
        self.alarms = 0
        self.missing = 0
        self.suppressed = 0
        self.muted = 0
        self._latency = Gathered()
        self._score = Gathered()

    def add(self, scores: NDArray[np.float64], latency_us: NDArray[np.float64]) -> None:
        """Count windows that were scored."""
        self.windows += len(scores)
        self._score.add(scores)
        self._latency.add(latency_us)

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
            muted=self.muted,
            activation=head.activation,
            variant=head.variant,
            accelerator=head.accelerator,
            latency_us=self._latency.build() if self.windows else None,
            score=self._score.build() if self.windows else None,
            queue=queue,
        )


def latencies(
    gathered: float, t: NDArray[np.int64], run_us: NDArray[np.float64], around: float
) -> NDArray[np.float64]:
    """Return the latency of windows that ended at ``t``; what came before ``gathered`` lay too long."""
    if len(t) == 1:  # which needs no numpy
        return np.array([max(0.0, gathered - t.item()) + around + run_us.item()])
    found: NDArray[np.float64] = np.subtract(gathered, t)
    np.maximum(found, 0.0, out=found)
    found += around
    found += run_us
    return found


def bucket_start(now: Micros, bucket_s: float) -> Micros:
    """Return the multiple of ``bucket_s`` at or before ``now``."""
    width = round(bucket_s * 1_000_000)
    return now - now % width


class TokenBucket:
    """Lets through ``rate`` a second on average, and ``burst`` at once."""

    def __init__(self, rate: float, burst: int, now: Micros) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = float(burst), now

    def take(self, now: Micros, wanted: int = 1) -> int:
        """Return how many of ``wanted`` may pass now; ``now`` is monotonic."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) / 1e6 * self._rate)
        self._at = now
        passed = min(wanted, int(self._tokens))
        self._tokens -= passed
        return passed
