"""From windows to scores: normalise, quantise, run, dequantise, score.

Here and not in the engine, so that the probe tries a model exactly as a lane
will run it.
"""

import math
import time
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import Pipeline, Score, TensorSpec
from inference.arithmetic import (
    Floats,
    contributions,
    dequantise,
    normalise,
    quantise,
    scores,
    squared_errors,
)
from inference.session import Array, Session

BATCH: Final = 256
"""Windows in one run of a model that takes any number."""
SMOOTHING: Final = 0.3


class Windows(Protocol):
    """Rows, and how to cut them into windows."""

    @property
    def rows(self) -> NDArray[np.float64]:
        """(rows, channels) as the source gave them."""

    def cut(self, values: NDArray[np.float32], window: int) -> NDArray[np.float32]:
        """Return (windows, window, channels) of ``values``, which has one row for each of ``rows``."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What became of some windows, in their order."""

    x: Floats
    """(windows, window, channels), normalised."""
    outputs: Floats
    """(windows, values) of the first output tensor, dequantised; NaN where the model failed."""
    scores: NDArray[np.float64]
    """NaN where the model failed or its score is not finite."""
    run_us: NDArray[np.float64]
    """Time that each window cost; of a run over many windows, each has its equal share."""
    error: PitheadError | None
    """The last thing that went wrong."""

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which windows have a score."""
        finite: NDArray[np.bool_] = np.isfinite(self.scores)
        return finite


class Scorer:
    """Runs one session on windows as its manifest says. Used by one thread at a time."""

    def __init__(
        self,
        session: Session,
        pipeline: Pipeline,
        score: Score,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
    ) -> None:
        """Check that the session fits the pipeline; ``package.manifest_invalid`` if not.

        ``inputs`` and ``outputs`` are the manifest's: they fill in what a
        file format does not carry, such as the scale of an integer input.
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
        self._shape, self._batched = _row_shape(self._input, pipeline)
        self.mean: tuple[float, ...] = pipeline.mean
        self.scale: tuple[float, ...] = pipeline.scale
        self.window_us = 0.0
        """What one window costs in the model, smoothed."""

    def warm_up(self) -> None:
        """Run once on zeros: check the output, and let the first real window not pay for lazy work."""
        p = self.pipeline
        x = np.zeros((1, p.window, len(p.channels)), np.float32)
        output, _, error = self._run(x)
        if error is not None:
            raise error
        self.window_us = float(self._run(x)[1][0])
        if self.score.method == "reconstruction_mse" and output[0].size != x[0].size:
            raise PitheadError(
                "package.manifest_invalid",
                f"score.method reconstruction_mse needs an output of {x[0].size} values, "
                f"the model gives {output[0].size}",
            )
        scores(self.score, x, output)

    def run(self, windows: Windows) -> Scored:
        """Score ``windows``."""
        p = self.pipeline
        values = normalise(windows.rows, self.mean, self.scale, p.clip)
        return self.run_cut(windows.cut(values, p.window))

    def run_cut(self, x: Floats) -> Scored:
        """Score normalised windows (windows, window, channels)."""
        outputs, run_us, error = self._run(x)
        self.window_us += SMOOTHING * (float(run_us.mean()) - self.window_us)
        with np.errstate(invalid="ignore", over="ignore"):
            values = scores(self.score, x, outputs)
        broken = ~np.isfinite(values)
        if broken.any():
            values[broken] = math.nan
            if error is None:
                error = PitheadError("inference.not_finite", f"{int(broken.sum())} scores are not finite")
        return Scored(x, outputs, values, run_us, error)

    def shares(self, scored: Scored, i: int) -> dict[str, float]:
        """Return each channel's share of the ``i``-th score; empty where a score has no parts."""
        if self.score.method != "reconstruction_mse":
            return {}
        errors = squared_errors(scored.x[i : i + 1], scored.outputs[i : i + 1])
        return contributions(self.pipeline, errors[0])

    def _run(self, x: Floats) -> tuple[Floats, NDArray[np.float64], PitheadError | None]:
        feed = quantise(x.reshape(len(x), *self._shape), self._input)
        step = BATCH if self._batched else 1
        parts: list[Array | None] = []
        run_us = np.empty(len(x))
        error: PitheadError | None = None
        name, output = self._input.name, self._output.name
        for start in range(0, len(x), step):
            part = feed[start : start + step] if self._batched else feed[start].reshape(self._input.shape)
            began = time.perf_counter_ns()
            try:
                parts.append(self.session.run({name: part})[output])
            except PitheadError as failure:
                error = failure
                parts.append(None)
            n = min(step, len(x) - start)
            run_us[start : start + n] = (time.perf_counter_ns() - began) / 1000 / n
        return self._collect(parts, len(x), step), run_us, error

    def _collect(self, parts: list[Array | None], n: int, step: int) -> Floats:
        """Return the outputs as one row per window, NaN for what failed."""
        whole = [p for p in parts if p is not None]
        if len(whole) == len(parts) and step > 1:
            return dequantise(np.concatenate(whole), self._output).reshape(n, -1)
        if len(whole) == len(parts):
            return dequantise(np.stack(whole), self._output).reshape(n, -1)
        width = self.pipeline.window * len(self.pipeline.channels)
        if self.score.method == "output":
            width = 1
        rows = np.full((n, width), math.nan, np.float32)
        for i, part in enumerate(parts):
            if part is not None:
                share = dequantise(part, self._output)
                rows[i * step : i * step + step] = share.reshape(-1, width)
        return rows


def _completed(tensor: TensorSpec, known: tuple[TensorSpec, ...]) -> TensorSpec:
    """Return ``tensor`` with the scale of its namesake in the manifest where the runtime gives none."""
    if tensor.scale is not None:
        return tensor
    return next((k for k in known if k.name == tensor.name and k.datatype == tensor.datatype), tensor)


def _row_shape(tensor: TensorSpec, pipeline: Pipeline) -> tuple[tuple[int, ...], bool]:
    """Return the shape of one window in ``tensor``, and whether one run takes any number of windows."""
    size = pipeline.window * len(pipeline.channels)
    batched = bool(tensor.shape) and tensor.shape[0] == -1
    row = tensor.shape[1:] if batched else tensor.shape
    if -1 in row or math.prod(row) != size:
        raise PitheadError(
            "package.manifest_invalid",
            f"a window has {size} values ({pipeline.window} samples of {len(pipeline.channels)} channels), "
            f"the model's input {tensor.name!r} has the shape {list(tensor.shape)}",
        )
    return row, batched
