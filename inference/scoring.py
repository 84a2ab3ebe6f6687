"""From windows to scores: normalise, quantise, run, dequantise, score.

Here and not in the engine, so that the probe tries a model exactly as a lane
will run it.
"""

import math
import time
from typing import Final, Protocol

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import Pipeline, Score, TensorSpec
from inference.arithmetic import (
    Abreast,
    Floats,
    contributions,
    dequantise,
    normalise,
    quantise,
    scores,
    squared_errors,
)
from inference.features import Features
from inference.session import Array, Session

BATCH: Final = 256
"""Windows in one run of a model that takes any number."""
BATCH_VALUES: Final = 2**20
"""Of long windows so many that they hold this many values at most, but one at least."""
SMOOTHING: Final = 0.3
FEATURE_VALUES: Final = 2**16
"""Samples x channels of which features are computed together."""


class Windows(Protocol):
    """Rows, and how to cut them into windows."""

    @property
    def parts(self) -> tuple[NDArray[np.float64], ...]:
        """(rows, channels) each, as the source gave them; together the rows that are cut."""

    def cut(self, values: Array, window: int) -> Array:
        """Return (windows, window, channels) of ``values``, which has one row for each of those in ``parts``.

        It may be a view of ``values``, in which windows share their rows: read it only.
        """


