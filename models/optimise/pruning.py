"""Which weights become zero."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pruned(weights: NDArray[Any], share: float) -> NDArray[Any]:
    """Return ``weights`` with those of the least magnitude at 0: ``share`` of them, rounded down."""
    count = int(share * weights.size)
    if not count:
        return weights
    kept = weights.copy()
    # The order decides ties, so that the share is exact.
    kept.ravel()[np.argsort(np.abs(weights), axis=None, kind="stable")[:count]] = 0
    return kept
