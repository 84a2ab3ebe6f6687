"""From a window of samples to the input tensor, and from the output tensor to a score.

Engine, probe and model tools must agree on these numbers to the last bit, so
they all call these functions; nobody writes them again.
"""

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from contract.errors import PitheadError
from contract.manifest import Pipeline, Score, TensorSpec

DTYPES: Final[dict[str, DTypeLike]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}
"""Numpy's name of each datatype of the Open Inference Protocol that holds numbers."""

_LIMITS: Final = {
    name: (int(np.iinfo(d).min), int(np.iinfo(d).max))
    for name, d in ((name, np.dtype(dtype)) for name, dtype in DTYPES.items())
    if d.kind in "iu"
}

Floats = NDArray[np.float32]

ABREAST: Final = 2**13
"""Values of which constants by channel are held ready; numpy takes short rows one by one, and slowly."""


class Abreast:
    """Constants of each channel, repeated to lie beside many rows at once."""

    def __init__(self, *constants: ArrayLike) -> None:
        """Take some constants, each one number for each channel."""
        self._constants = tuple(np.asarray(c, np.float64) for c in constants)
        self._n = -1
        self._shape: tuple[int, ...] = ()
        self._repeated: tuple[NDArray[np.float64], ...] = ()

    def beside(self, rows: NDArray[Any]) -> tuple[NDArray[Any], tuple[NDArray[np.float64], ...]]:
        """Return ``rows`` (rows, channels) in another shape, and constants whose last axis fits it."""
        n = len(rows)
        if n != self._n:
            width = len(self._constants[0])
            k = max(1, n)
            if k * width > ABREAST:
                k = math.gcd(n, 1 << (max(1, ABREAST // width).bit_length() - 1))
            self._n, self._shape = n, (n * width,) if k == n else (n // k, k * width)
            self._repeated = tuple(np.tile(c, k) for c in self._constants)
        return rows.reshape(self._shape), self._repeated


@lru_cache(256)
def _constant(value: float, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """Return ``value`` as an array without axes, which numpy takes in half the time of a number."""
    found = np.array(value, dtype)
    found.setflags(write=False)
    return found


def normalise(samples: ArrayLike, mean: ArrayLike, scale: ArrayLike, clip: float | None) -> Floats:
    """Return (x - mean) / scale, clipped to +-``clip``; channels are the last axis.

    Computed in float64, since counters can be large, and rounded to float32 once.
    """
    x: NDArray[np.float64] = np.subtract(samples, mean, dtype=np.float64)
    x /= np.asarray(scale, np.float64)
    if clip is not None:
        x.clip(_constant(-clip, np.float64), _constant(clip, np.float64), x)
    return x.astype(np.float32)


def quantise(x: Floats, tensor: TensorSpec) -> NDArray[np.generic]:
    """Return ``x`` in the datatype of ``tensor``; an integer one is rounded half to even and saturated."""
    dtype = DTYPES[tensor.datatype]
    if (limits := _LIMITS.get(tensor.datatype)) is None:
        return x.astype(dtype, copy=False)
    steps = np.asarray(x / _constant(tensor.scale or 1.0))
    np.rint(steps, out=steps)
    steps += _constant(tensor.zero_point or 0)
    steps.clip(_constant(limits[0], steps.dtype), _constant(limits[1], steps.dtype), steps)
    return steps.astype(dtype)


def dequantise(y: NDArray[np.generic], tensor: TensorSpec, out: Floats | None = None) -> Floats:
    """Return the real values of ``y``: (integer - zero point) * scale, or as they are when not quantised.

    They are in ``out``, where that is given, and never in ``y``.
    """
    if out is None:
        values = y.astype(np.float32)
    else:
        values = out
        values[...] = y
    if y.dtype.kind in "iu" and tensor.scale is not None:
        values -= _constant(tensor.zero_point or 0)
        values *= _constant(tensor.scale)
    return values


def squared_errors(x: Floats, output: Floats, *, spend: bool = False) -> Floats:
    """Return (input - output)^2, one row per window; both have the windows on their first axis.

    ``spend`` says that they may be where ``output`` was, which nobody needs any more.

    ``x`` is the normalised input *before* quantisation, so that a variant's
    own rounding counts as its error, and the scores of variants compare.
    """
    output = output.reshape(x.shape)
    difference = np.subtract(x, output, output if spend else None)
    difference *= difference
    return difference.reshape(len(x), -1)


def scores(score: Score, x: Floats, output: Floats, *, spend: bool = False) -> NDArray[np.float64]:
    """Return one score per window from the (dequantised) first output tensor.

    NaN and infinity stay what they are: the caller decides about them.
    ``spend`` says that nobody needs ``output`` any more.
    """
    if score.method == "reconstruction_mse":
        errors = squared_errors(x, output, spend=spend)
        sums: NDArray[np.float64] = np.add.reduce(errors, axis=1, dtype=np.float64)
        sums /= _constant(errors.shape[1], np.float64)
        return sums
    values = output.reshape(len(x), -1)
    if values.shape[1] != 1:
        raise PitheadError(
            "package.manifest_invalid",
            f"score.method output needs one value per window, the model gives {values.shape[1]}",
        )
    return values[:, 0].astype(np.float64)


def contributions(pipeline: Pipeline, errors: Floats) -> dict[str, float]:
    """Return the share of each channel in one window's squared errors; the shares add up to 1.

    ``errors`` is one row of ``squared_errors``: sample by sample, channel by channel.
    """
    by_channel = errors.reshape(-1, len(pipeline.channels)).sum(axis=0, dtype=np.float64)
    total = float(by_channel.sum())
    if total <= 0 or not np.isfinite(total):
        return {}
    return {c.name: float(v / total) for c, v in zip(pipeline.channels, by_channel, strict=True)}
