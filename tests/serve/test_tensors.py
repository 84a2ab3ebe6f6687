"""Tensors of the wire and arrays: there and back, and nothing that does not fit."""

import json
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from agent.engine.serve import tensors
from contract.errors import PitheadError

NUMBERS = [name for name in tensors.DTYPE if name != "BYTES"]


def arrays(datatype: str) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    dtype = tensors.DTYPE[datatype]
    elements = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return npst.arrays(dtype, npst.array_shapes(max_dims=4, max_side=4, min_side=0), elements=elements)


@given(data=st.data(), datatype=st.sampled_from(NUMBERS))
def test_binary_there_and_back(data: st.DataObject, datatype: str):
    array = data.draw(arrays(datatype))
    back = tensors.from_binary(datatype, array.shape, tensors.to_binary(array), "x")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array)


@given(data=st.data(), datatype=st.sampled_from(NUMBERS), flat=st.booleans())
def test_json_there_and_back(data: st.DataObject, datatype: str, flat: bool):  # noqa: FBT001 - hypothesis gives it
    array = data.draw(arrays(datatype))
    values = tensors.to_json(array) if flat else array.tolist()
    back = tensors.from_json(datatype, array.shape, msgspec.Raw(msgspec.json.encode(values)), "x")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array)


@given(texts=st.lists(st.binary(max_size=20), max_size=10))
def test_texts_there_and_back(texts: list[bytes]):
    array = np.empty(len(texts), object)
    array[:] = texts
    back = tensors.from_binary("BYTES", [len(texts)], tensors.to_binary(array), "x")
    assert back.tolist() == texts


@given(data=st.binary(max_size=64), count=st.integers(0, 8))
def test_texts_of_any_bytes(data: bytes, count: int):
    try:
        texts = tensors.from_binary("BYTES", [count], data, "x")
    except PitheadError:
        return
    assert sum(len(t) + 4 for t in texts) == len(data)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "words"),
    [
        ("INT8", [1], [128], "x.data[0]"),
        ("UINT8", [2], [1, -1], "x.data[1]"),
        ("INT64", [1], [2**63], "x.data[0]"),
        ("INT32", [1], [1.5], "must be an integer"),
        ("INT32", [1], [True], "must be an integer"),
        ("BOOL", [1], [2], "true or false"),
        ("FP32", [1], [True], "must be a number"),
        ("FP32", [1], [None], "must be a number"),
        ("FP32", [1], ["1"], "must be a number"),
        ("FP16", [1], [1e6], "too large for FP16"),
        ("BYTES", [1], [1], "must be a text"),
        ("FP32", [2, 2], [[1, 2], [3]], "nested"),
        ("FP32", [2, 2], [1, 2, 3], "3 values"),
        ("FP32", [2], [[1], [2]], "nested"),
        ("FP32", [1, 1], [[[1]]], "nested deeper"),
    ],
)
def test_values_that_do_not_fit(datatype: str, shape: list[int], data: Any, words: str):
    with pytest.raises(PitheadError, match=re.escape(words)):
        tensors.from_json(datatype, shape, msgspec.Raw(json.dumps(data).encode()), "x")


def test_bf16_is_widened_exactly():
    real = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    halves = (real.view(np.uint32) >> 16).astype(np.uint16)
    assert tensors.from_binary("BF16", [2, 2], halves.tobytes(), "x").ravel().tolist() == real.tolist()


def test_what_json_cannot_say_is_null():
    values = tensors.to_json(np.array([np.nan, np.inf, 1.0], np.float32))
    assert msgspec.json.encode(values) == b"[null,null,1.0]"
