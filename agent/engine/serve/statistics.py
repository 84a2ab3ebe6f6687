"""What a served version has done: cheap to count on the way, exact when it is read."""

from bisect import bisect_left
from typing import Final

BOUNDS_US: Final = (
    *(50, 100, 200, 300, 500, 750, 1_000, 2_000, 3_000, 5_000, 7_500, 10_000, 20_000, 30_000, 50_000),
    *(100_000, 200_000, 500_000, 1_000_000, 5_000_000),
)
"""Upper bounds of the latency histogram; one more bucket has no bound."""
MAX_SIZES: Final = 256
"""Sizes of runs that are told apart; of more the next power of two counts, since clients choose them."""
_BOUNDS_NS: Final = tuple(b * 1000 for b in BOUNDS_US)


class Statistics:
    """Counters of one version since it was loaded. Times are nanoseconds."""

    __slots__ = (
        "batches",
        "codes",
        "executions",
        "failures",
        "failures_ns",
        "histogram",
        "hits",
        "hits_ns",
        "infer_ns",
        "input_ns",
        "misses",
        "misses_ns",
        "output_ns",
        "queue_ns",
        "refused",
        "rows",
        "successes",
        "total_ns",
    )

    def __init__(self) -> None:
        self.successes = self.failures = self.refused = 0
        """Requests; ``refused`` are those that never ran."""
        self.codes: dict[str, int] = {}
        """Failures by what they were."""
        self.rows = 0
        """Inferences: a request with a batch of n counts n times."""
        self.executions = 0
        """Runs: a run that served three requests counts once."""
        self.total_ns = self.failures_ns = 0
        self.queue_ns = self.input_ns = self.infer_ns = self.output_ns = 0
        self.hits = self.hits_ns = 0
        """Requests that were answered with an answer that was kept; they are successes too."""
        self.misses = self.misses_ns = 0
        """Requests whose answer was looked for, made by a run, and kept; the time to look and to keep."""
        self.batches: dict[int, list[int]] = {}
        """By rows of a run: runs and their time."""
        self.histogram = [0] * (len(BOUNDS_US) + 1)

    def succeeded(self, rows: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count a request that was answered."""
        total = queue_ns + input_ns + infer_ns + output_ns
        self.successes += 1
        self.rows += rows
        self.total_ns += total
        self.queue_ns += queue_ns
        self.input_ns += input_ns
        self.infer_ns += infer_ns
        self.output_ns += output_ns
        self.histogram[bisect_left(_BOUNDS_NS, total)] += 1

    def hit(self, ns: int) -> None:
        """Count a request that was answered without a run."""
        self.successes += 1
        self.total_ns += ns
        self.hits += 1
        self.hits_ns += ns
        self.histogram[bisect_left(_BOUNDS_NS, ns)] += 1

    def missed(self, ns: int) -> None:
        """Count what it cost to look for an answer and to keep another one."""
        self.misses += 1
        self.misses_ns += ns

    def failed(self, total_ns: int, code: str = "") -> None:
        """Count a request that the model, or its waiting time, was too much for."""
        self.failures += 1
        self.codes[code] = self.codes.get(code, 0) + 1
        self.failures_ns += total_ns

    def ran(self, rows: int, infer_ns: int) -> None:
        """Count a run."""
        self.executions += 1
        seen = self.batches.get(rows)
        if seen is None and len(self.batches) >= MAX_SIZES:
            rows = 1 << (rows - 1).bit_length()
            seen = self.batches.get(rows)
        if seen is None:
            self.batches[rows] = [1, infer_ns]
        else:
            seen[0] += 1
            seen[1] += infer_ns
