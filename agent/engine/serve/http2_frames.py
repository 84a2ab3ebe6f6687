"""The frames of HTTP/2 (RFC 9113) as bytes: numbers, and what puts a frame together. Pure."""

import struct
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD: Final = struct.Struct(">IBI")
"""Length and type in the first four bytes, flags, stream."""
HEAD_BYTES: Final = 9
PAIR: Final = struct.Struct(">HI")
NUMBER: Final = struct.Struct(">I")

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
FLOW_CONTROL_ERROR: Final = 0x3
STREAM_CLOSED: Final = 0x5
FRAME_SIZE_ERROR: Final = 0x6
REFUSED_STREAM: Final = 0x7
CANCEL: Final = 0x8
COMPRESSION_ERROR: Final = 0x9
ENHANCE_YOUR_CALM: Final = 0xB

ENABLE_PUSH: Final = 0x2
MAX_CONCURRENT_STREAMS: Final = 0x3
INITIAL_WINDOW_SIZE: Final = 0x4
MAX_FRAME_SIZE: Final = 0x5
MAX_HEADER_LIST_SIZE: Final = 0x6

WINDOW: Final = 65_535
"""Bytes, of every window until something else is said."""
LARGEST_WINDOW: Final = 2**31 - 1
SMALLEST_FRAME: Final = 16_384
"""Bytes that every peer takes in one frame."""
LARGEST_FRAME: Final = 2**24 - 1


class BrokenError(Exception):
    """The peer has broken the protocol so that nothing on this connection can be trusted any more."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code, self.words = code, words


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame."""
    return HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def number(kind: int, stream: int, value: int) -> bytes:
    """Return a frame whose payload is a number of 32 bits: RST_STREAM, WINDOW_UPDATE."""
    return HEAD.pack(4 << 8 | kind, 0, stream) + NUMBER.pack(value)


def settings(values: dict[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(PAIR.pack(*pair) for pair in values.items()))


def goaway(last: int, code: int, words: str) -> bytes:
    """Return a GOAWAY frame."""
    return frame(GOAWAY, 0, 0, NUMBER.pack(last) + NUMBER.pack(code) + words.encode()[:200])


def literal(name: bytes, value: bytes) -> bytes:
    """Return a field for HPACK (RFC 7541) that no table remembers, neither ours nor the peer's."""
    return b"\x10" + _length(name) + _length(value)


def _length(text: bytes) -> bytes:
    size = len(text)
    if size < 0x7F:  # noqa: PLR2004 - a prefix of seven bits
        return bytes([size]) + text
    made = bytearray(b"\x7f")
    size -= 0x7F
    while size > 0x7F:  # noqa: PLR2004
        made.append(size & 0x7F | 0x80)
        size >>= 7
    made.append(size)
    return bytes(made) + text


def unpadded(flags: int, payload: bytes) -> bytes:
    """Return what is not padding of DATA or HEADERS; raises ``BrokenError``."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise BrokenError(PROTOCOL_ERROR, "there is more padding than frame")
    return payload[1 : len(payload) - payload[0]]
