"""Detectors that need no training by steps, written as dense networks.

So they are quantised, packaged, probed and run like any other model. The
score of each is the mean squared difference between input and output.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError
from models.dense import Layer, Network

Floats = NDArray[np.float64]

_DIGITS: Final = 5
"""Of weights: far above the last bits in which two BLAS libraries differ."""


def mahalanobis(normal: Floats, shrinkage: float) -> Network:
    """Return a network that scores a row with its squared Mahalanobis distance, over the number of columns.

    One layer, x - W (x - mean) with W W = inverse of the covariance, so that
    what is left of x is W (x - mean). The covariance is shrunk towards
    ``shrinkage`` times its mean variance, from 0 to 1: what hardly moved in
    ``normal`` (rows by columns) then counts less, and fits into int8.
    Raises ``config.invalid`` where nothing moves and nothing is shrunk.
    """
    width = normal.shape[1]
    covariance = np.atleast_2d(np.cov(normal.T))
    level = float(np.trace(covariance)) / width or 1.0
    shrunk = (1 - shrinkage) * covariance + shrinkage * level * np.eye(width)
    values, vectors = np.linalg.eigh(shrunk)
    if values.min() <= 0:
        raise PitheadError(
            "config.invalid", "a column is constant or depends on others: shrinkage must be > 0"
        )
    root = (vectors / np.sqrt(values)) @ vectors.T
    return Network((Layer(_rounded(np.eye(width) - root), _rounded(root @ normal.mean(axis=0)), relu=False),))


def principal(normal: Floats, components: int) -> Network:
    """Return a network that scores a row with what its largest ``components`` principal components leave.

    Two layers: onto the components, and back. Raises ``config.invalid``
    unless there are fewer components than columns.
    """
    width = normal.shape[1]
    if not 0 < components < width:
        raise PitheadError("config.invalid", f"components={components} is not between 1 and {width - 1}")
    mean = normal.mean(axis=0)
    _, vectors = np.linalg.eigh(np.atleast_2d(np.cov(normal.T)))
    main = vectors[:, -components:].T
    # A component and its negative are the same; one machine must not choose otherwise than another.
    main = main * np.sign(main[np.arange(components), np.abs(main).argmax(axis=1)])[:, None]
    down, up = _rounded(main), _rounded(main.T)
    return Network((Layer(down, _rounded(-main @ mean), relu=False), Layer(up, _rounded(mean), relu=False)))


def _rounded(values: Floats) -> Floats:
    found: Floats = np.round(values, _DIGITS) + 0.0
    return found
