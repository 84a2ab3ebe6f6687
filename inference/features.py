"""Features of windows, as ``contract.features`` defines them, for many windows at once.

Computed in float64 and rounded to float32 once, like the normalisation.
Engine, probe and model tools call this; nobody writes it again.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.fft import rfft  # now: the probe's sandbox opens no file later
from numpy.typing import NDArray

from contract.features import Bands, Feature, LogMel, Statistics, Taper, frames, height, mel_edges
from contract.manifest import Pipeline
from inference.arithmetic import Floats, normalise

Wide = NDArray[np.float64]
SMALLEST_POWER: Final = 1e-10
"""-100 dB: what is below is silence."""
NO_SPREAD: Final = 1e-20
"""A variance below this share of the mean's square is what rounding leaves of a constant."""
Compute = Callable[[Wide], Wide]
"""From (windows, samples, channels) to (windows, rows, channels)."""


class Features:
    """The features of one pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        """``pipeline`` is one that ``contract.package`` has checked, and has features."""
        rate = pipeline.sample_rate_hz or 0.0
        self._parts = [_compute(f, pipeline.window, rate) for f in pipeline.features]
        self.shape = sum(height(f, pipeline.window) for f in pipeline.features), len(pipeline.channels)
        """(rows, channels) of one window."""
        self._mean = np.array(pipeline.feature_mean or 0.0, np.float64)
        self._scale = np.array(pipeline.feature_scale or 1.0, np.float64)

    def of(self, x: Floats) -> Floats:
        """Return (windows, rows, channels) of normalised windows (windows, samples, channels)."""
        wide = x.astype(np.float64)
        parts = [part(wide) for part in self._parts]
        table = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        flat = table.reshape(len(x), self.shape[0] * self.shape[1])
        return normalise(flat, self._mean, self._scale, None).reshape(len(x), *self.shape)


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
