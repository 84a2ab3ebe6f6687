"""The ONNX screen against the parser of the `onnx` package: two readers must not read two models."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from contract.errors import PitheadError
from inference.registry import open_session
from inference.screening.onnx import ALLOWED_DOMAINS, screen
from models import onnx_builder
from models.dense import Layer, Network

Write = Callable[[int], bytes]
GOOD = onnx_builder.build_float(Network((Layer(np.ones((2, 2)), np.zeros(2), relu=False),)), "")


def varint(value: int, pad: int = 0) -> bytes:
    """The bytes of a number, with ``pad`` more than it needs."""
    encoded = b""
    while value > 0x7F or pad:
        if value <= 0x7F:
            pad -= 1
        encoded, value = encoded + bytes([value & 0x7F | 0x80]), value >> 7
    return encoded + bytes([value])


def high(key: int) -> bytes:
    """A key of five bytes with bit 32 set, which protobuf's C++ reader cuts off."""
    return varint(key | 1 << 32)


def field(number: int, content: bytes | int, key: Write = varint, length: Write = varint) -> bytes:
    if isinstance(content, int):
        return key(number << 3) + length(content)
    return key(number << 3 | 2) + length(len(content)) + content


def messages(message: Message) -> Iterator[Message]:
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for part in value if hasattr(value, "__len__") else [value]:
                yield from messages(part)


def unsafe(model: onnx.ModelProto) -> bool:
    """Whether the real parser sees what must never reach a runtime."""
    found = bool(model.functions)
    for part in messages(model):
        if isinstance(part, onnx.TensorProto):
            found |= bool(part.external_data) or part.data_location == TensorProto.EXTERNAL
        elif isinstance(part, onnx.NodeProto):
            found |= part.domain not in ALLOWED_DOMAINS
    return found


def refused(content: bytes) -> bool:
    try:
        screen(content)
    except PitheadError as error:
        if error.code not in {"package.unsafe_model", "inference.load_failed"}:
            raise
        return True
    return False


numbers = st.sampled_from([varint, varint, varint, high, lambda n: varint(n, 1), lambda n: varint(n, 3)])
Put = Callable[[int, bytes | int], bytes]
"""Writes a field in some way."""
NODE = field(1, b"x") + field(2, b"y") + field(4, b"Identity")

