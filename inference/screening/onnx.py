"""Refuse ONNX files that reach outside themselves.

A walk over the protobuf wire format that reads only what it needs, so that a
device can do without the ``onnx`` package, and so that external data is
refused before onnxruntime, which has followed such paths, sees the file.
Field numbers are those of ``onnx.proto``.

What two readers could read differently is refused, since the other one is the
runtime: a key above 32 bits, which protobuf cuts off; a number written with
more bytes than it needs; field 0; a file that begins as onnxruntime's own
format, in which it would not be ONNX at all.
"""

from collections.abc import Iterator
from typing import Final

from contract.errors import PitheadError

ALLOWED_DOMAINS: Final = frozenset({"", "ai.onnx", "ai.onnx.ml"})
MAX_DEPTH: Final = 32
"""Of graphs inside graphs; exporters need three or four."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_VARINT_BITS: Final = 64
_ENUM_BITS: Final = 32
_EXTERNAL: Final = 1
_OTHER_FORMAT: Final = b"ORTM"
"""In bytes 4 to 8."""

_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_TRAINING_GRAPHS: Final = (1, 2)
_GRAPH_NODE, _GRAPH_INITIALISER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 22, 23
_SPARSE_PARTS: Final = (1, 2)
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14


def screen(content: bytes) -> None:
    """Raise ``package.unsafe_model`` for external data, custom domains or local functions."""
    if content[4:8] == _OTHER_FORMAT:
        raise PitheadError("package.unsafe_model", "the file begins in the format of onnxruntime, not ONNX")
    found = False
    for number, value in _fields(memoryview(content)):
        if number == _MODEL_FUNCTIONS:
            raise PitheadError("package.unsafe_model", "the model defines functions of its own")
        if number == _MODEL_GRAPH:
            found = True
            _graph(_message(value), 0)
        if number == _MODEL_TRAINING:
            _training(_message(value))
    if not found:
        raise PitheadError("inference.load_failed", "not an ONNX model: it has no graph")


def _training(training: memoryview) -> None:
    for number, value in _fields(training):
        if number in _TRAINING_GRAPHS:
            _graph(_message(value), 0)


def _graph(graph: memoryview, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise PitheadError("package.unsafe_model", f"graphs are nested deeper than {MAX_DEPTH}")
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            _node(_message(value), depth)
        elif number == _GRAPH_INITIALISER:
            _tensor(_message(value))
        elif number == _GRAPH_SPARSE:
            _sparse(_message(value))


def _node(node: memoryview, depth: int) -> None:
    operator = domain = ""
    for number, value in _fields(node):
        if number == _NODE_ATTRIBUTE:
            _attribute(_message(value), depth)
        elif number == _NODE_OP_TYPE:
            operator = _text(value)
        elif number == _NODE_DOMAIN:
            domain = _text(value)
    if domain not in ALLOWED_DOMAINS:
        raise PitheadError(
            "package.unsafe_model",
            f"operator {operator!r} belongs to the domain {domain!r}; only standard operators are allowed",
        )


def _attribute(attribute: memoryview, depth: int) -> None:
    for number, value in _fields(attribute):
        if number in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
            _graph(_message(value), depth + 1)
        elif number in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS):
            _tensor(_message(value))
        elif number in (_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES):
            _sparse(_message(value))


def _sparse(tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number in _SPARSE_PARTS:
            _tensor(_message(value))


def _tensor(tensor: memoryview) -> None:
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL_DATA or (number == _TENSOR_DATA_LOCATION and _enum(value) == _EXTERNAL):
            raise PitheadError(
                "package.unsafe_model", "the model keeps weights in another file (external data)"
            )


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of one message; bytes are not copied."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        kind, number = key & 7, key >> 3
        if key >> 32 or not number:
            raise _broken(f"key {key}")
        value: int | memoryview
        if kind == _VARINT:
            value, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
            value, at = message[at : at + size], at + size
        elif kind == _BYTES:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            raise _broken(f"wire type {kind}")
        if at > end:
            raise _broken("cut off")
        yield number, value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, _VARINT_BITS + 6, 7):
        if at >= len(message):
            raise _broken("cut off")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the continuation bit
            if (shift and not byte) or value >> _VARINT_BITS:
                break
            return value, at
    raise _broken("a number is too long")


def _enum(value: int | memoryview) -> int | None:
    """Return a value as protobuf reads an enum, by its low bits."""
    return value & (1 << _ENUM_BITS) - 1 if isinstance(value, int) else None


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _broken("a number where a message belongs")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8", errors="replace")


def _broken(why: str) -> PitheadError:
    return PitheadError("inference.load_failed", f"not a whole ONNX file: {why}")
