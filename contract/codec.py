"""Bytes to messages and back, with limits on both sides.

JSON, so that whoever subscribes can read it; a batch is a JSON list, and is
compressed with zstd where that pays. The content type says which.
"""

from collections.abc import Sequence
from typing import Final, TypeVar

import msgspec
import zstandard

from contract.errors import PitheadError
from contract.messages import Envelope

JSON: Final = "application/json"
JSON_ZSTD: Final = "application/json+zstd"
MAX_PAYLOAD: Final = 256 * 1024
"""Bytes of an MQTT payload as sent."""
MAX_DECODED: Final = 4 * 1024 * 1024
"""Bytes of a payload after decompression."""
COMPRESS_ABOVE: Final = 1024

T = TypeVar("T")

_FAULTS: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bad bytes; the last on brackets nested without end."""

_encoder = msgspec.json.Encoder()
_envelopes = msgspec.json.Decoder(list[Envelope])


def encode(message: object) -> bytes:
    """Return ``message`` as JSON."""
    return _encoder.encode(message)


def decode(payload: bytes, kind: type[T]) -> T:
    """Return ``payload`` as a ``kind``; ``message.malformed`` names the path of a wrong field."""
    if len(payload) > MAX_DECODED:
        raise PitheadError(
            "message.too_large", f"{len(payload)} bytes, limit {MAX_DECODED}", limit=MAX_DECODED
        )
    try:
        return msgspec.json.decode(payload, type=kind)
    except _FAULTS as error:
        raise _malformed(error) from error


def encode_batch(envelopes: list[Envelope]) -> tuple[bytes, str]:
    """Return ``(payload, content type)`` of a batch."""
    payload = _encoder.encode(envelopes)
    if len(payload) <= COMPRESS_ABOVE:
        return payload, JSON
    return zstandard.ZstdCompressor(level=3).compress(payload), JSON_ZSTD


def join_batch(encoded: Sequence[bytes]) -> tuple[bytes, str]:
    """Return ``(payload, content type)`` of a batch whose envelopes are encoded already."""
    payload = b"[" + b",".join(encoded) + b"]"
    if len(payload) <= COMPRESS_ABOVE:
        return payload, JSON
    return zstandard.ZstdCompressor(level=3).compress(payload), JSON_ZSTD


def open_payload(payload: bytes, content_type: str | None) -> bytes:
    """Return the JSON of a payload as sent, within both limits.

    A compressed payload is never inflated beyond ``MAX_DECODED``.
    """
    if len(payload) > MAX_PAYLOAD:
        raise PitheadError(
            "message.too_large", f"{len(payload)} bytes, limit {MAX_PAYLOAD}", limit=MAX_PAYLOAD
        )
    if content_type == JSON_ZSTD:
        return _inflate(payload)
    if content_type not in (None, "", JSON):
        raise PitheadError("message.malformed", f"content type {content_type!r} is not known")
    return payload


def decode_batch(payload: bytes, content_type: str | None) -> list[Envelope]:
    """Return the envelopes of a batch; errors as for ``decode`` and ``open_payload``."""
    try:
        return _envelopes.decode(open_payload(payload, content_type))
    except _FAULTS as error:
        raise _malformed(error) from error


def _malformed(error: Exception) -> PitheadError:
    said = f"not UTF-8: {error}" if isinstance(error, UnicodeDecodeError) else str(error)
    return PitheadError("message.malformed", said)


def _inflate(payload: bytes) -> bytes:
    try:
        with zstandard.ZstdDecompressor(max_window_size=8 * 1024 * 1024).stream_reader(payload) as reader:
            data = reader.read(MAX_DECODED + 1)
    except zstandard.ZstdError as error:
        raise PitheadError("message.malformed", f"not zstd: {error}") from error
    if len(data) > MAX_DECODED:
        raise PitheadError(
            "message.too_large", f"more than {MAX_DECODED} bytes after decompression", limit=MAX_DECODED
        )
    return data
