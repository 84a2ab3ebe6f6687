"""Inference over gRPC: messages into requests, answers into messages. Pure.

Raw tensors are views of the message's bytes and are copied once, into the answer. Answers are raw,
as Triton's are, whatever form the inputs had; ``binary_data_output: false`` among the request's
parameters asks for typed ``contents``.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from agent.engine.serve import tensors
from agent.engine.serve.codec import MAX_ID, MAX_TENSORS
from agent.engine.serve.proto.messages import CLASSES
from agent.engine.serve.requests import (
    NO_PARAMETERS,
    InferRequest,
    InferResponse,
    Parameter,
    Region,
    RequestedOutput,
    SharedInput,
)
from agent.engine.serve.tensors import refuse
from contract.errors import PitheadError
from inference.session import Array

Wire = Any
"""A message of ``proto``."""

_MAX_INTEGER: Final = 2**62
_SHARED: Final = ("shared_memory_region", "shared_memory_offset", "shared_memory_byte_size")
_FINAL: Final = ("triton_enable_empty_final_response", "triton_final_response")

CONTENTS: Final[Mapping[str, str]] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Which list of ``contents`` a datatype is in; FP16 and BF16 travel raw only."""

_Request: Final = CLASSES["ModelInferRequest"]
_Response: Final = CLASSES["ModelInferResponse"]
_StreamResponse: Final = CLASSES["ModelStreamInferResponse"]


class Wish(NamedTuple):
    """How the client wants its answer."""

    raw: bool = True
    final: bool = False
    """It is to be marked as the last one to its request."""


RAW: Final = Wish()


def decode(data: bytes, *, at_once: bool = False) -> tuple[InferRequest, Wish]:
    """Return the request; raises ``serve.bad_request`` with the field.

    Raises ``TooMuchAtOnceError`` where it has to be ``at_once``.
    """
    large = len(data) > tensors.AT_ONCE
    try:
        said = _Request.FromString(data)
    except DecodeError as error:
        raise PitheadError("serve.bad_request", f"the message is no ModelInferRequest: {error}") from error
    name, identity = said.model_name, said.id
    if not name:
        raise refuse("model_name", "is missing")
    if len(identity) > MAX_ID:
        raise refuse("id", f"is longer than {MAX_ID}")
    inputs, outputs = said.inputs, said.outputs
    if len(inputs) > MAX_TENSORS or len(outputs) > MAX_TENSORS:
        raise refuse("inputs", f"more than {MAX_TENSORS} tensors")
    if at_once and large and any(t.datatype == "BYTES" or t.HasField("contents") for t in inputs):
        raise tensors.TooMuchAtOnceError
    request = InferRequest(name, {}, said.model_version, identity)
    _take_inputs(request, inputs, said.raw_input_contents)
    wish = _take_parameters(request, said.parameters) if said.parameters else RAW
    if outputs:
        _take_outputs(request, outputs)
    return request, wish


def identity_of(data: bytes) -> str:
    """Return the id of a request that may be wrong in all else, cut to what an answer may carry."""
    try:
        return str(_Request.FromString(data).id)[:MAX_ID]
    except DecodeError:
        return ""


def _take_inputs(request: InferRequest, inputs: Wire, raw: Wire) -> None:
    taken = request.inputs
    at, there = 0, len(raw)
    for i, tensor in enumerate(inputs):
        field = f"inputs[{i}]"
        name, shape = tensor.name, tuple(tensor.shape)
        if name in taken or (request.shared is not None and name in request.shared):
            raise refuse(f"{field}.name", f"{name[:100]!r} stands twice")
        region = _region(tensor.parameters, field) if tensor.parameters else None
        typed = tensor.HasField("contents")
        if region is not None:
            if typed:
                raise refuse(f"{field}.contents", "the input lies in shared memory")
            tensors.check_shape(shape, field)
            request.shared = request.shared or {}
            request.shared[name] = SharedInput(tensor.datatype, shape, region)
        elif there:
            if typed:
                raise refuse(f"{field}.contents", "must be empty where raw_input_contents are given")
            if at == there:
                raise refuse("raw_input_contents", f"there are {there}, less than there are inputs")
            taken[name] = tensors.from_binary(tensor.datatype, shape, raw[at], field)
            at += 1
        else:
            taken[name] = _typed(tensor.datatype, shape, tensor.contents, field)
    if at != there:
        raise refuse("raw_input_contents", f"{there} are given, for {at} inputs")


def _typed(datatype: str, shape: tuple[int, ...], contents: Wire, field: str) -> Array:
    count = tensors.check_shape(shape, field)
    kind = CONTENTS.get(datatype)
    if kind is None:
        if datatype in tensors.SIZES:
            raise refuse(field, f"{datatype} travels in raw_input_contents only")
        raise refuse(f"{field}.datatype", f"{datatype[:32]!r} is no datatype of the protocol")
    values = getattr(contents, kind)
    field = f"{field}.contents.{kind}"
    if len(values) != count:
        raise refuse(field, f"has {len(values)} values, the shape {list(shape)} holds {count}")
    dtype = tensors.DTYPE[datatype]
    if dtype == tensors.TEXT:
        tensors.check_texts(count, field)
        texts = np.empty(count, tensors.TEXT)
        texts[:] = list(values)
        return texts.reshape(shape)
    if dtype.kind in "iu" and dtype.itemsize < 4:  # noqa: PLR2004 - narrower than what they travel in
        wide = np.fromiter(values, np.int64, count)
        limits = np.iinfo(dtype)
        if count and (wide.min() < limits.min or wide.max() > limits.max):
            raise refuse(field, f"a value is no {datatype}")
        return wide.astype(dtype).reshape(shape)
    return np.fromiter(values, dtype, count).reshape(shape)


