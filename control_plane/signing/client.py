"""The signer as the control plane sees it: a socket."""

import socket
import threading
from pathlib import Path
from typing import Final

import msgspec

from contract.errors import PitheadError
from control_plane.signing.protocol import (
    LENGTH_BYTES,
    MAX_FRAME,
    Answer,
    Ping,
    Pong,
    Refused,
    Request,
    Signed,
    SignRequest,
    answers,
    frame,
)

TIMEOUT_S: Final = 10.0


class SignerClient:
    """Implements ``ports.MetadataSigner``, for several threads; connects again when the signer restarted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def sign(self, role: str, payload: bytes) -> tuple[str, str]:
        """Return ``(keyid, signature in hex)``."""
        answer = self._ask(SignRequest(role, payload))
        if isinstance(answer, Refused):
            raise PitheadError("signing.refused", answer.detail, role=role)
        if not isinstance(answer, Signed):
            raise PitheadError("signing.unavailable", f"{self._path}: an answer to another question")
        return answer.keyid, answer.signature

    def answers(self) -> bool:
        """Whether the signer is there and answers."""
        try:
            return isinstance(self._ask(Ping()), Pong)
        except PitheadError:
            return False

    def _ask(self, question: Request) -> Answer:
        request = frame(question)
        with self._lock:
            try:
                body = self._exchange(request)
            except OSError:
                # The signer may have restarted since the last call; signing twice does no harm.
                self._close()
                try:
                    body = self._exchange(request)
                except OSError as error:
                    self._close()
                    raise PitheadError("signing.unavailable", f"{self._path}: {error}") from error
        try:
            return answers.decode(body)
        except msgspec.MsgspecError as error:
            raise PitheadError("signing.unavailable", f"{self._path}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._close()

    def _exchange(self, request: bytes) -> bytes:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket = connection
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(self._path))
        self._socket.sendall(request)
        length = int.from_bytes(self._read(LENGTH_BYTES))
        if length > MAX_FRAME:
            raise ConnectionError(f"an answer of {length} bytes")
        return self._read(length)

    def _read(self, length: int) -> bytes:
        assert self._socket is not None
        parts = bytearray()
        while len(parts) < length:
            part = self._socket.recv(length - len(parts))
            if not part:
                raise ConnectionError("the signer closed the connection")
            parts += part
        return bytes(parts)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
