"""Bodies of REST inference: JSON, with tensors in it or in binary behind it, in any mixture.

Liberal in what it takes: unknown members and parameters pass. Strict about
every size, since each one steers a read.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Raw, Struct

from agent.engine.serve import tensors
from agent.engine.serve.requests import (
    InferRequest,
    InferResponse,
    Parameters,
    Region,
    RequestedOutput,
    SharedInput,
)
from agent.engine.serve.tensors import refuse
from contract.errors import PitheadError

MAX_TENSORS: Final = 256
MAX_JSON: Final = 32 * 1024 * 1024
"""JSON is decoded in one go while everybody waits."""
MAX_NUMBERS: Final = 2**21
"""Of an answer in JSON: they are written in one go too."""
MAX_ID: Final = 1024
_MAX_INTEGER: Final = 2**62
_MAX_DIGITS: Final = 12
_SHARED: Final = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")

_ABSENT: Final = Raw()

_RawParameters = dict[str, bool | int | float | str | None]


class _Input(Struct, gc=False):
    name: str
    shape: list[int]
    datatype: str
    parameters: _RawParameters | None = None
    data: Raw = _ABSENT


class _Output(Struct, gc=False):
    name: str
    parameters: _RawParameters | None = None


class _Body(Struct):
    inputs: list[_Input]
    id: str = ""
    parameters: _RawParameters | None = None
    outputs: list[_Output] | None = None


class _Tensor(Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class _Answer(Struct, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: list[_Tensor]
    id: str = ""
    parameters: Parameters | None = None


class Wish(NamedTuple):
    """How the client wants its outputs."""

    binary: bool
    """Unless ``by_name`` says otherwise."""
    by_name: Mapping[str, bool]


class Encoded(NamedTuple):
    """A body, and the length of its JSON part; 0 where all of it is JSON."""

    body: bytes
    header_length: int


_JSON_ONLY: Final = Wish(binary=False, by_name={})
_ALL_BINARY: Final = Wish(binary=True, by_name={})

_size: Final = attrgetter("size")
_decoder: Final = msgspec.json.Decoder(_Body)
_encoder: Final = msgspec.json.Encoder()


def decode(
    model: str, version: str, body: bytes | bytearray, header: bytes | None, *, at_once: bool = False
) -> tuple[InferRequest, Wish]:
    """Return the request; ``header`` is ``Inference-Header-Content-Length`` as it came.

    Raises ``serve.bad_request`` with the field, and ``TooMuchAtOnceError`` where it has to be ``at_once``.
    """
    data = memoryview(body)
    length = len(data) if header is None else _length(header, len(data))
    if length > MAX_JSON:
        raise PitheadError(
            "serve.too_large", f"the JSON part is {length} bytes, at most {MAX_JSON} are taken"
        )
    if at_once and length > tensors.AT_ONCE:
        raise tensors.TooMuchAtOnceError
    try:
        said = _decoder.decode(data[:length])
    except msgspec.ValidationError as error:
        raise PitheadError("serve.bad_request", str(error)) from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise PitheadError("serve.bad_request", f"the body is not JSON: {error}") from error
    if len(said.inputs) > MAX_TENSORS or len(said.outputs or ()) > MAX_TENSORS:
        raise refuse("inputs", f"more than {MAX_TENSORS} tensors")
    if len(said.id) > MAX_ID:
        raise refuse("id", f"is longer than {MAX_ID}")
    request = InferRequest(model, {}, version, said.id)
    if at_once and len(data) > tensors.AT_ONCE and any(t.datatype == "BYTES" for t in said.inputs):
        raise tensors.TooMuchAtOnceError
    _take_inputs(request, said.inputs, data, length)
    wish = _take_parameters(request, said.parameters)
    if said.outputs:
        wish = _take_outputs(request, said.outputs, wish)
    return request, wish


def _length(header: bytes, total: int) -> int:
    # int() would take signs, blanks and underscores.
    if not header.isdigit() or len(header) > _MAX_DIGITS or int(header) > total:
        raise refuse("Inference-Header-Content-Length", f"{header[:20]!r}, the body has {total} bytes")
    return int(header)


def _take_inputs(request: InferRequest, inputs: list[_Input], data: memoryview, at: int) -> None:
    taken = request.inputs
    end = len(data)
    for i, tensor in enumerate(inputs):
        field = f"inputs[{i}]"
        name = tensor.name
        if name in taken or (request.shared is not None and name in request.shared):
            raise refuse(f"{field}.name", f"{name[:100]!r} stands twice")
        parameters = tensor.parameters
        size = None if parameters is None else parameters.get("binary_data_size")
        if size is not None:
            if tensor.data is not _ABSENT:
                raise refuse(field, "has both data and binary_data_size")
            if type(size) is not int or not 0 <= size <= end - at:
                raise refuse(
                    f"{field}.parameters.binary_data_size", f"{size!r}, {end - at} bytes are left of the body"
                )
            taken[name] = tensors.from_binary(tensor.datatype, tensor.shape, data[at : at + size], field)
            at += size
        elif tensor.data is not _ABSENT:
            taken[name] = tensors.from_json(tensor.datatype, tensor.shape, tensor.data, field)
        elif parameters is not None and (region := _region(parameters, field)) is not None:
            tensors.check_shape(tensor.shape, field)
            request.shared = request.shared or {}
            request.shared[name] = SharedInput(tensor.datatype, tuple(tensor.shape), region)
        else:
            raise refuse(field, "has no data")
    if at != end:
        raise refuse("inputs", f"{end - at} bytes of the body belong to no input")


def _region(parameters: _RawParameters, field: str) -> Region | None:
    name = parameters.get(_SHARED[0])
    if name is None:
        return None
    offset, size = parameters.get(_SHARED[1], 0), parameters.get(_SHARED[2])
    if not isinstance(name, str):
        raise refuse(f"{field}.parameters.{_SHARED[0]}", "must be a text")
    for key, value in ((_SHARED[1], offset), (_SHARED[2], size)):
        if type(value) is not int or not 0 <= value < _MAX_INTEGER:
            raise refuse(f"{field}.parameters.{key}", f"{value!r} is no size")
    assert isinstance(offset, int)
    assert isinstance(size, int)
    return Region(name, offset, size)


def _take_parameters(request: InferRequest, parameters: _RawParameters | None) -> Wish:
    if not parameters:
        return _JSON_ONLY
    binary = parameters.pop("binary_data_output", None)
    for key in ("priority", "timeout"):
        value = parameters.get(key)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < _MAX_INTEGER:
            raise refuse(f"parameters.{key}", f"{value!r} is no count")
        setattr(request, "priority" if key == "priority" else "timeout_us", value)
    if parameters:
        request.parameters = {k: v for k, v in parameters.items() if v is not None}
    if binary is not None and not isinstance(binary, bool):
        raise refuse("parameters.binary_data_output", "must be true or false")
    return _ALL_BINARY if binary else _JSON_ONLY


def _take_outputs(request: InferRequest, outputs: list[_Output], wish: Wish) -> Wish:
    wanted: list[RequestedOutput] = []
    by_name: dict[str, bool] = {}
    for i, output in enumerate(outputs):
        field = f"outputs[{i}]"
        if output.name in by_name:
            raise refuse(f"{field}.name", f"{output.name[:100]!r} stands twice")
        parameters = output.parameters
        by_name[output.name] = wish.binary
        if not parameters:
            wanted.append(RequestedOutput(output.name))
            continue
        binary = parameters.get("binary_data")
        if binary is not None:
            if not isinstance(binary, bool):
                raise refuse(f"{field}.parameters.binary_data", "must be true or false")
            by_name[output.name] = binary
        classes = parameters.get("classification", 0)
        if type(classes) is not int or not 0 <= classes < _MAX_INTEGER:
            raise refuse(f"{field}.parameters.classification", f"{classes!r} is no count")
        wanted.append(RequestedOutput(output.name, classes, _region(parameters, field)))
    request.outputs = tuple(wanted)
    return Wish(wish.binary, by_name)


def takes_long(response: InferResponse, wish: Wish) -> bool:
    """Whether the answer has so many numbers in JSON, or texts, that nobody should wait for it.

    Raises ``serve.too_large`` where there are more than JSON should be used for.
    """
    if sum(map(_size, response.outputs.values())) <= tensors.AT_ONCE // 4:
        return False
    numbers = 0
    for name, array in response.outputs.items():
        if response.written is not None and name in response.written:
            continue
        if array.dtype == tensors.TEXT or not wish.by_name.get(name, wish.binary):
            numbers += array.size
    if numbers > MAX_NUMBERS:
        raise PitheadError(
            "serve.too_large",
            f"the answer has {numbers} values: ask for binary_data_output, {MAX_NUMBERS} are given in JSON",
        )
    return numbers > tensors.AT_ONCE // 4


def encode(response: InferResponse, wish: Wish) -> Encoded:
    """Return the body that answers; binary tensors follow the JSON in the outputs' order."""
    described: list[_Tensor] = []
    parts: list[bytes] = []
    for name, array in response.outputs.items():
        tensor = _Tensor(name, tensors.DATATYPE[array.dtype], array.shape)
        region = None if response.written is None else response.written.get(name)
        if region is not None:
            tensor.parameters = dict(zip(_SHARED, (region.name, region.offset, region.size), strict=True))
        elif wish.by_name.get(name, wish.binary):
            raw = tensors.to_binary(array)
            tensor.parameters = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            tensor.data = tensors.to_json(array)
        described.append(tensor)
    answer = _Answer(response.model, response.version, described, response.id)
    if response.parameters:
        answer.parameters = response.parameters
    head = _encoder.encode(answer)
    if not parts:
        return Encoded(head, 0)
    return Encoded(b"".join((head, *parts)), len(head))


class Headers:
    """Remembers the JSON parts of binary answers, which are alike from request to request.

    What they depend on is the key; at most ``MOST`` are kept.
    """

    MOST: Final = 256

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], bytes] = {}

    def encode(self, response: InferResponse, wish: Wish) -> Encoded:
        """Return what the function ``encode`` returns."""
        if (
            response.id
            or response.written is not None
            or response.parameters
            or not (wish.binary if not wish.by_name else all(wish.by_name.values()))
        ):
            return encode(response, wish)
        key: list[Any] = [response.model, response.version]
        parts: list[bytes] = [b""]
        for name, array in response.outputs.items():
            if array.dtype == tensors.TEXT:
                return encode(response, wish)
            key += (name, array.dtype, array.shape)
            parts.append(tensors.to_binary(array))
        fixed = tuple(key)
        head = self._known.get(fixed)
        if head is None:
            encoded = encode(response, wish)
            if len(self._known) >= self.MOST:
                self._known.clear()
            self._known[fixed] = encoded.body[: encoded.header_length]
            return encoded
        parts[0] = head
        return Encoded(b"".join(parts), len(head))
