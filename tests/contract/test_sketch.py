"""The sketch keeps its stated relative error, also after merging."""

import contextlib
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import codec
from contract.errors import PitheadError
from contract.messages import MAX_BINS, Sketch
from contract.sketch import ACCURACY, SketchBuilder, merge, quantile

values = st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6)


def build(numbers: list[float]) -> Sketch:
    builder = SketchBuilder()
    for number in numbers:
        builder.add(number)
    return builder.build()


@given(st.lists(values, min_size=1, max_size=200), st.floats(0, 1))
def test_a_quantile_is_within_the_stated_error(numbers: list[float], q: float):
    exact = float(np.quantile(numbers, q, method="lower"))
    got = quantile(build(numbers), q)
    assert got is not None
    assert abs(got - exact) <= ACCURACY * abs(exact) + 1e-9


@given(st.lists(st.lists(values, max_size=50), max_size=6))
def test_merging_equals_building_at_once(parts: list[list[float]]):
    merged = merge(build(part) for part in parts)
    at_once = build([x for part in parts for x in part])
    assert (merged.bins, merged.negative, merged.zeros) == (at_once.bins, at_once.negative, at_once.zeros)
    assert (merged.count, merged.minimum, merged.maximum) == (at_once.count, at_once.minimum, at_once.maximum)
    assert math.isclose(merged.total, at_once.total, rel_tol=1e-9, abs_tol=1e-6)


@given(st.lists(values, max_size=50))
def test_a_sketch_survives_the_wire(numbers: list[float]):
    sketch = build(numbers)
    assert codec.decode(codec.encode(sketch), Sketch) == sketch


def test_an_empty_sketch_has_no_quantile():
    assert quantile(build([]), 0.5) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_only_finite_values_are_taken(bad: float):
    with pytest.raises(ValueError, match="finite"):
        SketchBuilder().add(bad)


def test_different_accuracies_do_not_mix():
    with pytest.raises(ValueError, match="accuracy"):
        SketchBuilder(0.01).merge(SketchBuilder(0.02).build())


def test_too_many_bins_are_put_together_from_below():
    numbers = [10.0 ** (n / 20) for n in range(-170, 5800)]
    sketch = build(numbers)
    assert len(sketch.bins) == MAX_BINS
    assert sum(sketch.bins.values()) == sketch.count == len(numbers)
    assert codec.decode(codec.encode(sketch), Sketch) == sketch
    got = quantile(sketch, 0.9)
    assert got is not None
    assert got == pytest.approx(np.quantile(numbers, 0.9, method="lower"), rel=ACCURACY * 1.001)


numbers_of_a_stranger = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just(1.0)


@given(
    st.fixed_dictionaries(
        {"accuracy": numbers_of_a_stranger | st.floats(0, 1)},
        optional={
            "bins": st.dictionaries(
                st.integers().map(str) | st.integers(-(2**22), 2**22).map(str), st.integers(0)
            ),
            "negative": st.dictionaries(st.integers(-(2**23), 2**23).map(str), st.integers(0, 9)),
            "zeros": st.integers(0, 2**70),
            "count": st.integers(0, 2**63),
            "total": numbers_of_a_stranger,
            "minimum": numbers_of_a_stranger,
            "maximum": numbers_of_a_stranger,
        },
    ),
    st.floats(0, 1),
)
def test_whatever_decodes_has_finite_quantiles(given: dict[str, object], q: float):
    """A sketch of a stranger is refused or can be calculated with; it must never stop an ingest."""
    got: float | None = None
    with contextlib.suppress(PitheadError):
        got = quantile(codec.decode(json.dumps(given).encode(), Sketch), q)
    assert got is None or math.isfinite(got)


@pytest.mark.parametrize(
    "wrong",
    [
        {"accuracy": 1.0, "bins": {"1": 1}, "count": 1},
        {"accuracy": 2.0},
        {"accuracy": -1.0},
        {"accuracy": 0.01, "bins": {"100000000": 1}},
        {"accuracy": 0.01, "negative": {"-100000000": 1}},
        {"accuracy": 0.01, "bins": {str(n): 1 for n in range(MAX_BINS + 1)}},
        {"accuracy": 0.01, "total": 1e301},
        {"accuracy": 0.01, "count": 2**63},
    ],
)
def test_a_sketch_that_no_device_makes_is_refused(wrong: dict[str, object]):
    with pytest.raises(PitheadError, match=r"message\.malformed"):
        codec.decode(json.dumps(wrong).encode(), Sketch)


@pytest.mark.parametrize("index", [-(2**22), 2**22])
@pytest.mark.parametrize("accuracy", [0.0001, 0.5])
def test_the_outermost_bins_have_a_value(index: int, accuracy: float):
    got = quantile(Sketch(accuracy=accuracy, bins={index: 1}, negative={}, count=1), 1.0)
    assert got is not None
    assert math.isfinite(got)
