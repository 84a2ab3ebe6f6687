"""How much error each look may spend, and which look is the first to decide.

Group-sequential by permutation (the idea of Lan and DeMets, Biometrika 1983,
with the joint permutation distribution instead of a normal one): up to look
j at most a share f(t_j) of all choices of canaries may have been rejected.
f grows with the logarithm of time, so that great harm is found at once.
"""

import math

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float32]


def schedule(first: int, growth: float, last: int) -> list[int]:
    """Return the buckets at which to look: ``first``, each next later by ``growth``, at the end ``last``."""
    looks = []
    bucket = first
    while bucket < last:
        looks.append(bucket)
        bucket = max(math.ceil(bucket * growth), bucket + 1)
    return [*looks, last]


def spent(bucket: int, first: int, last: int) -> float:
    """Return the share of the error that may be spent by ``bucket``, 0 to 1."""
    return math.log1p(bucket / first) / math.log1p(last / first)


def first_crossing(
    statistics: Table, looks: list[int], *, alpha: float, first: int, last: int
) -> tuple[int | None, list[float]]:
    """Return (index of the first look at which row 0 is rejected or None, limit of every look).

    ``statistics`` is choices x looks, larger is more extreme. Ties are
    never split: a look rejects what lies strictly above its limit, at most as
    many choices as its budget allows.
    """
    rows = statistics.shape[0]
    alive = np.ones(rows, dtype=bool)
    rejected = 0
    crossed: int | None = None
    limits: list[float] = []
    for index, bucket in enumerate(looks):
        budget = math.floor(alpha * spent(bucket, first, last) * rows + 1e-9) - rejected
        column = statistics[:, index]
        limit = _limit(column[alive], budget)
        limits.append(limit)
        hit = alive & (column > limit)
        rejected += int(hit.sum())
        alive &= ~hit
        if hit[0] and crossed is None:
            crossed = index
    return crossed, limits


def _limit(values: Table, budget: int) -> float:
    if budget <= 0:
        return math.inf
    if budget >= len(values):
        return -math.inf
    return float(np.partition(values, len(values) - 1 - budget)[len(values) - 1 - budget])
