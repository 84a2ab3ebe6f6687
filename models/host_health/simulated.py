"""Vital signs of healthy machines, simulated, in units of the device's own normal.

Every device fits its own mean and scale, so the network only has to know how
a healthy machine moves about its normal: together (CPU, load and pressure
follow the work; the disk follows it loosely), slowly (each sample resembles
the one before), and now and then in short bursts.
"""

import numpy as np
from numpy.typing import NDArray

from models.host_health import CHANNELS

Floats = NDArray[np.float64]

_MEMORY_OF_WORK = 0.8
_BURST_SHARE = 0.03
_BURST = 1.5
_UPWARDS = 0.8

# How strongly each channel follows work, disk traffic and network traffic; the rest is its own.
_FOLLOWS = {
    "cpu_percent": (0.8, 0.1, 0.2),
    "memory_percent": (0.3, 0.0, 0.0),
    "disk_read_log": (0.1, 0.7, 0.0),
    "disk_write_log": (0.2, 0.7, 0.1),
    "net_log": (0.2, 0.0, 0.8),
    "pressure_cpu": (0.8, 0.0, 0.0),
    "pressure_io": (0.1, 0.7, 0.0),
    "pressure_memory": (0.2, 0.2, 0.0),
    "load_per_core": (0.7, 0.2, 0.0),
}


def healthy(samples: int, random: np.random.Generator) -> Floats:
    """Return ``samples`` rows of normalised channels: mean 0, standard deviation 1 or a little below."""
    factors = _slow(random.standard_normal((samples, 3)))
    factors += _BURST * (random.random((samples, 3)) < _BURST_SHARE)
    weights = np.array([_FOLLOWS[c.name] for c in CHANNELS])
    own = np.sqrt(1 - (weights**2).sum(axis=1))
    values: Floats = factors @ weights.T + own * _slow(random.standard_normal((samples, len(CHANNELS))))
    return values


def disturbed(rows: Floats, random: np.random.Generator, low: float, high: float) -> Floats:
    """Return ``rows`` (n, window, channels), in each one to four channels moved by ``low`` to ``high``.

    In deviations, mostly upwards.
    """
    count, _, width = rows.shape
    chosen = random.random((count, width)).argsort(axis=1) < random.integers(1, 5, (count, 1))
    size = random.uniform(low, high, (count, width)) * np.where(
        random.random((count, width)) < _UPWARDS, 1, -1
    )
    moved: Floats = rows + (chosen * size)[:, None, :]
    return moved


def windows(rows: Floats, window: int, stride: int) -> Floats:
    """Return the windows (n, window, channels) of consecutive rows."""
    starts = np.arange(0, len(rows) - window + 1, stride)
    cut: Floats = rows[starts[:, None] + np.arange(window)]
    return cut


def _slow(noise: Floats) -> Floats:
    """Return first-order autoregressive series with unit variance."""
    scale = np.sqrt(1 - _MEMORY_OF_WORK**2)
    for i in range(1, len(noise)):
        noise[i] = _MEMORY_OF_WORK * noise[i - 1] + scale * noise[i]
    return noise
