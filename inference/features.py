"""Features of windows, as ``contract.features`` defines them, for many windows at once.

Computed in float64 and rounded to float32 once, like the normalisation.
Engine, probe and model tools call this; nobody writes it again.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.fft import rfft  # now: the probe's sandbox opens no file later
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.features import Bands, Feature, LogMel, Statistics, Taper, frames, height, mel_edges
from contract.manifest import Pipeline
from inference.arithmetic import Floats, normalise
from inference.session import Session

Wide = NDArray[np.float64]
SMALLEST_POWER: Final = 1e-10
"""-100 dB: what is below is silence."""
NO_SPREAD: Final = 1e-20
"""A variance below this share of the mean's square is what rounding leaves of a constant."""
Compute = Callable[[Wide], Wide]
"""From (windows, samples, channels) to (windows, rows, channels)."""


class Features:
    """The features of one pipeline."""

    def __init__(self, pipeline: Pipeline, graph: Session | None = None) -> None:
        """``pipeline`` is one that ``contract.package`` has checked, and has features.

        ``graph`` is the session of the feature that is one, if one is;
        ``package.manifest_invalid`` where it is not what the manifest says.
        """
        rate, plain, width = pipeline.sample_rate_hz or 0.0, pipeline.plain_features, len(pipeline.channels)
        self._parts = [_compute(f, pipeline.window, rate) for f in plain]
        self.shape = sum(height(f, pipeline.window) for f in plain), width
        """(rows, channels) of one window; (1, values) where those are of no channel."""
        self._graph = graph
        if (said := pipeline.graph) is not None:
            if graph is None:
                raise PitheadError("inference.load_failed", "the graph of the features is not opened")
            check_batches(graph)
            self.shape = (said.values // width, width) if said.per_channel else (1, said.values)
        self._mean = np.array(pipeline.feature_mean or 0.0, np.float64)
        self._scale = np.array(pipeline.feature_scale or 1.0, np.float64)

    def of(self, x: Floats) -> Floats:
        """Return (windows, rows, channels) of normalised windows (windows, samples, channels)."""
        n, size = len(x), self.shape[0] * self.shape[1]
        if self._graph is not None:
            table: Wide = self._run(self._graph, x, size).astype(np.float64)
        else:
            wide = x.astype(np.float64)
            parts = [part(wide) for part in self._parts]
            table = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        return normalise(table.reshape(n, size), self._mean, self._scale, None).reshape(n, *self.shape)

    def _run(self, graph: Session, x: Floats, size: int) -> Floats:
        """Return what the graph makes of windows; raises ``inference.run_failed``."""
        found: Floats = graph.run({graph.inputs[0].name: np.ascontiguousarray(x)})[graph.outputs[0].name]
        if found.size != len(x) * size:
            raise PitheadError(
                "inference.run_failed", f"the graph gave {list(found.shape)} of {len(x)} windows"
            )
        return found


def check_batches(graph: Session) -> None:
    """Raise ``package.manifest_invalid`` unless a graph has one input and output, for any batch."""
    for which, tensors in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        if len(tensors) != 1 or tensors[0].shape[:1] != (-1,):
            shapes = [list(t.shape) for t in tensors]
            raise PitheadError(
                "package.manifest_invalid",
                f"the graph has the {which} {shapes}; one is wanted, whose first axis is open",
                path=f"$.pipeline.features[0].{which}",
            )


def _compute(feature: Feature, window: int, rate_hz: float) -> Compute:
    match feature:
        case Statistics(which=which):
            return lambda x: _statistics(x, which)
        case Bands():
            return _bands(feature, window, rate_hz)
        case LogMel():
            return _log_mel(feature, window, rate_hz)


def _statistics(x: Wide, which: tuple[str, ...]) -> Wide:
    mean = x.mean(axis=1)
    off = x - mean[:, None]
    square = off * off
    variance = square.mean(axis=1)

    def one(name: str) -> Wide:
        found: Wide
        match name:
            case "mean":
                found = mean
            case "std":
                found = np.sqrt(variance)
            case "rms":
                found = _rms(x)
            case "minimum":
                found = x.min(axis=1)
            case "maximum":
                found = x.max(axis=1)
            case "kurtosis":
                spread = np.where(variance > NO_SPREAD * mean * mean, variance * variance, 0.0)
                found = _ratio((square * square).mean(axis=1), spread, 3.0) - 3.0
            case "crest_factor":
                found = _ratio(np.abs(x).max(axis=1), _rms(x), 0.0)
            case _:
                below = x < 0
                found = np.count_nonzero(below[:, 1:] != below[:, :-1], axis=1).astype(np.float64)
        return found

    found: Wide = np.stack([one(name) for name in which], axis=1)
    return found


def _rms(x: Wide) -> Wide:
    found: Wide = np.sqrt((x * x).mean(axis=1))
    return found


def _ratio(a: Wide, b: Wide, otherwise: float) -> Wide:
    found = np.full_like(a, otherwise)
    np.divide(a, b, out=found, where=b > 0)
    return found


def _bands(feature: Bands, window: int, rate_hz: float) -> Compute:
    periodogram, hz = _periodogram(window, feature.taper), np.arange(window // 2 + 1) * rate_hz / window
    inside = np.array([(hz >= low) & (hz < high) for low, high in feature.bands_hz], np.float64)

    def compute(x: Wide) -> Wide:
        power = inside @ periodogram(x)
        return _decibel(power) if feature.decibel else power

    return compute


def _log_mel(feature: LogMel, window: int, rate_hz: float) -> Compute:
    size, count = feature.frame, frames(feature, window)
    periodogram, hz = _periodogram(size, feature.taper), np.arange(size // 2 + 1) * rate_hz / size
    edges = np.array(mel_edges(feature))[:, None]
    rising, falling = (
        (hz - edges[:-2]) / (edges[1:-1] - edges[:-2]),
        (edges[2:] - hz) / (edges[2:] - edges[1:-1]),
    )
    triangles = np.maximum(0.0, np.minimum(rising, falling))

    def compute(x: Wide) -> Wide:
        starts = range(0, count * feature.hop, feature.hop)
        return np.concatenate(
            [_decibel(triangles @ periodogram(x[:, start : start + size])) for start in starts], axis=1
        )

    return compute


def _periodogram(size: int, taper: Taper) -> Compute:
    """Return what gives the one-sided share of each bin of the mean square of ``size`` tapered samples."""
    weights = np.ones(size)
    if taper == "hann":
        weights = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    share = np.full(size // 2 + 1, 2 / (size * float(weights @ weights)))
    share[0] /= 2
    if size % 2 == 0:
        share[-1] /= 2

    def compute(x: Wide) -> Wide:
        spectrum = rfft(x * weights[:, None], axis=1)
        power: Wide = (spectrum.real**2 + spectrum.imag**2) * share[:, None]
        return power

    return compute


def _decibel(power: Wide) -> Wide:
    found: Wide = 10 * np.log10(np.maximum(power, SMALLEST_POWER))
    return found
