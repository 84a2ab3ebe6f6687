"""What a model saw when it was made, as quantiles, for drift."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from contract.manifest import QUANTILE_PROBABILITIES, Channel, Quantiles, Reference

Floats = NDArray[np.float64]

_DIGITS = 6


def rounded(value: float) -> float:
    """Return ``value`` to a few significant digits, so that the last bits of a sum cannot reach a file."""
    return float(f"{value:.{_DIGITS}g}")


def quantiles(values: Floats) -> Quantiles:
    """Return a sample's quantiles at ``QUANTILE_PROBABILITIES``."""
    return Quantiles(tuple(rounded(float(v)) for v in np.quantile(values, QUANTILE_PROBABILITIES)))


def describe(samples: Floats, channels: Sequence[Channel], scores: Floats, alarm_rate: float) -> Reference:
    """Return the reference of ``samples`` (rows by channels, raw units) and their ``scores``."""
    return Reference(
        samples=len(samples),
        channels={c.name: quantiles(samples[:, i]) for i, c in enumerate(channels)},
        score=quantiles(scores),
        alarm_rate=rounded(alarm_rate),
    )
