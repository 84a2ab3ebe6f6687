"""A client of HTTP/2 on which anything can be said."""

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import ClassVar

from agent.engine.serve import http2_frames as frames
from agent.engine.serve.http2_frames import frame, literal
from agent.engine.serve.proto.messages import SERVICE
from tests.serve.grpc_client import message

INFER = f"/{SERVICE}/ModelInfer".encode()
STREAM = f"/{SERVICE}/ModelStreamInfer".encode()
OPENING = frames.PREFACE + frame(frames.SETTINGS, 0, 0)
SMALL = message().SerializeToString()
WHOLE = frames.END_HEADERS
LAST = frames.END_STREAM


def head(path: bytes = INFER, *more: tuple[bytes, bytes]) -> bytes:
    said = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *more,
    )
    return b"".join(literal(*pair) for pair in said)


def framed(data: bytes) -> bytes:
    return b"\0" + len(data).to_bytes(4, "big") + data


def call(stream: int, block: bytes = b"", data: bytes = SMALL) -> bytes:
    """A whole call."""
    return frame(frames.HEADERS, WHOLE, stream, block or head()) + frame(
        frames.DATA, LAST, stream, framed(data)
    )


class Raw:
    """A connection on which anything can be said."""

    made: ClassVar[list["Raw"]] = []

    def __init__(self, port: int, opening: bytes = OPENING, buffer: int = 0) -> None:
        self.sock = socket.socket()
        self.made.append(self)
        if buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", port))
        self.data = b""
        self.say(opening)

    def say(self, data: bytes) -> None:
        with suppress(ConnectionResetError, BrokenPipeError):  # what was said before is looked for
            self.sock.sendall(data)

    def come(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What comes, until it is closed."""
        while True:
            while len(self.data) >= frames.HEAD_BYTES:
                first, flags, stream = frames.HEAD.unpack_from(self.data)
                end = frames.HEAD_BYTES + (first >> 8)
                if len(self.data) < end:
                    break
                payload, self.data = self.data[frames.HEAD_BYTES : end], self.data[end:]
                yield first & 0xFF, flags, stream, payload
            try:
                got = self.sock.recv(65536)
            except ConnectionResetError:
                return
            if not got:
                return
            self.data += got

    def next(self, kind: int) -> tuple[int, int, int, bytes]:
        return next(each for each in self.come() if each[0] == kind)

    def code(self, kind: int = frames.GOAWAY) -> int:
        """The error of the first GOAWAY or RST_STREAM."""
        payload = self.next(kind)[3]
        return int(struct.unpack_from(">I", payload, 4 if kind == frames.GOAWAY else 0)[0])

    def ended(self, stream: int) -> bytes:
        """The block with which a stream ends."""
        return next(p for k, f, s, p in self.come() if (k, s) == (frames.HEADERS, stream) and f & LAST)
