"""The peer that every detector here is printed beside: squared Mahalanobis distance from the normal rows."""

from typing import Self

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Mahalanobis(Struct, frozen=True):
    """A fitted detector."""

    mean: Floats
    precision: Floats
    """Inverse of the covariance (pseudo-inverse where a channel is constant)."""

    @classmethod
    def fit(cls, normal: Floats) -> Self:
        """Return the detector of these rows."""
        precision = np.asarray(np.linalg.pinv(np.cov(normal.T)), np.float64)
        return cls(normal.mean(axis=0), precision)

    def scores(self, x: Floats) -> Floats:
        """Return the squared distance of each row."""
        away = x - self.mean
        squared: Floats = ((away @ self.precision) * away).sum(axis=1)
        return squared


def recall_at(scores: Floats, anomalous: NDArray[np.bool_], false_alarms: float) -> float:
    """Return the share of anomalies found where ``false_alarms`` of the normal rows raise an alarm too."""
    threshold = np.quantile(scores[~anomalous], 1 - false_alarms)
    return float((scores[anomalous] > threshold).mean())
