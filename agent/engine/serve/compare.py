"""How far two versions' answers to one request lie apart. Pure."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
from msgspec import Meta, Struct

from inference.session import Array


class Tolerance(Struct, frozen=True, forbid_unknown_fields=True):
    """``|shadow - primary| <= atol + rtol * |primary|``, for each value."""

    atol: Annotated[float, Meta(ge=0)] = 1e-3
    rtol: Annotated[float, Meta(ge=0)] = 1e-3


class Difference(NamedTuple):
    """Of one request."""

    agrees: bool
    """All values are within the tolerance, texts are the same."""
    largest: float
    """Absolute; infinite where only one of two values is a number."""
    total: float
    """Sum of the absolute differences that are finite."""
    values: int
    flips: int
    """Rows whose largest value is at another place."""
    rows: int
    """Rows that were looked at for that."""


def compare(
    primary: Mapping[str, Array], shadow: Mapping[str, Array], tolerance: Tolerance, classes: str = ""
) -> Difference | None:
    """Return how ``shadow`` differs, None where outputs or shapes are others.

    ``classes`` names the output whose largest value is the answer; where it is empty and there is one
    output with two or more columns, it is that one.
    """
    if primary.keys() != shadow.keys():
        return None
    if not classes and len(primary) == 1:
        classes = next(iter(primary))
    agrees, largest, total, values, flips, rows = True, 0.0, 0.0, 0, 0, 0
    for name, ours in primary.items():
        theirs = shadow[name]
        if ours.shape != theirs.shape:
            return None
        if np.object_ in (ours.dtype, theirs.dtype):
            agrees = agrees and bool((ours == theirs).all())
            continue
        a, b = ours.astype(np.float64), theirs.astype(np.float64)
        apart = _apart(a, b)
        near = np.isfinite(apart) & (apart <= tolerance.atol + tolerance.rtol * np.abs(a))
        agrees = agrees and bool((near | (apart == 0)).all())
        largest = max(largest, float(apart.max(initial=0.0)))
        total += float(apart[np.isfinite(apart)].sum())
        values += apart.size
        if name == classes and a.ndim >= 1 and a.shape[-1] > 1 and a.size:
            other = a.argmax(-1) != b.argmax(-1)
            flips, rows = int(other.sum()), int(other.size)
    return Difference(agrees, largest, total, values, flips, rows)


def _apart(a: Array, b: Array) -> Array:
    """Return absolute differences: 0 where both are NaN or the same infinity."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(b - a)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.where(np.isnan(apart), np.inf, apart))
