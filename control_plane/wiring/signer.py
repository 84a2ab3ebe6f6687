"""The signer's process: started, watched, started again, stopped."""

import logging
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from contract.errors import PitheadError

log = logging.getLogger(__name__)

READY_S: Final = 20.0
STOP_S: Final = 5.0
ANSWER_S: Final = 5.0
PEER_CREDENTIALS: Final = struct.Struct("3i")


class SignerProcess:
    """A child that alone reads the online keys."""

    def __init__(self, listen: Path, keys: Path) -> None:
        self._listen = listen
        self._keys = keys
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and return when it answers; ``signing.unavailable`` when it does not."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PITHEAD_")}
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",  # nothing is imported from the directory that this was started in
                "-m",
                "control_plane.signing.signer",
                "--with-parent",
                "--socket",
                str(self._listen),
                "--keys",
                str(self._keys),
            ],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        deadline = time.monotonic() + READY_S
        while self._process.poll() is None and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(0.02)
        self.stop()
        raise PitheadError("signing.unavailable", "the signer did not start; its reason stands above")

    def keep(self) -> None:
        """Start it again when it has died, or cannot be reached any more."""
        process = self._process
        if process is None:
            return
        if process.poll() is not None:
            log.error("signer.died", extra={"facts": {"code": process.returncode}})
            self.start()
        elif not self._answers():
            log.error("signer.unreachable", extra={"facts": {"socket": str(self._listen)}})
            self.stop()
            self.start()

    def stop(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _answers(self) -> bool:
        """Whether our own child listens: one of an earlier control plane may still be ending."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(ANSWER_S)
            try:
                probe.connect(str(self._listen))
                peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
            except OSError:
                return False
        listener, _user, _group = PEER_CREDENTIALS.unpack(peer)
        return self._process is not None and self._process.pid == listener
