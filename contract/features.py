"""What a pipeline may compute from a window before the model sees it; ``inference`` does the computing.

Each feature is of one channel. Together they are a table with a row for each
feature and a column for each channel, in the order in which they are
declared; it is flattened row by row into the model's input, as a window of
samples is. So what is said of channels, such as their share of an anomaly,
holds with features as it does without.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

MAX_FEATURES: Final = 16
MAX_BANDS: Final = 1024
MAX_FRAME: Final = 65536
EdgeHz = Annotated[float, Meta(ge=0, le=5e5)]
Taper = Literal["hann", "rectangular"]
Statistic = Literal["mean", "std", "rms", "minimum", "maximum", "kurtosis", "crest_factor", "zero_crossings"]


class Statistics(Struct, frozen=True, tag_field="kind", tag="statistics"):
    """One row for each of ``which``, over the window's samples x.

    ``std`` is of the window itself (divided by n); ``kurtosis`` is the excess
    E[(x - mean)^4] / std^4 - 3; ``crest_factor`` is max |x| / rms; both are 0
    for a window that has no spread. ``zero_crossings`` counts changes of sign
    from one sample to the next, where 0 counts as positive.
    """

    which: Annotated[tuple[Statistic, ...], Meta(min_length=1, max_length=8)]


class Bands(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="bands"):
    """The mean square of the window that lies in each band of frequencies: one row for each band.

    The one-sided periodogram, tapered, summed over the bins with
    low <= f < high; the sample rate is the pipeline's.
    """

    bands_hz: Annotated[tuple[tuple[EdgeHz, EdgeHz], ...], Meta(min_length=1, max_length=MAX_BANDS)]
    taper: Taper = "hann"
    decibel: bool = False
    """10 log10, and no less than -100."""


class LogMel(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="log_mel"):
    """Mel bands in dB of frames of ``frame`` samples, each ``hop``: frame by frame, from the lowest band on.

    Triangles of height 1 between edges that are evenly spaced on the mel
    scale 2595 log10(1 + f / 700), over the same periodogram as ``Bands``.
    """

    frame: Annotated[int, Meta(ge=8, le=MAX_FRAME)]
    hop: Annotated[int, Meta(ge=1, le=MAX_FRAME)]
    mels: Annotated[int, Meta(ge=1, le=MAX_BANDS)]
    low_hz: EdgeHz
    high_hz: EdgeHz
    taper: Taper = "hann"


Feature = Statistics | Bands | LogMel


def frames(feature: LogMel, window: int) -> int:
    """Return how many whole frames a window holds."""
    return max(0, (window - feature.frame) // feature.hop + 1)


def height(feature: Feature, window: int) -> int:
    """Return how many rows a feature gives."""
    match feature:
        case Statistics(which=which):
            return len(which)
        case Bands(bands_hz=bands_hz):
            return len(bands_hz)
        case LogMel(mels=mels):
            return frames(feature, window) * mels


def mel_edges(feature: LogMel) -> tuple[float, ...]:
    """Return the ``mels + 2`` corners of the triangles, in Hz."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (feature.low_hz, feature.high_hz))
    step = (high - low) / (feature.mels + 1)
    return tuple(700 * (10 ** ((low + i * step) / 2595) - 1) for i in range(feature.mels + 2))


def problems(feature: Feature, window: int, rate_hz: float | None) -> Iterator[tuple[str, str]]:
    """Yield (field, what is wrong with it) for a feature of windows of so many samples."""
    if isinstance(feature, Statistics):
        if len(set(feature.which)) != len(feature.which):
            yield "which", "a statistic stands twice"
    elif rate_hz is None:
        yield "kind", "frequencies need pipeline.sample_rate_hz"
    elif isinstance(feature, Bands):
        yield from _band_problems(feature, window, rate_hz)
    else:
        yield from _mel_problems(feature, window, rate_hz)


def _band_problems(feature: Bands, window: int, rate_hz: float) -> Iterator[tuple[str, str]]:
    bin_hz = rate_hz / window
    for i, (low, high) in enumerate(feature.bands_hz):
        # The last bin may stand at half the rate, and a band ends before its upper edge.
        if not low < high <= rate_hz / 2 + bin_hz:
            yield f"bands_hz[{i}]", f"{low} to {high} Hz is no band below {rate_hz / 2} Hz"
        elif math.ceil(low * window / rate_hz) * rate_hz / window >= high:
            yield f"bands_hz[{i}]", f"no bin lies in {low} to {high} Hz; they are {bin_hz:g} Hz apart"


def _mel_problems(feature: LogMel, window: int, rate_hz: float) -> Iterator[tuple[str, str]]:
    if not frames(feature, window):
        yield "frame", f"{feature.frame} samples are more than the window's {window}"
    if not feature.low_hz < feature.high_hz <= rate_hz / 2:
        yield "high_hz", f"{feature.low_hz} to {feature.high_hz} Hz is no range below {rate_hz / 2} Hz"
        return
    bin_hz, edges = rate_hz / feature.frame, mel_edges(feature)
    for i in range(feature.mels):
        if (math.floor(edges[i] * feature.frame / rate_hz) + 1) * bin_hz >= edges[i + 2]:
            yield "mels", f"no bin lies in band {i}; they are {bin_hz:g} Hz apart"
            return
