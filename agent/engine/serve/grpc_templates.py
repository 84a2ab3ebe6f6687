"""Messages that are alike from request to request are taken apart and put together once.

Clients ask the same model for the same shape again and again; then all of a message but its tensor is
the same bytes. What those mean is remembered by those bytes, so an ordinary request costs a comparison
and a view, and its answer a concatenation. Whatever is not so ordinary goes through ``grpc_codec``.
"""

from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError

from agent.engine.serve import grpc_codec, tensors
from agent.engine.serve.grpc_codec import RAW, Wish
from agent.engine.serve.proto.messages import CLASSES
from agent.engine.serve.requests import NO_PARAMETERS, InferRequest, InferResponse

MOST: Final = 256
LONGEST: Final = 2048
"""Bytes before the tensor."""
FIRST: Final = 64
LARGEST: Final = 64 * 1024
"""Bytes of the tensor: beside a larger one the rest costs nothing."""
_RAW_INPUT: Final = 7
_RAW_OUTPUT: Final = 6
_BYTES: Final = 2
"""Protobuf's wire type of texts and bytes."""

_OTHER: Final = bytes(byte ^ 0xFF for byte in range(256))

_Request: Final = CLASSES["ModelInferRequest"]
_Response: Final = CLASSES["ModelInferResponse"]


class _Known(NamedTuple):
    """What stands before the only tensor of a request, and what it says."""

    head: bytes
    request: InferRequest
    wish: Wish
    name: str
    datatype: str
    shape: tuple[int, ...]


class Templates:
    """At most ``MOST`` of each direction are kept."""

    def __init__(self) -> None:
        self._requests: dict[tuple[int, bytes], _Known] = {}
        """By the message's length and its first bytes, where the model's name is: the last one of them."""
        self._answers: dict[tuple[Any, ...], list[bytes]] = {}

    def decode(self, data: bytes) -> tuple[InferRequest, Wish]:
        """Return what ``grpc_codec.decode`` returns; raises ``TooMuchAtOnceError`` as it does."""
        known = self._requests.get((len(data), data[:FIRST]))
        if known is None or not data.startswith(known.head):
            return self._learn(data)
        said = known.request
        raw = memoryview(data)[len(known.head) :]
        array = tensors.from_binary(known.datatype, known.shape, raw, "inputs[0]")
        request = InferRequest(
            said.model,
            {known.name: array},
            said.version,
            "",
            said.outputs,
            said.parameters,
            None,
            said.priority,
            said.timeout_us,
        )
        return request, known.wish

    def _learn(self, data: bytes) -> tuple[InferRequest, Wish]:
        request, wish = grpc_codec.decode(data, at_once=True)
        if len(data) > LONGEST + LARGEST:
            return request, wish
        if not request.id and request.shared is None and len(request.inputs) == 1:
            said = _Request.FromString(data)
            raw = said.raw_input_contents[0] if said.raw_input_contents else b""
            at = len(data) - len(raw)
            if raw and at <= LONGEST and _is_last(data, at, raw):
                if len(self._requests) >= MOST:
                    self._requests.clear()
                tensor = said.inputs[0]
                self._requests[len(data), data[:FIRST]] = _Known(
                    data[:at],
                    InferRequest(
                        request.model,
                        {},
                        request.version,
                        "",
                        request.outputs,
                        request.parameters,
                        None,
                        request.priority,
                        request.timeout_us,
                    ),
                    wish,
                    tensor.name,
                    tensor.datatype,
                    tuple(tensor.shape),
                )
        return request, wish

    def encode(self, response: InferResponse, wish: Wish = RAW) -> bytes:
        """Return what ``grpc_codec.encode`` returns, perhaps with its fields in another order."""
        plain = response.parameters is NO_PARAMETERS and response.written is None
        if wish is not RAW or not plain or not response.outputs:
            return grpc_codec.encode(response, wish)
        key: list[Any] = [response.model, response.version]
        raws: list[bytes] = []
        for name, array in response.outputs.items():
            if array.dtype == tensors.TEXT:
                return grpc_codec.encode(response)
            key += (name, array.dtype, array.shape)
            raws.append(tensors.to_binary(array))
        fixed = tuple(key)
        heads = self._answers.get(fixed)
        if heads is None:
            if len(self._answers) >= MOST:
                self._answers.clear()
            heads = self._answers[fixed] = _heads(response, raws)
        parts: list[bytes] = []
        for head, raw in zip(heads, raws, strict=True):
            parts += (head, raw)
        if response.id:
            parts.append(_Response(id=response.id).SerializeToString())
        return b"".join(parts)


def _heads(response: InferResponse, raws: list[bytes]) -> list[bytes]:
    """Return what stands before each tensor: before the first one all that the answer says."""
    made = _Response(model_name=response.model, model_version=response.version)
    for name, array in response.outputs.items():
        made.outputs.add(name=name, datatype=tensors.DATATYPE[array.dtype], shape=array.shape)
    said: bytes = made.SerializeToString()
    heads = [_tag(_RAW_OUTPUT) + _varint(len(raw)) for raw in raws]
    return [said + heads[0], *heads[1:]] if heads else []


def _is_last(data: bytes, at: int, raw: bytes) -> bool:
    """Return whether the bytes from ``at`` on are the only raw tensor, and nothing else."""
    if not data[:at].endswith(_tag(_RAW_INPUT) + _varint(len(raw))):
        return False
    other = raw.translate(_OTHER)
    try:
        return list(_Request.FromString(data[:at] + other).raw_input_contents) == [other]
    except DecodeError:
        return False


def _tag(number: int) -> bytes:
    return bytes([number << 3 | _BYTES])


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
