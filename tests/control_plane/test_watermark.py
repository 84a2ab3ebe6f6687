"""What is committed of a sequence, against the plainest model there is: a set."""

from hypothesis import given
from hypothesis import strategies as st

from control_plane.ingest.watermark import MAX_RANGES, Mark

numbers = st.integers(1, 60)


@given(st.lists(st.lists(numbers, max_size=8), max_size=12))
def test_a_mark_holds_exactly_what_was_added(batches: list[list[int]]) -> None:
    mark, model = Mark(), set[int]()
    for batch in batches:
        mark = mark.add(batch)
        model |= set(batch)
        assert {number for number in range(1, 62) if number in mark} == model
        assert mark.prefix + 1 not in model
        flat = [edge for span in mark.ranges for edge in span]
        assert flat == sorted(flat)
        assert all(first > mark.prefix + 1 for first, _last in mark.ranges)
        assert all(right[0] > left[1] + 1 for left, right in zip(mark.ranges, mark.ranges[1:], strict=False))


@given(st.sets(numbers), st.integers(0, 60))
def test_what_the_device_gave_up_is_not_waited_for(held: set[int], oldest: int) -> None:
    mark = Mark().add(held, oldest)
    assert mark.prefix >= oldest - 1
    assert {number for number in range(1, 62) if number in mark} == held | set(range(1, oldest))


def test_a_device_that_loses_every_second_record_fills_nothing_up() -> None:
    mark = Mark()
    for number in range(1, 4 * MAX_RANGES, 2):
        mark = mark.add([number])
    assert len(mark.ranges) == MAX_RANGES
    assert 4 * MAX_RANGES - 1 in mark
