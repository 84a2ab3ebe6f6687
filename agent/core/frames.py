"""Cut a byte stream into messages: a 4-byte big-endian length, then the payload.

Used by both ends of the socket between supervisor and engine.
"""

import struct
from typing import Final

from contract.errors import PitheadError

HEADER: Final = struct.Struct(">I")
MAX_PAYLOAD: Final = 8 * 1024 * 1024
"""Bytes of one payload; the same limit as ``agent.ports.MAX_IPC_MESSAGE``."""


def frame(payload: bytes) -> bytes:
    """Return ``payload`` with its length before it; ``message.too_large`` above ``MAX_PAYLOAD``."""
    if len(payload) > MAX_PAYLOAD:
        raise PitheadError(
            "message.too_large", f"{len(payload)} bytes, limit {MAX_PAYLOAD}", limit=MAX_PAYLOAD
        )
    return HEADER.pack(len(payload)) + payload


class FrameReader:
    """Collects bytes as they come and gives out whole payloads."""

    def __init__(self, limit: int = MAX_PAYLOAD) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the payloads that ``data`` completes, in order.

        Raises ``message.too_large`` as soon as a header announces more than
        the limit; the stream cannot be read any further then.
        """
        self._buffer += data
        payloads = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            if length > self._limit:
                raise PitheadError(
                    "message.too_large", f"{length} bytes announced, limit {self._limit}", limit=self._limit
                )
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + HEADER.size : end]))
            start = end
        del self._buffer[:start]
        return payloads

    @property
    def pending(self) -> int:
        """Bytes of a payload that is not whole yet; not 0 at the end of a stream means it was cut."""
        return len(self._buffer)
