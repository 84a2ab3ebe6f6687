"""What gRPC puts into HTTP/2: fields of a call, messages with a length before them, blocks that answer. Pure.

After https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from typing import Final

from msgspec import Struct

from agent.engine.serve import compression
from agent.engine.serve.http2_frames import literal
from agent.engine.serve.http2_headers import MalformedError, fields_of
from contract.errors import PitheadError

PREFIX: Final = 5
"""Bytes before a message: whether it is compressed, and its length."""
CODES: Final = {
    name: code
    for code, name in enumerate(
        (
            *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND"),
            *("ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED"),
            *("OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
        )
    )
}
_STATUS_200: Final = b"\x88"
"""The field's index in HPACK's own table."""
HEAD: Final = (
    _STATUS_200
    + literal(b"content-type", b"application/grpc")
    + literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
)
OK: Final = literal(b"grpc-status", b"0")
WRONG_TYPE: Final = b"\x10\x07:status\x03415"
_UNIT_S: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_DIGITS: Final = 8
_PLAIN: Final = frozenset(range(0x20, 0x7F)) - {0x25}


class Head(Struct, frozen=True):
    """The fields of a call."""

    path: str
    authorization: bytes | None
    timeout_s: float | None
    encoding: bytes
    """Of messages that say that they are compressed."""
    strict: bool
    """A stream is to end with the status of the first request that fails."""
    grpc: bool
    """It is a call at all."""


def head_of(fields: list[tuple[bytes, bytes]]) -> Head:
    """Return what a call's fields say; raises ``MalformedError``."""
    said = fields_of(fields)
    kind = said.get(b"content-type", b"")
    return Head(
        said[b":path"].decode("latin-1"),
        said.get(b"authorization"),
        timeout_of(said.get(b"grpc-timeout")),
        said.get(b"grpc-encoding", b"identity"),
        said.get(b"triton_grpc_error") == b"true",
        said[b":method"] == b"POST" and (kind == b"application/grpc" or kind[:17] in _KINDS),
    )


_KINDS: Final = {b"application/grpc+", b"application/grpc;"}


def timeout_of(said: bytes | None) -> float | None:
    """Return ``grpc-timeout`` in seconds; raises ``MalformedError``."""
    if said is None:
        return None
    unit = _UNIT_S.get(said[-1:])
    if unit is None or not said[:-1].isdigit() or len(said) > _DIGITS + 1:
        raise MalformedError
    return int(said[:-1]) * unit


def trailers(status: str, words: str, pushback_ms: int | None) -> bytes:
    """Return the block that ends a call that failed."""
    made = literal(b"grpc-status", b"%d" % CODES[status]) + literal(b"grpc-message", escaped(words))
    if pushback_ms is not None:
        made += literal(b"grpc-retry-pushback-ms", b"%d" % pushback_ms)
    return made


def escaped(words: str) -> bytes:
    """Return words as ``grpc-message`` carries them: UTF-8, percent-encoded where not plain."""
    data = words.encode("utf-8", "replace")
    return b"".join(bytes((byte,)) if byte in _PLAIN else b"%%%02X" % byte for byte in data)


def framed(data: bytes) -> bytes:
    """Return a message with its length before it."""
    return b"\0" + len(data).to_bytes(4, "big") + data


class Messages:
    """Takes messages out of the pieces in which they come."""

    __slots__ = ("_at", "_buffer", "_most")

    def __init__(self, most: int) -> None:
        self._buffer: bytes | bytearray = b""
        self._at = 0
        """Where what is not taken out begins."""
        self._most = most

    @property
    def waiting(self) -> int:
        """Bytes of a message that has not come whole."""
        return len(self._buffer) - self._at

    @property
    def surplus(self) -> bool:
        """Whether there is more than one message."""
        size = self._checked()
        return size is not None and self.waiting > PREFIX + size

    def feed(self, piece: bytes) -> None:
        """Take a piece; raises ``serve.too_large``."""
        held = self._buffer
        if self._at == len(held):
            self._buffer = piece
        elif isinstance(held, bytes):
            self._buffer = bytearray(memoryview(held)[self._at :]) + piece
        else:
            del held[: self._at]
            held += piece
        self._at = 0
        self._checked()

    def next(self) -> tuple[bool, bytes] | None:
        """Return the next message, and whether it is compressed; None where it is not whole."""
        size = self._checked()
        if size is None:
            return None
        held, at = self._buffer, self._at
        end = at + PREFIX + size
        if end > len(held):
            return None
        message = (
            held[at + PREFIX : end] if isinstance(held, bytes) else bytes(memoryview(held)[at + PREFIX : end])
        )
        compressed = bool(held[at])
        if end == len(held):
            self._buffer, self._at = b"", 0
        else:
            self._at = end
        return compressed, message

    def _checked(self) -> int | None:
        """Return the size that the next message says of itself; raises ``serve.too_large``."""
        held, at = self._buffer, self._at
        if len(held) < at + PREFIX:
            return None
        if held[at] > 1:
            raise PitheadError("serve.bad_request", "the message's first byte is neither 0 nor 1")
        size = int.from_bytes(held[at + 1 : at + PREFIX], "big")
        if size > self._most:
            raise PitheadError(
                "serve.too_large", f"a message of {size} bytes, at most {self._most} are taken"
            )
        return size


def inflated(data: bytes, encoding: bytes, most: int) -> bytes:
    """Return a message that was compressed; raises ``serve.unsupported``, ``serve.too_large``."""
    if encoding not in {b"gzip", b"deflate"}:
        raise PitheadError(
            "serve.unsupported", f"grpc-encoding {encoding[:50]!r}: gzip and deflate are taken"
        )
    return compression.inflate(data, encoding, most)