# Where a tensor can hide: what it makes of the graph, and of the model beside it.
PLACES: list[Callable[[Put, bytes], tuple[bytes, bytes]]] = [
    lambda put, tensor: (put(5, tensor), b""),
    lambda put, tensor: (put(15, put(1, tensor)), b""),
    lambda put, tensor: (put(15, put(2, tensor)), b""),
    lambda put, tensor: (put(1, NODE + put(5, put(5, tensor))), b""),
    lambda put, tensor: (put(1, NODE + put(5, put(10, tensor))), b""),
    lambda put, tensor: (put(1, NODE + put(5, put(22, put(1, tensor)))), b""),
    lambda put, tensor: (put(1, NODE + put(5, put(23, put(2, tensor)))), b""),
    lambda put, tensor: (put(1, NODE + put(5, put(6, put(5, tensor)))), b""),
    lambda put, tensor: (put(1, NODE + put(5, put(11, put(5, tensor)))), b""),
    lambda put, tensor: (b"", put(20, put(1, put(5, tensor)))),
    lambda put, tensor: (b"", put(20, put(2, put(5, tensor)))),
    lambda put, _: (put(1, NODE + put(7, b"com.microsoft")), b""),
    lambda put, _: (put(1, NODE + put(5, put(6, put(1, NODE + put(7, b"ai.onnx\0"))))), b""),
]


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A model written by hand with something unsafe in one place, in every way in which bytes can say it."""

    def put(number: int, content: bytes | int) -> bytes:
        return field(number, content, draw(numbers), draw(numbers))

    tensor = field(1, 2) + field(2, 1)
    if draw(st.booleans()):
        tensor += put(13, field(1, b"location") + field(2, b"secret.bin"))
    else:
        tensor += put(14, draw(st.sampled_from([1, 1 + (1 << 32), 1 + (1 << 63), (1 << 64) - (1 << 32) + 1])))
    graph, beside = draw(st.sampled_from(PLACES))(put, tensor)
    parts = [field(1, 8), field(8, field(2, 17)), put(7, graph + field(1, NODE)), beside]
    return b"".join(draw(st.permutations(parts)))


@settings(max_examples=600, suppress_health_check=[HealthCheck.filter_too_much])
@given(hostile())
def test_what_the_parser_sees_the_screen_sees(content: bytes):
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        model = None
    assume(model is not None)
    assert model is not None
    assert refused(content) or not unsafe(model)


@settings(max_examples=600, suppress_health_check=[HealthCheck.filter_too_much])
@given(hostile(), st.data())
def test_what_the_parser_sees_in_broken_bytes_the_screen_sees(content: bytes, data: st.DataObject):
    broken = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        model = onnx.ModelProto.FromString(bytes(broken))
    except DecodeError:
        return
    assert refused(bytes(broken)) or not unsafe(model)


def hidden_domain() -> bytes:
    node = field(1, b"x") + field(2, b"y") + field(4, b"Gelu") + field(7, b"com.microsoft", high)
    graph = _graph(field(1, node))
    return field(1, 8) + field(8, field(2, 17)) + field(8, field(1, b"com.microsoft") + field(2, 1)) + graph


def hidden_external() -> bytes:
    tensor = field(1, 4) + field(1, 4) + field(2, 1) + field(8, b"w")
    tensor += field(13, field(1, b"location") + field(2, b"secret.bin"), high) + field(14, 1, high)
    node = field(1, b"x") + field(1, b"w") + field(2, b"y") + field(4, b"MatMul")
    return field(1, 8) + field(8, field(2, 17)) + _graph(field(1, node) + field(5, tensor))


def _graph(parts: bytes) -> bytes:
    def value(name: str) -> bytes:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]).SerializeToString()

    return field(7, parts + field(2, b"g") + field(11, value("x")) + field(12, value("y")))


@pytest.mark.parametrize("make", [hidden_domain, hidden_external])
def test_what_the_runtime_reads_and_we_would_not_is_refused(
    make: Callable[[], bytes], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    """onnxruntime 1.32 follows such a key: it opens the file beside it, and runs the custom operator."""
    content = make()
    np.ones(16, np.float32).tofile(tmp_path / "secret.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PitheadError):
        open_session(content, "onnx")


@pytest.mark.parametrize("value", [1, (1 << 32) + 1, (1 << 64) - (1 << 32) + 1])
def test_an_enum_has_32_bits(value: int):
    tensor = field(1, 1) + field(2, 1) + field(14, value)
    with pytest.raises(PitheadError, match=r"package\.unsafe_model"):
        screen(field(7, field(5, tensor)))


@pytest.mark.parametrize(
    "added",
    [
        varint(0 << 3) + b"\x00",  # field 0
        field(2, b"name", lambda key: varint(key, 1)),
        field(2, b"name", length=lambda n: varint(n, 2)),
        field(5, 1, length=lambda n: varint(n, 8)),
        field(2, b"name", lambda key: varint(key | 1 << 35)),
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(added: bytes):
    with pytest.raises(PitheadError, match=r"inference\.load_failed"):
        screen(GOOD + added)


def test_the_runtimes_own_format_is_refused():
    """It holds custom operators and functions that no reader of ONNX sees."""
    content = field(5, 0x28) + field(2, b"ORTM-and-the-rest") + GOOD
    assert content[4:8] == b"ORTM"
    onnx.ModelProto.FromString(content)
    with pytest.raises(PitheadError, match=r"package\.unsafe_model"):
        screen(content)


def test_models_of_the_onnx_package_pass():
    weights = numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [weights],
    )
    screen(helper.make_model(graph).SerializeToString())
    screen(GOOD)
