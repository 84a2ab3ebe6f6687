"""The sketch keeps its stated relative error, also after merging."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import codec
from contract.messages import Sketch
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
