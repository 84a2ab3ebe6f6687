"""The signer: a process of its own, alone in holding the online keys.

``python -m control_plane.signing.signer --socket S --keys DIR``. It listens
on a Unix socket that only its user may open and signs what ``rules`` allow.
"""

import argparse
import contextlib
import logging
import os
import signal
import socketserver
import stat
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from contract.errors import PitheadError
from control_plane.ports import Clock
from control_plane.signing import rules
from control_plane.signing.protocol import (
    LENGTH_BYTES,
    MAX_FRAME,
    Answer,
    Ping,
    Pong,
    Refused,
    Signed,
    frame,
    requests,
)
from provisioning.keys import ONLINE, Keys, load_key

log = logging.getLogger(__name__)

PARENT_CHECK_S: Final = 1.0


class SignerServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Answers any number of connections; a request touches nothing but the keys, which never change."""

    daemon_threads = True

    def __init__(self, path: Path, keys: Keys, clock: Clock) -> None:
        self._keys = keys
        self._clock = clock
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        earlier = os.umask(0o177)
        try:
            super().__init__(str(path), _Connection)
        finally:
            os.umask(earlier)
        self._path = path
        self._own = _identity(path)

    def server_close(self) -> None:
        """Close the socket and take its name away, unless another signer has that name by now."""
        super().server_close()
        with contextlib.suppress(FileNotFoundError):
            if _identity(self._path) == self._own:
                self._path.unlink()

    def answer(self, body: bytes) -> Answer:
        """Sign one request, or say why not."""
        try:
            request = requests.decode(body)
            if isinstance(request, Ping):
                return Pong()
            rules.check(request.role, request.payload, self._clock())
        except msgspec.MsgspecError as error:
            return Refused(f"malformed request: {error}")
        except PitheadError as error:
            log.warning("signer.refused", extra={"facts": {"detail": error.detail}})
            return Refused(error.detail)
        signature = self._keys[request.role].sign(request.payload)
        return Signed(signature.keyid, signature.signature)


class _Connection(socketserver.StreamRequestHandler):
    """One client; it may send one request after another."""

    server: SignerServer

    def handle(self) -> None:
        while True:
            head = self.rfile.read(LENGTH_BYTES)
            if len(head) < LENGTH_BYTES:
                return
            length = int.from_bytes(head)
            if length > MAX_FRAME:
                self.wfile.write(frame(Refused(f"{length} bytes, limit {MAX_FRAME}")))
                return
            self.wfile.write(frame(self.server.answer(self.rfile.read(length))))


def load_keys(directory: Path) -> Keys:
    """Read all online keys; raises ``config.invalid`` when others may read one of them."""
    keys: Keys = {}
    for role in ONLINE:
        path = directory / f"{role}.pem"
        keys[role] = load_key(path, None)
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise PitheadError("config.invalid", f"{path} can be read by others: chmod 600")
    return keys


def main(arguments: list[str] | None = None) -> int:
    """Serve until SIGTERM, or until the parent is gone."""
    parser = argparse.ArgumentParser(prog="pithead-signer", description=__doc__)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--keys", type=Path, required=True)
    parser.add_argument("--with-parent", action="store_true", help="end when the parent process ends")
    options = parser.parse_args(arguments)
    parent = os.getppid()
    try:
        server = SignerServer(options.socket, load_keys(options.keys), lambda: time.time_ns() // 1000)
    except (PitheadError, OSError) as error:
        sys.stderr.write(f"signer: {error}\n")
        return 1

    def stop(_number: int, _frame: FrameType | None) -> None:
        # shutdown() waits for serve_forever(), which runs in this very thread.
        threading.Thread(target=server.shutdown).start()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        server.shutdown()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN if options.with_parent else stop)
    if options.with_parent:
        threading.Thread(target=watch, daemon=True).start()
    with server:
        server.serve_forever()
    return 0


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


if __name__ == "__main__":
    raise SystemExit(main())
