"""Bodies in gzip and deflate, without being blown up by them."""

import zlib
from typing import Final

from contract.errors import PitheadError

SMALLEST: Final = 512
"""Bytes; what is shorter is not worth compressing."""
LEVEL: Final = 1
_GZIP: Final = 16 + zlib.MAX_WBITS


def inflate(body: bytes | bytearray, encoding: bytes, most: int) -> bytes:
    """Return the decoded body, of at most ``most`` bytes.

    Raises ``serve.unsupported_encoding``, ``serve.too_large``, ``serve.bad_request``.
    """
    name = encoding.strip().lower()
    if name in {b"identity", b""}:
        return bytes(body)
    if name in {b"gzip", b"x-gzip"}:
        bits = _GZIP
    elif name == b"deflate":
        # RFC 9110 means zlib's format by it; some send the bare stream.
        bits = zlib.MAX_WBITS if body[:1] and body[0] & 0x0F == 8 else -zlib.MAX_WBITS  # noqa: PLR2004
    else:
        raise PitheadError("serve.unsupported_encoding", f"{name[:50]!r}: gzip and deflate are taken")
    decoder = zlib.decompressobj(bits)
    try:
        data = decoder.decompress(body, most + 1)
    except zlib.error as error:
        raise PitheadError("serve.bad_request", f"Content-Encoding: {error}") from error
    if len(data) > most:
        raise PitheadError("serve.too_large", f"the body inflates to more than {most} bytes")
    if not decoder.eof or decoder.unused_data:
        raise PitheadError("serve.bad_request", "Content-Encoding: the body is not one complete stream")
    return data


def accepted(header: bytes) -> bytes | None:
    """Return ``gzip`` or ``deflate`` where ``Accept-Encoding`` takes one of them."""
    for part in header.lower().split(b","):
        name, _, quality = part.partition(b";")
        if name.strip() in {b"gzip", b"deflate"} and quality.replace(b" ", b"") not in {
            b"q=0", b"q=0.0", b"q=0.00", b"q=0.000",
        }:  # fmt: skip
            return name.strip()
    return None


def compress(body: bytes, encoding: bytes) -> bytes:
    """Return ``body`` in an encoding that ``accepted`` has named."""
    coder = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP if encoding == b"gzip" else zlib.MAX_WBITS)
    return coder.compress(body) + coder.flush()
