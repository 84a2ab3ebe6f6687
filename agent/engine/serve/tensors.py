"""Between the Open Inference Protocol's tensors and numpy: pure, and suspicious of every number.

The binary form is little endian, row by row; a text (BYTES) is a four-byte
length and so many bytes. JSON data may be flat or nested. BF16 has no JSON
form and no numpy type: it is taken in binary and widened to FP32, exactly.
FP16 in JSON is taken as numbers, which lose nothing on the way out.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from struct import Struct as Packed
from typing import Any, Final

import msgspec
import numpy as np

from contract.errors import PitheadError
from inference.arithmetic import DTYPES
from inference.session import Array

MAX_RANK: Final = 16
MAX_ELEMENTS: Final = 2**28
MAX_TEXTS: Final = 2**16
"""In one tensor: each is an object of its own, and costs a microsecond both ways while everybody waits."""
MAX_LISTS: Final = 2**18
"""In nested JSON data: the same."""
AT_ONCE: Final = 64 * 1024
"""Bytes of JSON or texts that are taken apart, or values put into JSON, while everybody waits."""
TEXT: Final = np.dtype(np.object_)

DTYPE: Final[Mapping[str, np.dtype[Any]]] = {
    **{name: np.dtype(dtype) for name, dtype in DTYPES.items()},
    "BYTES": TEXT,
}
"""Numpy's datatype of each of the protocol's, but for BF16."""
DATATYPE: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in DTYPE.items()}
SIZES: Final[Mapping[str, int]] = {n: d.itemsize for n, d in DTYPE.items() if n != "BYTES"} | {"BF16": 2}
"""Bytes of one element."""

_WIRE: Final[Mapping[str, np.dtype[Any]]] = {
    name: dtype.newbyteorder("<") for name, dtype in DTYPE.items() if name != "BYTES"
}
_LENGTH: Final = Packed("<I")
_BYTES_PER_TEXT: Final = 4
_LITTLE: Final = sys.byteorder == "little"


class TooMuchAtOnceError(Exception):
    """It would take milliseconds: the caller is to do it where nobody waits."""


def refuse(field: str, why: str) -> PitheadError:
    """Return the error for input that does not fit; ``field`` says where."""
    return PitheadError("serve.bad_request", f"{field}: {why}", field=field)


def check_shape(shape: Sequence[int], field: str) -> int:
    """Return the number of elements; raises ``serve.bad_request`` for a shape that nothing can have."""
    if len(shape) > MAX_RANK:
        raise refuse(f"{field}.shape", f"{len(shape)} dimensions, at most {MAX_RANK} are taken")
    most = count = 1
    for n in shape:
        if n < 0:
            raise refuse(f"{field}.shape", f"{list(shape)} has a negative dimension")
        count *= n
        most *= n or 1  # beside a dimension of 0 the others count too: numpy cannot have them
    if most > MAX_ELEMENTS:
        raise refuse(f"{field}.shape", f"more than {MAX_ELEMENTS} elements")
    return count


def check_texts(count: int, field: str) -> None:
    """Refuse more texts than one tensor may have."""
    if count > MAX_TEXTS:
        raise refuse(f"{field}.shape", f"{count} texts, at most {MAX_TEXTS} are taken in a tensor")


def check_size(datatype: str, shape: Sequence[int], size: int, field: str) -> None:
    """Refuse data of ``size`` bytes before it is read, where the shape holds something else."""
    count = check_shape(shape, field)
    each = SIZES.get(datatype)
    if each is not None and size != count * each:
        raise refuse(field, f"{size} bytes of data, {datatype} {list(shape)} has {count * each}")


def from_binary(datatype: str, shape: Sequence[int], data: bytes | memoryview, field: str) -> Array:
    """Return a read-only view of ``data``, or a new array of texts.

    Raises ``serve.bad_request`` where ``data`` is not exactly what the shape holds.
    """
    count = check_shape(shape, field)
    wire = _WIRE.get(datatype)
    if wire is None:
        if datatype == "BYTES":
            return _texts(data, count, field).reshape(shape)
        if datatype == "BF16":
            return _widened(data, count, field).reshape(shape)
        raise refuse(f"{field}.datatype", f"{datatype[:32]!r} is no datatype of the protocol")
    if len(data) != count * wire.itemsize:
        raise refuse(
            field, f"{len(data)} bytes of data, {datatype} {list(shape)} has {count * wire.itemsize}"
        )
    array = np.frombuffer(data, wire, count)
    if datatype == "BOOL" and count and array.view(np.uint8).max() > 1:
        raise refuse(field, "a BOOL is 0 or 1")
    if not _LITTLE:
        array = array.astype(DTYPE[datatype])
    return array.reshape(shape)


def to_binary(array: Array) -> bytes:
    """Return the binary form."""
    if array.dtype == TEXT:
        parts: list[bytes] = []
        for text in array.ravel():
            raw = text if isinstance(text, bytes) else str(text).encode()
            parts += (_LENGTH.pack(len(raw)), raw)
        return b"".join(parts)
    if not _LITTLE:
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()


def _texts(data: bytes | memoryview, count: int, field: str) -> Array:
    check_texts(count, field)
    if count * _BYTES_PER_TEXT > len(data):
        raise refuse(field, f"{len(data)} bytes of data cannot hold {count} texts")
    view = memoryview(data)
    texts = np.empty(count, TEXT)
    at = 0
    for i in range(count):
        start = at + _BYTES_PER_TEXT
        if start > len(view):
            raise refuse(field, f"the data ends before text {i} of {count}")
        at = start + _LENGTH.unpack_from(view, at)[0]
        if at > len(view):
            raise refuse(field, f"text {i} of {count} is longer than what is left of the data")
        texts[i] = bytes(view[start:at])
    if at != len(view):
        raise refuse(field, f"{len(view) - at} bytes are left after {count} texts")
    return texts


def _widened(data: bytes | memoryview, count: int, field: str) -> Array:
    if len(data) != 2 * count:
        raise refuse(field, f"{len(data)} bytes of data, {count} BF16 values are {2 * count}")
    halves = np.frombuffer(data, "<u2", count).astype(np.uint32)
    return (halves << np.uint32(16)).view(np.float32)


# --- JSON

_flat_floats: Final = msgspec.json.Decoder(list[float])
_anything: Final = msgspec.json.Decoder()


def from_json(datatype: str, shape: Sequence[int], data: msgspec.Raw, field: str) -> Array:
    """Return the array that JSON ``data``, flat or nested, holds.

    Raises ``serve.bad_request`` for values of another kind, out of range, or not as many as the shape has.
    """
    count = check_shape(shape, field)
    dtype = DTYPE.get(datatype)
    if dtype is None:
        why = "BF16 is taken in binary only" if datatype == "BF16" else "is no datatype of the protocol"
        raise refuse(f"{field}.datatype", f"{datatype[:32]!r}: {why}")
    if dtype == TEXT:
        check_texts(count, field)
    field = f"{field}.data"
    make = _MAKERS[dtype.kind]
    if dtype.kind == "f":
        try:
            values: list[Any] = _flat_floats.decode(data)
            make = _narrowed
        except (msgspec.MsgspecError, RecursionError):
            values = _flat(shape, data, dtype, field)  # nested, or wrong: the slow way says where
    else:
        values = _flat(shape, data, dtype, field)
    if len(values) != count:
        raise refuse(field, f"{len(values)} values, the shape {list(shape)} has {count}")
    return make(values, dtype, field).reshape(shape)


def _flat(shape: Sequence[int], data: msgspec.Raw, dtype: np.dtype[Any], field: str) -> list[Any]:
    if dtype != TEXT and bytes(data).count(b"[") > MAX_LISTS:
        raise refuse(field, f"is nested into more than {MAX_LISTS} arrays: send it flat")
    try:
        values = _anything.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise refuse(field, str(error)) from error
    if not isinstance(values, list):
        if shape:
            raise refuse(field, "must be an array")
        return [values]
    return _flattened(values, shape, field)


def _flattened(values: list[Any], shape: Sequence[int], field: str) -> list[Any]:
    """Return a nested array's values; what is nested must be nested as the shape says."""
    if not any(isinstance(v, list) for v in values):
        return values
    for depth, wanted in enumerate(shape[:-1]):
        if len(values) != math.prod(shape[: depth + 1]):
            raise refuse(field, f"is not nested as the shape {list(shape)}, see dimension {depth}")
        flat: list[Any] = []
        for inner in values:
            if not isinstance(inner, list) or len(inner) != shape[depth + 1]:
                raise refuse(field, f"is not nested as the shape {list(shape)}, see dimension {depth + 1}")
            flat += inner
        values = flat
        if wanted == 0:
            break
    if any(isinstance(v, list) for v in values):
        raise refuse(field, f"is nested deeper than the shape {list(shape)}")
    return values


