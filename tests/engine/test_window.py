from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.window import Bounds, Windower
from contract.manifest import Channel


def naive(rows: Any, usable: Any, window: int, stride: int):
    """The definition, row by row: (ordinal, end, values) of each whole window."""
    found = []
    for ordinal, end in enumerate(range(window - 1, len(rows), stride)):
        start = end - window + 1
        if usable[start : end + 1].all():
            found.append((ordinal, end, rows[start : end + 1]))
    return found


@given(
    window=st.integers(1, 7),
    stride=st.integers(1, 9),
    usable=st.lists(st.integers(0, 9), max_size=60),
    cuts=st.lists(st.integers(0, 12), max_size=20),
)
def test_windows_are_the_naive_ones_however_the_rows_come(
    window: int, stride: int, usable: Any, cuts: list[int]
):
    good = np.array(usable, np.int64) > 0
    rows = np.stack([np.arange(len(good)), -np.arange(len(good))], axis=1).astype(float)
    windower = Windower(window, stride, 2)
    seen, start = [], 0
    for size in [*cuts, len(rows)]:
        part, part_good = rows[start : start + size], good[start : start + size]
        windows = windower.push(part, part_good)
        cut = windows.cut(windows.rows.astype(np.float32), window)
        seen += zip(windows.ordinals.tolist(), (windows.ends + start).tolist(), cut, strict=True)
        start += len(part)
    expected = naive(rows, good, window, stride)
    assert [s[:2] for s in seen] == [e[:2] for e in expected]
    assert all((s[2] == e[2]).all() for s, e in zip(seen, expected, strict=True))


def test_no_window_reaches_over_a_gap():
    windower = Windower(3, 1, 1)
    rows, good = np.arange(4.0)[:, None], np.ones(4, np.bool_)
    first = windower.push(rows, good)
    second = windower.push(rows + 10, good, continues=False)
    assert second.cut(second.rows.astype(np.float32), 3)[:, :, 0].tolist() == [[10, 11, 12], [11, 12, 13]]
    assert second.ordinals[0] > first.ordinals[-1] + 1, "a break in the row of windows"


@pytest.mark.parametrize("value", [-0.1, 10.1, np.nan, np.inf, -np.inf])
def test_rows_out_of_bounds_are_not_usable(value: float):
    bounds = Bounds((Channel("a", minimum=0.0, maximum=10.0), Channel("b")))
    assert bounds.usable(np.array([[5.0, 1e9], [value, 0.0], [0.0, 0.0], [10.0, 0.0]])).tolist() == [
        True,
        False,
        True,
        True,
    ]
