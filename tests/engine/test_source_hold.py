"""Rows out of values that come when they change, with times that the test gives."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.sources.hold import MAX_BEHIND_US, MAX_PENDING, Due, Hold

T0 = 1_700_000_000_000_000
MS = 1000


def hold(width: int = 2, *, delay_ms: int = 0, max_age_ms: int | None = None) -> Hold:
    """Rows each 100 ms."""
    return Hold("test", width, 10.0, delay_ms * MS, None if max_age_ms is None else max_age_ms * MS)


def values(due: Due) -> list[list[float]]:
    return [[v if not math.isnan(v) else -1.0 for v in row] for _, row in due.rows]


def test_nothing_comes_before_the_first_value():
    assert hold().due(T0) == Due([])


def test_a_value_stands_until_the_next():
    held = hold()
    held.put(0, 1.0, T0, T0)
    held.put(1, 5.0, T0, T0)
    held.put(0, 2.0, T0 + 150 * MS, T0 + 150 * MS)
    due = held.due(T0 + 300 * MS)
    assert [t - T0 for t, _ in due.rows] == [100 * MS, 200 * MS, 300 * MS]
    assert values(due) == [[1, 5], [2, 5], [2, 5]]
    assert (due.lost, due.gap) == (0, False)


def test_a_channel_without_a_value_and_a_bad_value_are_missing():
    held = hold()
    held.put(0, 1.0, T0, T0)
    assert values(held.due(T0 + 100 * MS)) == [[1, -1]]
    held.put(1, math.nan, T0 + 150 * MS, T0 + 150 * MS)
    held.put(1, 4.0, T0 + 250 * MS, T0 + 250 * MS)
    assert values(held.due(T0 + 300 * MS)) == [[1, -1], [1, 4]]


def test_rows_wait_for_values_that_are_on_their_way():
    held = hold(1, delay_ms=200)
    held.put(0, 1.0, T0, T0)
    assert held.due(T0 + 250 * MS) == Due([])
    held.put(0, 2.0, T0 + 90 * MS, T0 + 280 * MS)
    due = held.due(T0 + 300 * MS)
    assert (values(due), due.lost) == ([[2]], 0)


def test_what_comes_after_its_row_is_late_and_stands_from_the_next():
    held = hold(1)
    held.put(0, 1.0, T0, T0)
    assert values(held.due(T0 + 200 * MS)) == [[1], [1]]
    held.put(0, 2.0, T0 + 150 * MS, T0 + 250 * MS)
    due = held.due(T0 + 300 * MS)
    assert (values(due), due.lost) == ([[2]], 1)


def test_the_first_value_may_be_old_and_an_older_one_is_lost():
    held = hold(1)
    held.put(0, 7.0, T0 - 3_600_000 * MS, T0)
    held.put(0, 8.0, T0 - 3_700_000 * MS, T0)
    due = held.due(T0 + 100 * MS)
    assert (values(due), due.lost) == ([[7]], 1)


def test_an_old_value_is_missing_where_an_age_is_given():
    held = hold(1, max_age_ms=250)
    held.put(0, 1.0, T0, T0)
    assert values(held.due(T0 + 400 * MS)) == [[1], [1], [-1], [-1]]


def test_without_times_values_are_of_now_and_never_late():
    held = hold(1)
    held.put(0, 1.0, None, T0)
    held.due(T0 + 200 * MS)
    held.put(0, 2.0, None, T0 + 200 * MS)
    due = held.due(T0 + 300 * MS)
    assert (values(due), due.lost) == ([[2]], 0)


def test_a_clock_that_is_ahead_is_said_once_and_not_believed(caplog: pytest.LogCaptureFixture):
    held = hold(1)
    for i in range(3):
        held.put(0, float(i), T0 + 3_600_000_000, T0 + i)
    assert values(held.due(T0 + 100 * MS)) == [[2]]
    assert [r.getMessage() for r in caplog.records] == ["source.clock_ahead"]


def test_while_the_sensor_is_gone_rows_are_lost_and_then_there_is_a_gap():
    held = hold(1)
    held.put(0, 1.0, T0, T0)
    held.due(T0 + 100 * MS)
    held.offline()
    due = held.due(T0 + 400 * MS)
    assert due == Due([], 3)
    held.put(0, 2.0, T0 + 450 * MS, T0 + 450 * MS)
    due = held.due(T0 + 500 * MS)
    assert (values(due), due.lost, due.gap) == ([[2]], 0, True)
    assert not held.due(T0 + 600 * MS).gap


def test_a_thread_that_did_not_run_for_long_leaves_a_gap():
    held = hold(1)
    held.put(0, 1.0, T0, T0)
    due = held.due(T0 + MAX_BEHIND_US + 1_100_000)
    assert due.gap
    assert len(due.rows) == 1
    assert due.lost == 110


def test_a_clock_that_is_set_back_starts_the_rows_again():
    held = hold(1)
    held.put(0, 1.0, T0, T0)
    held.due(T0 + 100 * MS)
    back = T0 - 3_600_000_000
    assert held.due(back) == Due([])
    due = held.due(back + 100 * MS)
    assert ([t - back for t, _ in due.rows], values(due), due.gap) == ([100 * MS], [[1]], True)
    held.put(0, 3.0, back + 150 * MS, back + 150 * MS)
    assert values(held.due(back + 200 * MS)) == [[3]]


def test_memory_is_bounded():
    held = hold(1, delay_ms=60_000)
    for i in range(MAX_PENDING + 10):
        held.put(0, float(i), T0 + i, T0 + i)
    assert held.due(T0).lost == 10


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(-500, 500), st.integers(0, 300)), max_size=60),
)
def test_rows_keep_their_rate_whatever_comes(steps: list[tuple[int, int, int]]):
    held, now, times = hold(), T0, []
    for place, off, passed in steps:
        now += passed * MS
        held.put(place, 1.0, now + off * MS, now)
        due = held.due(now)
        times += [t for t, _ in due.rows]
        assert due.lost >= 0
    assert set(np.diff(times).tolist()) <= {100 * MS}
    assert all(t <= now for t in times)
