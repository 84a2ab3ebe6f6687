"""Inputs for a model that nobody has asked anything yet."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from contract.manifest import TensorSpec
from inference.session import TENSORS, Array

_SEED: Final = 7
_TEXT: Final = np.dtype(np.object_)


def made_up(
    specs: Sequence[TensorSpec], rows: int, *, random: bool = False, seed: int = _SEED
) -> dict[str, Array]:
    """Return ``rows`` along an open first dimension; other open dimensions are 1.

    Zeros, or with ``random`` numbers where they are floats or quantised;
    other integers may be indices, for which only zero is safe.
    """
    generator = np.random.default_rng(seed)
    return {spec.name: _one(spec, rows, generator if random else None) for spec in specs}


def _one(spec: TensorSpec, rows: int, generator: np.random.Generator | None) -> Array:
    shape = tuple((rows if i == 0 else 1) if d == -1 else d for i, d in enumerate(spec.shape))
    dtype: np.dtype[Any] = np.dtype(TENSORS[spec.datatype])
    if dtype == _TEXT:
        texts = np.empty(shape, _TEXT)
        texts.fill(b"")
        return texts
    if generator is None or not (dtype.kind == "f" or spec.scale is not None or spec.datatype == "INT8"):
        return np.zeros(shape, dtype)
    if dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape)).astype(dtype)
    limits = np.iinfo(dtype)
    low, high = max(int(limits.min), -100), min(int(limits.max), 100)
    return np.asarray(generator.integers(low, high, shape)).astype(dtype)
