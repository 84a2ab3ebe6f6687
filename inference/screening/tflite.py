"""Refuse TFLite files with custom operators, and what is no whole TFLite file.

Reads the flatbuffer's operator codes and little else. Slots are those of
``schema.fbs``: Model.{operator_codes, subgraphs, external_buffer_groups,
external_buffers}, OperatorCode.{deprecated_builtin_code, custom_code, builtin_code}.
"""

import struct
from typing import Final

from contract.errors import PitheadError

_IDENTIFIER: Final = b"TFL3"
_MODEL_OPERATOR_CODES: Final = 1
_MODEL_SUBGRAPHS: Final = 2
_MODEL_EXTERNAL: Final = (8, 9)
_CODE_OLD, _CODE_CUSTOM, _CODE_BUILTIN = 0, 1, 3
_BUILTIN_CUSTOM: Final = 32
MAX_OPERATORS: Final = 1000
"""Kinds of operators in one file; the schema knows about 200."""


def screen(content: bytes) -> None:
    """Raise ``package.unsafe_model`` for a custom operator, ``inference.load_failed`` for a broken file."""
    if content[4:8] != _IDENTIFIER:
        raise PitheadError("inference.load_failed", "not a TFLite file: its identifier is not TFL3")
    try:
        _operators(content)
    except (struct.error, IndexError, ValueError) as error:
        raise PitheadError("inference.load_failed", "not a whole TFLite file") from error


def graphs(content: bytes) -> int:
    """Return how many graphs a model has: loops and branches are graphs beside the first.

    Raises ``inference.load_failed`` for what is no whole model.
    """
    try:
        field = _slot(content, _u32(content, 0), _MODEL_SUBGRAPHS)
        return _u32(content, field + _u32(content, field)) if field else 0
    except (struct.error, IndexError, ValueError) as error:
        raise PitheadError("inference.load_failed", "not a whole TFLite file") from error


def _operators(content: bytes) -> None:
    root = _u32(content, 0)
    if not _slot(content, root, _MODEL_SUBGRAPHS):
        raise PitheadError("inference.load_failed", "not a TFLite model: it has no graph")
    for slot in _MODEL_EXTERNAL:
        field = _slot(content, root, slot)
        if field and _u32(content, field + _u32(content, field)):
            raise PitheadError(
                "package.unsafe_model", "the model keeps weights in another file (external buffers)"
            )
    vector = _slot(content, root, _MODEL_OPERATOR_CODES)
    if not vector:
        return
    vector += _u32(content, vector)
    count = _u32(content, vector)
    if count > MAX_OPERATORS:
        raise PitheadError("inference.load_failed", f"{count} kinds of operators")
    for i in range(count):
        entry = vector + 4 + 4 * i
        code = entry + _u32(content, entry)
        custom = _slot(content, code, _CODE_CUSTOM)
        old, new = _slot(content, code, _CODE_OLD), _slot(content, code, _CODE_BUILTIN)
        builtin = max(
            struct.unpack_from("<b", content, old)[0] if old else 0,
            struct.unpack_from("<i", content, new)[0] if new else 0,
        )
        if custom or builtin == _BUILTIN_CUSTOM:
            name = _string(content, custom) if custom else "?"
            raise PitheadError(
                "package.unsafe_model", f"operator {name!r} is custom; only standard operators are allowed"
            )


def _slot(content: bytes, table: int, slot: int) -> int:
    """Return where the field of a table lies, or 0 when it is absent."""
    vtable = table - struct.unpack_from("<i", content, table)[0]
    if vtable < 0:
        raise ValueError(vtable)
    size: int = struct.unpack_from("<H", content, vtable)[0]
    at = 4 + 2 * slot
    if at + 2 > size:
        return 0
    offset: int = struct.unpack_from("<H", content, vtable + at)[0]
    return table + offset if offset else 0


def _string(content: bytes, field: int) -> str:
    at = field + _u32(content, field)
    return content[at + 4 : at + 4 + min(_u32(content, at), 100)].decode("utf-8", errors="replace")


def _u32(content: bytes, at: int) -> int:
    value: int = struct.unpack_from("<I", content, at)[0]
    return value