class Scored(Struct, frozen=True):
    """What became of some windows, in their order."""

    x: Floats
    """What the model got, normalised: (windows, samples or features, channels).

    May be a view in which windows share their rows.
    """
    outputs: tuple[Array | None, ...]
    """The first output tensor of each ``step`` windows, as the model gave it; None where it failed on all."""
    step: int
    scores: NDArray[np.float64]
    """NaN where the model failed or its score is not finite."""
    run_us: NDArray[np.float64]
    """Time that each window cost; of a run over many windows, each has its equal share."""
    model_us: float
    """The sum of ``run_us``."""
    error: PitheadError | None
    """The last thing that went wrong."""

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which windows have a score."""
        finite: NDArray[np.bool_] = np.isfinite(self.scores)
        return finite

    def output(self, i: int) -> Array | None:
        """Return what the model gave for the ``i``-th window, in its own datatype; None where it failed."""
        some, at = self.outputs[i // self.step], i % self.step
        return None if some is None or math.isnan(self.scores[i]) else some[at : at + 1]


class Scorer:
    """Runs one session on windows as its manifest says. Used by one thread at a time.

    What is done to each value alone, normalising and quantising, is done to
    rows and not to windows, which share them; the numbers are the same.
    """

    def __init__(
        self,
        session: Session,
        pipeline: Pipeline,
        score: Score,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        graph: Session | None = None,
    ) -> None:
        """Check that the session fits the pipeline; ``package.manifest_invalid`` if not.

        ``inputs`` and ``outputs`` are the manifest's: they fill in what a
        file format does not carry, such as the scale of an integer input.
        ``graph`` is the session of the features, where they are one; both stay the caller's.
        """
        self.session = session
        self.pipeline = pipeline
        self.score = score
        if len(session.inputs) != 1:
            raise PitheadError(
                "package.manifest_invalid",
                f"a lane feeds one input tensor, the model has {len(session.inputs)}",
            )
        self._input = _completed(session.inputs[0], inputs)
        first = next((t for t in session.outputs if t.name == outputs[0].name), None)
        if first is None:
            raise PitheadError(
                "package.manifest_invalid", f"the model has no output {outputs[0].name!r}", path="outputs[0]"
            )
        self._output = _completed(first, outputs)
        self._features = Features(pipeline, graph) if pipeline.features else None
        self._by_channel = pipeline.graph is None or pipeline.graph.per_channel
        """Whether each value of the model's input is of one channel."""
        self._feature_us = 0.0
        """What the graph costs for one window, of the last windows."""
        row, self._batched = _row_shape(self._input, pipeline)
        self._shape = row if self._batched else self._input.shape
        """Of what one window is in a run: without the first axis where that takes any number of windows."""
        self._step = max(1, min(BATCH, BATCH_VALUES // math.prod(row)))
        self._scratch = np.empty(0, np.float32)
        self.normalise_by(pipeline.mean, pipeline.scale)
        self.window_us = 0.0
        """What one window costs in the model, and in a graph before it, smoothed."""

    def normalise_by(self, mean: tuple[float, ...], scale: tuple[float, ...]) -> None:
        """Take these from the next window on."""
        self._mean, self._scale = mean, scale
        self._normal = Abreast(mean, scale)

    @property
    def mean(self) -> tuple[float, ...]:
        """By channel; the manifest's or the device's own."""
        return self._mean

    @property
    def scale(self) -> tuple[float, ...]:
        """By channel; the manifest's or the device's own."""
        return self._scale

    def warm_up(self) -> None:
        """Run on zeros: check the output, and let the first real window not pay for lazy work.

        Leaves a model's variables as they were at first.
        """
        p = self.pipeline
        x = self._featured(np.zeros((1, p.window, len(p.channels)), np.float32))
        feed, run_us = quantise(x, self._input), np.empty(1)
        self._run(feed, run_us)
        output, _, error = self._run(feed, run_us)
        self.session.reset()
        if output is None:
            raise error or PitheadError("inference.run_failed", "the model gave no output")
        self.window_us = float(run_us[0])
        if self.score.method == "reconstruction_mse" and output.size != x.size:
            raise PitheadError(
                "package.manifest_invalid",
                f"score.method reconstruction_mse needs an output of {x.size} values, "
                f"the model gives {output.size}",
            )
        scores(self.score, x, dequantise(output, self._output))

    def run(self, windows: Windows) -> Scored:
        """Score ``windows``."""
        window = self.pipeline.window
        # Rows in no window may hold anything.
        with np.errstate(invalid="ignore", over="ignore"):
            values = self._normalised(windows.parts)
            x = windows.cut(values, window)
            if self._features is not None:
                return self._featured_and_scored(x)
            if x.size <= values.size:
                return self._scored(x, quantise(x, self._input))
            feed = quantise(values, self._input)
            return self._scored(x, x if feed is values else windows.cut(feed, window))

    def run_cut(self, x: Floats) -> Scored:
        """Score normalised windows (windows, window, channels)."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self._featured_and_scored(x)

    def _featured_and_scored(self, x: Floats) -> Scored:
        """Score windows by way of their features; those of which a graph makes no numbers have no score."""
        n = len(x)
        if self.pipeline.graph is None or not n:
            x = self._featured(x)
            return self._scored(x, quantise(x, self._input))
        began = time.perf_counter_ns()
        try:
            x = self._featured(x)
        except PitheadError as failure:
            none = np.zeros((n, *(self._features.shape if self._features else ())), np.float32)
            outputs = (None,) * -(-n // self._step)
            return Scored(none, outputs, self._step, np.full(n, math.nan), np.zeros(n), 0.0, failure)
        self._feature_us = (time.perf_counter_ns() - began) / (1000 * n)
        broken = ~np.isfinite(x.reshape(n, -1)).all(axis=1)
        x[broken] = 0.0
        scored = self._scored(x, quantise(x, self._input))
        if not broken.any():
            return scored
        scored.scores[broken] = math.nan
        said = f"the graph gave {int(broken.sum())} windows values that are not finite"
        return replace(scored, error=PitheadError("inference.not_finite", said))

    def shares(self, scored: Scored, i: int) -> dict[str, float]:
        """Return each channel's share of the ``i``-th score.

        Empty where a score has no parts: a single value that a model gives
        says nothing about what it comes from, nor does a graph's unless it is ``per_channel``.
        """
        has_parts = self._by_channel and self.score.method == "reconstruction_mse"
        if not has_parts or (output := scored.output(i)) is None:
            return {}
        errors = squared_errors(scored.x[i : i + 1], dequantise(output, self._output).reshape(1, -1))
        return contributions(self.pipeline, errors[0])

    def _normalised(self, parts: tuple[NDArray[np.float64], ...]) -> Floats:
        """Return all rows normalised."""
        done: list[Floats] = []
        for rows in parts:
            abreast, (mean, scale) = self._normal.beside(rows)
            done.append(normalise(abreast, mean, scale, self.pipeline.clip).reshape(rows.shape))
        return done[0] if len(done) == 1 else np.concatenate(done)

    def _featured(self, x: Floats) -> Floats:
        """Return what the model gets of windows, a few at a time: the steps between are large."""
        if self._features is None:
            return x
        found = np.empty((len(x), *self._features.shape), np.float32)
        step = max(1, FEATURE_VALUES // math.prod(x.shape[1:]))
        for start in range(0, len(x), step):
            found[start : start + step] = self._features.of(x[start : start + step])
        return found

    def _scored(self, x: Floats, feed: Array) -> Scored:
        """Score ``x``; ``feed`` is the same in the datatype of the model's input."""
        n, step = len(x), self._step
        run_us = np.empty(n)
        error: PitheadError | None = None
        outputs: tuple[Array | None, ...] = ()
        if 0 < n <= step:
            output, values, error = self._part(x, feed, run_us)
            outputs = (output,)
        else:
            values = np.empty(n)
            for start in range(0, n, step):
                some = slice(start, start + step)
                output, values[some], failure = self._part(x[some], feed[some], run_us[some])
                outputs, error = (*outputs, output), failure or error
        # Of one number, the sum is had without numpy, ten times as fast.
        model_us = run_us.item() if n == 1 else float(np.add.reduce(run_us))
        if n:
            self.window_us += SMOOTHING * (model_us / n + self._feature_us - self.window_us)
        finite = np.isfinite(values)
        if (broken := n - int(np.count_nonzero(finite))) > 0:
            values[~finite] = math.nan
            error = error or PitheadError("inference.not_finite", f"{broken} scores are not finite")
        return Scored(x, outputs, step, values, run_us, model_us, error)

    def _part(
        self, x: Floats, feed: Array, run_us: NDArray[np.float64]
    ) -> tuple[Array | None, NDArray[np.float64], PitheadError | None]:
        """Return what the model gives for some windows, their scores, and what went wrong."""
        output, failed, error = self._run(feed, run_us)
        if output is None:
            return None, np.full(len(x), math.nan), error
        if self._scratch.size < output.size:
            self._scratch = np.empty(output.size, np.float32)
        real = dequantise(output, self._output, self._scratch[: output.size].reshape(output.shape))
        values = scores(self.score, x, real, spend=True)
        if failed:
            values[failed] = math.nan
        return output, values, error

    def _run(
        self, feed: Array, run_us: NDArray[np.float64]
    ) -> tuple[Array | None, list[int], PitheadError | None]:
        """Return what the model gives for some windows, which of them failed, and why.

        Rows of what failed hold nothing; None where nothing else is there. Fills ``run_us``.
        """
        n, name, output = len(feed), self._input.name, self._output.name
        feed = np.ascontiguousarray(feed).reshape((n, *self._shape))
        now, run = time.perf_counter_ns, self.session.run
        if self._batched:
            began = now()
            try:
                return run({name: feed})[output], [], None
            except PitheadError as failure:
                return None, [], failure
            finally:
                run_us[:] = (now() - began) / (1000 * n)
        parts: list[Array] = []
        failed: list[int] = []
        error: PitheadError | None = None
        for i in range(n):
            began = now()
            try:
                parts.append(run({name: feed[i]})[output])
            except PitheadError as failure:
                error = failure
                failed.append(i)
            run_us[i] = (now() - began) / 1000
        if not parts:
            return None, failed, error
        for i in failed:
            parts.insert(i, np.zeros_like(parts[0]))
        return parts[0][None] if n == 1 else np.stack(parts), failed, error


def _completed(tensor: TensorSpec, known: tuple[TensorSpec, ...]) -> TensorSpec:
    """Return ``tensor`` with the scale of its namesake in the manifest where the runtime gives none."""
    if tensor.scale is not None:
        return tensor
    return next((k for k in known if k.name == tensor.name and k.datatype == tensor.datatype), tensor)


def _row_shape(tensor: TensorSpec, pipeline: Pipeline) -> tuple[tuple[int, ...], bool]:
    """Return the shape of one window in ``tensor``, and whether one run takes any number of windows."""
    size, width = pipeline.values, len(pipeline.channels)
    rows = "features" if pipeline.features else "samples"
    batched = bool(tensor.shape) and tensor.shape[0] == -1
    row = tensor.shape[1:] if batched else tensor.shape
    if -1 in row or math.prod(row) != size:
        raise PitheadError(
            "package.manifest_invalid",
            f"a window has {size} values ({size // width} {rows} of {width} channels), "
            f"the model's input {tensor.name!r} has the shape {list(tensor.shape)}",
        )
    return row, batched
