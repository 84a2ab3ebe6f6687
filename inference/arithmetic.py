"""From a window of samples to the input tensor, and from the output tensor to a score.

Engine, probe and model tools must agree on these numbers to the last bit, so
they all call these functions; nobody writes them again.
"""

from typing import Final

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


def normalise(samples: ArrayLike, mean: ArrayLike, scale: ArrayLike, clip: float | None) -> Floats:
    """Return (x - mean) / scale, clipped to +-``clip``; channels are the last axis.

    Computed in float64, since counters can be large, and rounded to float32 once.
    """
    x = np.asarray(samples, np.float64) - np.asarray(mean, np.float64)
    x /= np.asarray(scale, np.float64)
    if clip is not None:
        x.clip(-clip, clip, out=x)
    return x.astype(np.float32)


def quantise(x: Floats, tensor: TensorSpec) -> NDArray[np.generic]:
    """Return ``x`` in the datatype of ``tensor``; an integer one is rounded half to even and saturated."""
    dtype = DTYPES[tensor.datatype]
    if (limits := _LIMITS.get(tensor.datatype)) is None:
        return x.astype(dtype, copy=False)
    steps = np.asarray(x / np.float32(tensor.scale or 1.0))
    np.rint(steps, out=steps)
    steps += np.float32(tensor.zero_point or 0)
    steps.clip(*limits, out=steps)
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
        values -= np.float32(tensor.zero_point or 0)
        values *= np.float32(tensor.scale)
    return values


def squared_errors(x: Floats, output: Floats, out: Floats | None = None) -> Floats:
    """Return (input - output)^2, one row per window; both have the windows on their first axis.

    ``out`` may be ``output`` itself, whose values are then lost.

    ``x`` is the normalised input *before* quantisation, so that a variant's
    own rounding counts as its error, and the scores of variants compare.
    """
    difference = np.subtract(x, output.reshape(x.shape), out=None if out is None else out.reshape(x.shape))
    difference *= difference
    return difference.reshape(len(x), -1)


def scores(score: Score, x: Floats, output: Floats, *, spend: bool = False) -> NDArray[np.float64]:
    """Return one score per window from the (dequantised) first output tensor.

    NaN and infinity stay what they are: the caller decides about them.
    ``spend`` says that nobody needs ``output`` any more.
    """
    if score.method == "reconstruction_mse":
        errors = squared_errors(x, output, output if spend else None)
        sums: NDArray[np.float64] = np.add.reduce(errors, axis=1, dtype=np.float64)
        sums /= errors.shape[1]
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
