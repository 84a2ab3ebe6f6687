"""Messages in, requests out: every datatype in both forms, and nothing but typed errors for what is wrong."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.engine.serve import grpc_codec, tensors
from agent.engine.serve.grpc_templates import MOST, Templates
from agent.engine.serve.proto.messages import CLASSES
from agent.engine.serve.requests import InferResponse, Region
from contract.errors import PitheadError
from tests.serve.grpc_client import ONE, message

Request, Response = CLASSES["ModelInferRequest"], CLASSES["ModelInferResponse"]
VALUES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "INT8": [-128, 127],
    "INT16": [-32768, 32767],
    "INT32": [-(2**31), 2**31 - 1],
    "INT64": [-(2**63), 2**63 - 1],
    "UINT8": [0, 255],
    "UINT16": [0, 65535],
    "UINT32": [0, 2**32 - 1],
    "UINT64": [0, 2**64 - 1],
    "FP16": [-1.5, 65504.0],
    "FP32": [1.5, float("inf")],
    "FP64": [1e300, float("nan")],
    "BYTES": [b"\xff\0", "é".encode()],
}


def of(datatype: str) -> Any:
    values = np.empty(2, object)
    values[:] = VALUES[datatype]
    return values.astype(tensors.DTYPE[datatype]).reshape(1, 2)


@pytest.mark.parametrize("datatype", VALUES)
def test_each_datatype_raw_and_typed(datatype: str):
    array = of(datatype)
    raw = Request(model_name="m", raw_input_contents=[tensors.to_binary(array)])
    raw.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    found = grpc_codec.decode(raw.SerializeToString())[0].inputs["x"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    typed = Request(model_name="m")
    tensor = typed.inputs.add(name="x", datatype=datatype, shape=[1, 2])
    if datatype == "FP16":
        with pytest.raises(PitheadError, match="raw_input_contents only"):
            grpc_codec.decode(typed.SerializeToString())
        return
    getattr(tensor.contents, grpc_codec.CONTENTS[datatype]).extend(VALUES[datatype])
    typed.parameters["binary_data_output"].bool_param = False
    request, wish = grpc_codec.decode(typed.SerializeToString())
    assert request.inputs["x"].dtype == array.dtype
    np.testing.assert_array_equal(request.inputs["x"], array)
    answer = InferResponse("m", "1", request.inputs)
    said = Response.FromString(grpc_codec.encode(answer, wish))
    assert said.outputs[0].contents == tensor.contents or datatype == "FP64"  # NaN is not equal to itself
    assert not said.raw_output_contents
    assert Response.FromString(grpc_codec.encode(answer)).raw_output_contents == raw.raw_input_contents


def test_bf16_is_widened():
    said = Request(model_name="m", raw_input_contents=[b"\xc0\x3f"])
    said.inputs.add(name="x", datatype="BF16", shape=[1])
    assert grpc_codec.decode(said.SerializeToString())[0].inputs["x"].tolist() == [1.5]


def test_parameters_outputs_and_regions():
    said = message(id="seven", model_version="3")
    for key, kind, value in (
        ("priority", "uint64_param", 2),
        ("timeout", "int64_param", 5),
        ("recipe", "string_param", "B"),
        ("share", "double_param", 0.5),
        ("b", "bool_param", True),
    ):
        setattr(said.parameters[key], kind, value)
    said.parameters["nothing"].SetInParent()
    wanted = said.outputs.add(name="output")
    wanted.parameters["classification"].int64_param = 3
    wanted.parameters["shared_memory_region"].string_param = "r"
    wanted.parameters["shared_memory_byte_size"].int64_param = 100
    request, wish = grpc_codec.decode(said.SerializeToString())
    assert (request.id, request.version, request.priority, request.timeout_us) == ("seven", "3", 2, 5)
    assert request.parameters == {"priority": 2, "timeout": 5, "recipe": "B", "share": 0.5, "b": True}
    assert (request.outputs[0].classes, request.outputs[0].region) == (3, Region("r", 0, 100))
    answer = InferResponse("m", "3", {"a": ONE, "b": ONE}, "seven", {"n": 1, "t": "x"})
    answer.written = {"a": Region("r", 0, 256)}
    made = Response.FromString(grpc_codec.encode(answer, wish))
    assert list(made.raw_output_contents) == [b"", ONE.tobytes()]
    assert made.outputs[0].parameters["shared_memory_byte_size"].int64_param == 256
    assert (made.parameters["n"].int64_param, made.parameters["t"].string_param) == (1, "x")


WRONG: dict[str, tuple[Any, str]] = {
    "no model": (lambda m: m.ClearField("model_name"), "model_name"),
    "long id": (lambda m: setattr(m, "id", "x" * 2000), "id"),
    "negative shape": (lambda m: m.inputs[0].shape.__setitem__(0, -1), r"inputs\[0\].shape"),
    "huge shape": (lambda m: m.inputs[0].shape.__setitem__(0, 2**62), r"inputs\[0\].shape"),
    "datatype": (lambda m: setattr(m.inputs[0], "datatype", "FP99"), r"inputs\[0\].datatype"),
    "short": (lambda m: m.raw_input_contents.__setitem__(0, b"abc"), r"inputs\[0\]: 3 bytes"),
    "too many raw": (lambda m: m.raw_input_contents.append(b""), "raw_input_contents"),
    "both forms": (lambda m: m.inputs[0].contents.fp32_contents.append(1), r"inputs\[0\].contents"),
    "no data": (lambda m: m.ClearField("raw_input_contents"), r"inputs\[0\].contents.fp32_contents"),
    "twice": (lambda m: m.inputs.append(m.inputs[0]), r"inputs\[1\].name"),
    "output twice": (lambda m: [m.outputs.add(name="o") for _ in "12"], r"outputs\[1\].name"),
    "priority": (lambda m: setattr(m.parameters["priority"], "string_param", "x"), "parameters.priority"),
    "timeout": (lambda m: setattr(m.parameters["timeout"], "int64_param", -1), "parameters.timeout"),
    "final": (
        lambda m: setattr(m.parameters["triton_enable_empty_final_response"], "int64_param", 1),
        "parameters.triton_enable_empty_final_response",
    ),
    "classes": (
        lambda m: setattr(m.outputs.add(name="o").parameters["classification"], "double_param", 1.5),
        r"outputs\[0\].parameters.classification",
    ),
    "region": (
        lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "int64_param", 1),
        r"inputs\[0\].parameters.shared_memory_region",
    ),
    "region without size": (
        lambda m: setattr(m.inputs[0].parameters["shared_memory_region"], "string_param", "r"),
        r"inputs\[0\].parameters.shared_memory_byte_size",
    ),
    "many": (lambda m: [m.inputs.add() for _ in range(300)], "inputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str):
    change, field = WRONG[name]
    said = message()
    change(said)
    with pytest.raises(PitheadError, match=f"^serve.bad_request: {field}"):
        grpc_codec.decode(said.SerializeToString())


@pytest.mark.parametrize(("datatype", "value"), [("INT8", 128), ("INT16", -32769), ("UINT8", 256)])
def test_narrow_integers_have_limits(datatype: str, value: int):
    said = Request(model_name="m")
    tensor = said.inputs.add(name="x", datatype=datatype, shape=[1])
    getattr(tensor.contents, grpc_codec.CONTENTS[datatype]).append(value)
    with pytest.raises(PitheadError, match=f"a value is no {datatype}"):
        grpc_codec.decode(said.SerializeToString())


def flips(data: bytes, changes: list[tuple[int, int]]) -> bytes:
    made = bytearray(data)
    for at, byte in changes:
        made[at % len(made)] = byte
    return bytes(made)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4))
def test_any_bytes_are_a_request_or_a_typed_error(given_: Any):
    data = given_ if isinstance(given_, bytes) else flips(message(id="x").SerializeToString(), given_)
    try:
        request, _ = grpc_codec.decode(data)
    except PitheadError as error:
        refused = error.code
        grpc_codec.encode_failure(str(error), grpc_codec.identity_of(data))
    else:
        refused = "" if request.model else "no model"
    assert refused in {"", "serve.bad_request"}


# ---- messages that are alike


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3), st.booleans())
def test_a_template_changes_nothing(changes: list[tuple[int, int]], seen: Any):
    templates = Templates()
    if seen:
        templates.decode(message().SerializeToString())
    data = flips(message(np.flip(ONE).copy()).SerializeToString(), changes)
    results = []
    for decode in (templates.decode, templates.decode, grpc_codec.decode):
        try:
            request, wish = decode(data)
            results.append((*described(request), wish))
        except PitheadError as error:
            results.append(error.code)
    assert results[0] == results[1] == results[2]


def described(request: Any) -> tuple[Any, ...]:
    inputs = {n: (a.dtype, a.shape, a.tobytes()) for n, a in request.inputs.items()}
    return request.model, request.version, request.id, request.outputs, request.parameters, inputs


def test_a_tensor_that_only_looks_like_the_last_field_is_no_template():
    # The real tensor comes first; an unknown field behind it holds the tag and length of another one.
    real = message().SerializeToString()
    shadow = b"\x3a\x80\x02" + np.zeros(64, np.float32).tobytes()
    data = real + b"\xfa\x01" + bytes([len(shadow) % 128 | 128, len(shadow) >> 7]) + shadow
    templates = Templates()
    for _ in range(2):
        request, _ = templates.decode(data)
        assert np.array_equal(request.inputs["input"], ONE)


def test_templates_are_bounded_and_answers_alike():
    templates = Templates()
    for i in range(MOST + 50):
        x = np.zeros((i + 1, 2), np.float32)
        templates.decode(message(x).SerializeToString())
        for identity in ("", "seven"):
            answer = InferResponse("m", "1", {"a": x, "b": ONE}, identity)
            made = Response.FromString(templates.encode(answer))
            assert made == Response.FromString(grpc_codec.encode(answer))
    assert len(templates._requests) <= MOST
    assert len(templates._answers) <= MOST
    nothing = InferResponse("m", "1", {})
    assert Response.FromString(templates.encode(nothing)).model_name == "m"
