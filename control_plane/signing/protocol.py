"""What client and signer say to each other: a 4-byte big-endian length and one msgpack map, both ways."""

from typing import Final

import msgspec

from control_plane.signing.rules import MAX_PAYLOAD

LENGTH_BYTES: Final = 4
MAX_FRAME: Final = MAX_PAYLOAD + 1024


class SignRequest(msgspec.Struct, frozen=True, tag="sign"):
    """Sign this payload as this role."""

    role: str
    payload: bytes


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Ask whether the signer is there."""


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """Say that it is."""


class Signed(msgspec.Struct, frozen=True, tag="signed"):
    """A signature, in hex as TUF writes it."""

    keyid: str
    signature: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Why there is no signature."""

    detail: str


Request = SignRequest | Ping
Answer = Signed | Refused | Pong
requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
encoder = msgspec.msgpack.Encoder()


def frame(message: Request | Answer) -> bytes:
    """Return the bytes of a message on the socket."""
    body = encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES) + body