def _floats(values: list[Any], dtype: np.dtype[Any], field: str) -> Array:
    for i, v in enumerate(values):
        if type(v) is not float and (isinstance(v, bool) or not isinstance(v, int | float)):
            raise refuse(f"{field}[{i}]", "must be a number")
    return _narrowed(values, dtype, field)


def _narrowed(values: list[Any], dtype: np.dtype[Any], field: str) -> Array:
    try:
        wide = np.array(values, np.float64)
    except OverflowError as error:
        raise refuse(field, "a number is too large") from error
    if dtype == np.float64:
        return wide
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    # JSON has no infinity, so one can only be made here.
    if not np.isfinite(narrow).all():
        raise refuse(field, f"a number is too large for {DATATYPE[dtype]}")
    return narrow


def _integers(values: list[Any], dtype: np.dtype[Any], field: str) -> Array:
    limits = np.iinfo(dtype)
    low, high = int(limits.min), int(limits.max)
    for i, v in enumerate(values):
        if type(v) is not int:
            raise refuse(f"{field}[{i}]", "must be an integer")
        if not low <= v <= high:
            raise refuse(f"{field}[{i}]", f"{v if abs(v) < 2**64 else 'it'} is no {DATATYPE[dtype]}")
    return np.array(values, dtype)


def _bools(values: list[Any], dtype: np.dtype[Any], field: str) -> Array:
    for i, v in enumerate(values):
        if v is not True and v is not False and v not in (0, 1):
            raise refuse(f"{field}[{i}]", "must be true or false")
    return np.array(values, dtype)


def _strings(values: list[Any], _dtype: np.dtype[Any], field: str) -> Array:
    texts = np.empty(len(values), TEXT)
    for i, v in enumerate(values):
        if not isinstance(v, str):
            raise refuse(f"{field}[{i}]", "must be a text")
        texts[i] = v.encode()
    return texts


_MAKERS: Final[Mapping[str, Callable[[list[Any], np.dtype[Any], str], Array]]] = {
    "f": _floats,
    "i": _integers,
    "u": _integers,
    "b": _bools,
    "O": _strings,
}


def to_json(array: Array) -> list[Any]:
    """Return the values, flat. NaN and infinity become null when this is encoded: JSON has no other word."""
    if array.dtype == TEXT:
        return [v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.ravel()]
    return array.ravel().tolist()
