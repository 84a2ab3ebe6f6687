"""Constants that lie beside many rows at once change no number."""

import numpy as np
import pytest

from agent.engine.window import Bounds
from contract.manifest import Channel
from inference.arithmetic import ABREAST, Abreast, normalise


@pytest.mark.parametrize("width", [1, 3, 8, 640, ABREAST + 1])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 100, 1024])
def test_rows_abreast_are_normalised_as_they_are_one_by_one(n: int, width: int):
    n = min(n, 12) if width > ABREAST else n
    random = np.random.default_rng(n)
    mean, scale = random.normal(size=width), random.uniform(0.1, 9, size=width)
    constants = Abreast(mean, scale)
    for _ in range(2):  # once made, and once kept
        rows = random.normal(scale=1e3, size=(n, width))
        abreast, (means, scales) = constants.beside(rows)
        found = normalise(abreast, means, scales, 50.0).reshape(rows.shape)
        np.testing.assert_array_equal(found, normalise(rows, mean, scale, 50.0), strict=True)


@pytest.mark.parametrize("n", [1, 2, 7, 100, 1024, 3000])
def test_a_row_is_usable_whatever_lies_beside_it(n: int):
    bounds = Bounds(tuple(Channel(f"c{i}", minimum=float(-i), maximum=float(i + 1)) for i in range(9)))
    good = np.zeros((n, 9))
    assert bounds.usable(good).all()
    bad = good.copy()
    bad[n // 2, 4], bad[0, 8] = np.nan, 9.5
    wanted = [i not in {n // 2, 0} for i in range(n)]
    assert bounds.usable(bad).tolist() == wanted
    assert bounds.usable(good).all()