def _parameters(said: Wire) -> dict[str, Parameter]:
    """Return parameters as values; those that hold none are passed over."""
    found: dict[str, Parameter] = {}
    for key, value in said.items():
        which = value.WhichOneof("parameter_choice")
        if which is not None:
            found[key] = getattr(value, which)
    return found


def _region(said: Wire, field: str) -> Region | None:
    parameters = _parameters(said)
    name = parameters.get(_SHARED[0])
    if name is None:
        return None
    if not isinstance(name, str):
        raise refuse(f"{field}.parameters.{_SHARED[0]}", "must be a text")
    sizes = [
        _count(parameters.get(key, 0 if key == _SHARED[1] else None), f"{field}.parameters.{key}")
        for key in _SHARED[1:]
    ]
    return Region(name, *sizes)


def _count(value: Parameter | None, field: str) -> int:
    if type(value) is not int or not 0 <= value < _MAX_INTEGER:
        raise refuse(field, f"{value!r:.100} is no count")
    return value


def _take_parameters(request: InferRequest, said: Wire) -> Wish:
    parameters = _parameters(said)
    if "priority" in parameters:
        request.priority = _count(parameters["priority"], "parameters.priority")
    if "timeout" in parameters:
        request.timeout_us = _count(parameters["timeout"], "parameters.timeout")
    raw = parameters.pop("binary_data_output", True)
    final = parameters.pop(_FINAL[0], False)
    for value, key in ((raw, "binary_data_output"), (final, _FINAL[0])):
        if not isinstance(value, bool):
            raise refuse(f"parameters.{key}", "must be true or false")
    request.parameters = parameters
    return Wish(bool(raw), bool(final))


def _take_outputs(request: InferRequest, outputs: Wire) -> None:
    wanted: list[RequestedOutput] = []
    names: set[str] = set()
    for i, output in enumerate(outputs):
        field, name = f"outputs[{i}]", output.name
        if name in names:
            raise refuse(f"{field}.name", f"{name[:100]!r} stands twice")
        names.add(name)
        if not output.parameters:
            wanted.append(RequestedOutput(name))
            continue
        region = _region(output.parameters, field)
        classes = _parameters(output.parameters).get("classification", 0)
        wanted.append(RequestedOutput(name, _count(classes, f"{field}.parameters.classification"), region))
    request.outputs = tuple(wanted)


# ---- answers


def encode(response: InferResponse, wish: Wish = RAW) -> bytes:
    """Return the message that answers."""
    data: bytes = _answer(response, wish).SerializeToString()
    return data


def encode_streamed(response: InferResponse, wish: Wish) -> bytes:
    """Return an answer as a stream carries it."""
    data: bytes = _StreamResponse(infer_response=_answer(response, wish)).SerializeToString()
    return data


def encode_failure(words: str, identity: str) -> bytes:
    """Return what a stream carries instead of an answer."""
    made = _StreamResponse(error_message=words)
    made.infer_response.id = identity
    data: bytes = made.SerializeToString()
    return data


def _answer(response: InferResponse, wish: Wish) -> Wire:
    made = _Response(model_name=response.model, model_version=response.version)
    if response.id:
        made.id = response.id
    if response.parameters is not NO_PARAMETERS:
        for key, value in response.parameters.items():
            _set(made.parameters[key], value)
    if wish.final:
        made.parameters[_FINAL[1]].bool_param = True
    described, raws, written = made.outputs, made.raw_output_contents, response.written
    raw = wish.raw or any(tensors.DATATYPE[a.dtype] not in CONTENTS for a in response.outputs.values())
    for name, array in response.outputs.items():
        datatype = tensors.DATATYPE[array.dtype]
        tensor = described.add(name=name, datatype=datatype, shape=array.shape)
        region = None if written is None else written.get(name)
        if region is not None:
            places: tuple[Parameter, ...] = (region.name, region.offset, region.size)
            for key, place in zip(_SHARED, places, strict=True):
                _set(tensor.parameters[key], place)
            if raw:
                raws.append(b"")  # clients count: one for each output, wherever its values are
        elif raw:
            raws.append(tensors.to_binary(array))
        else:
            getattr(tensor.contents, CONTENTS[datatype]).extend(_values(array))
    return made


def _values(array: Array) -> list[Any]:
    if array.dtype == tensors.TEXT:
        return [text if isinstance(text, bytes) else str(text).encode() for text in array.ravel()]
    values: list[Any] = array.ravel().tolist()
    return values


def _set(slot: Wire, value: Parameter) -> None:
    if isinstance(value, bool):
        slot.bool_param = value
    elif isinstance(value, int):
        slot.int64_param = value
    elif isinstance(value, float):
        slot.double_param = value
    else:
        slot.string_param = value
