"""Keep an engine running and talk to it. It outlives the supervisor, so at first one may be there already."""

import contextlib
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent import huge_pages
from agent.core import backoff
from agent.core.frames import FrameReader, frame
from agent.core.layout import Layout
from agent.ports import FromEngine, Hello, ToEngine, socket_address
from agent.service.events import EngineLost, EngineSaid, EngineStarted, Post
from contract.errors import PitheadError

log = logging.getLogger(__name__)
START_S: Final = 20.0
"""Within this a new engine must listen."""
STEADY_S: Final = 30.0
"""An engine that lived so long starts the back-off anew."""
SILENCE_S: Final = 30.0
"""A lane's state comes every second; an engine that says nothing for so long hangs."""
SEND_S: Final = 5.0
STOP_S: Final = 8.0
LOG_BYTES: Final = 1024 * 1024
POLL_S: Final = 0.05

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FromEngine)


class EngineKeeper:
    """One thread that connects to the engine, starts one when none answers, and reads what it says."""

    def __init__(
        self,
        layout: Layout,
        post: Post,
        *,
        fraction: Callable[[], float],
        cpus: Sequence[int] = (),
        memory_bytes: int = 0,
    ) -> None:
        """``cpus`` are those that a new engine runs on; all, where none is named.

        ``memory_bytes`` is what an engine may hold; 0: as much as it likes.
        """
        self.layout = layout
        self._cpus = cpus
        self.memory_bytes = memory_bytes
        self._ended = ""
        self._post = post
        self._fraction = fraction
        self._leaving = threading.Event()
        self._stopping = threading.Event()
        self._paused = threading.Event()
        self._socket: socket.socket | None = None
        self._connection = 0
        self._pid: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._failures = 0
        self.lanes = 0
        """How many lanes were asked for; with none, silence is no sign."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def pid(self) -> int | None:
        """Process id of the engine, once it has said hello."""
        return self._pid

    def start(self) -> None:
        """Begin, and return at once."""
        self._thread.start()

    def send(self, message: ToEngine) -> bool:
        """Send a message; False when there is no connection, or it broke."""
        sock = self._socket
        if sock is None:
            return False
        try:
            sock.sendall(frame(_encoder.encode(message)))
        except OSError as error:
            log.warning("engine.send_failed", extra={"facts": {"detail": str(error)}})
            self.drop()
            return False
        return True

    def drop(self) -> None:
        """Cut the connection; a new one is made. The engine then repeats what was not stored."""
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def pause(self, *, on: bool) -> None:
        """Stop or go on reading; what is not read waits in the engine."""
        if on:
            self._paused.set()
        else:
            self._paused.clear()

    @property
    def paused(self) -> bool:
        """Whether reading is stopped."""
        return self._paused.is_set()

    def kill(self) -> None:
        """End an engine that hangs; a new one is started."""
        log.error("engine.killed", extra={"facts": {"pid": self._engine_pid()}})
        self._signal(signal.SIGKILL)

    def retire(self) -> None:
        """Ask the engine to end in good order; a new one is started."""
        self._signal(signal.SIGTERM)

    def leave(self, *, keep_engine: bool) -> None:
        """Start no engine any more, and ask the present one to end unless it shall go on alone.

        Until it has ended, what it still says is passed on.
        """
        self._leaving.set()
        if keep_engine:
            self._stopping.set()
            self.drop()
        elif self._engine_pid() is not None:
            self._signal(signal.SIGTERM)

    def join(self) -> None:
        """End the thread; an engine that was to end and did not is killed."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._end()
        self.drop()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._leaving.is_set():
            sock = self._connect()
            if sock is None:
                sock = self._start_engine()
            if sock is None:
                self._failures += 1
                self._leaving.wait(backoff.delay(self._failures, self._fraction(), base_s=0.5, cap_s=30.0))
                continue
            begun = time.monotonic()
            detail = self._read(sock)
            if time.monotonic() - begun >= STEADY_S:
                self._failures = 0
            if not self._leaving.is_set():
                self._after_loss(detail)

    def _connect(self) -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(self.layout.engine_socket) as address:
                sock.connect(address)
        except OSError:
            sock.close()
            return None
        # Only sending has a limit: the loop must not hang on an engine that does not read.
        seconds = struct.pack("ll", int(SEND_S), 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        return sock

    def _start_engine(self) -> socket.socket | None:
        """Start an engine, wait until it listens, and return the connection, or None."""
        if self._child is not None and self._child.poll() is None:
            # It lives but does not listen: it is ending, or it hangs.
            self._end()
        try:
            self._child = self._spawn()
        except OSError as error:
            log.exception("engine.not_started", extra={"facts": {"detail": str(error)}})
            return None
        log.info("engine.spawned", extra={"facts": {"pid": self._child.pid}})
        self._post(EngineStarted(self._child.pid, self._ended))
        self._ended = ""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and not self._leaving.wait(POLL_S):
            if self._child.poll() is not None:
                self._ended = how_it_ended(self._child.returncode)
                log.error(
                    "engine.died_at_start",
                    extra={"facts": {"status": self._child.returncode, "log": str(self.layout.engine_log)}},
                )
                return None
            sock = self._connect()
            if sock is not None:
                return sock
        return None

    def _spawn(self) -> subprocess.Popen[bytes]:
        path = self.layout.engine_log
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        command = [sys.executable, "-P", "-m", "agent.engine", "--socket", str(self.layout.engine_socket)]
        if self._cpus:
            command += ["--cpus", ",".join(map(str, self._cpus))]
        if self.memory_bytes:
            command += ["--memory", str(self.memory_bytes)]
        with path.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=huge_pages.environment(os.environ),
                start_new_session=True,
            )

    def _read(self, sock: socket.socket) -> str:
        """Pass on what the engine says until the connection ends; return why it ended."""
        self._connection += 1
        connection, reader = self._connection, FrameReader()
        self._socket = sock
        heard = time.monotonic()
        try:
            while not self._stopping.is_set():
                if self._paused.is_set():
                    heard = time.monotonic()
                    self._stopping.wait(POLL_S)
                    continue
                readable, _, _ = select.select([sock], [], [], 1.0)
                if not readable:
                    if self.lanes and time.monotonic() - heard > SILENCE_S:
                        self._kill_hanging()
                        return "silent"
                    continue
                data = sock.recv(65536)
                if not data:
                    return "closed"
                heard = time.monotonic()
                for payload in reader.feed(data):
                    message = _decoder.decode(payload)
                    if isinstance(message, Hello):
                        self._pid = message.pid
                    self._post(EngineSaid(connection, message))
        except (OSError, PitheadError, msgspec.MsgspecError) as error:
            return str(error) or type(error).__name__
        finally:
            self._socket = None
            sock.close()
            self._post(EngineLost(connection, "disconnected"))
        return "stopping"

    def _after_loss(self, detail: str) -> None:
        status = None
        if self._child is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._child.wait(0.2)
        self._ended = how_it_ended(status)
        log.warning("engine.lost", extra={"facts": {"detail": detail, "status": status}})
        self._failures += 1
        if self._failures > 1:
            self._leaving.wait(backoff.delay(self._failures - 1, self._fraction(), base_s=0.5, cap_s=30.0))

    def _kill_hanging(self) -> None:
        log.error("engine.hangs", extra={"facts": {"pid": self._engine_pid(), "silent_s": SILENCE_S}})
        self._signal(signal.SIGKILL)

    def _engine_pid(self) -> int | None:
        """Process id of the engine that greeted, or that was started and has not greeted yet."""
        if self._child is not None and self._child.poll() is None:
            return self._child.pid
        return self._pid if self._pid is not None and is_engine(self._pid) else None

    def _signal(self, number: int) -> None:
        pid = self._engine_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end(self) -> None:
        """Ask the engine to end, wait, and insist."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while self._engine_pid() is not None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        pid = self._engine_pid()
        if pid is not None:
            log.error("engine.killed", extra={"facts": {"pid": pid}})
            self._signal(signal.SIGKILL)


def how_it_ended(status: int | None) -> str:
    """Return what an exit status says, in words; empty where there is none."""
    if status is None or status >= 0:
        return "" if status is None else f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    # Nobody else here sends it: what is killed for hanging has another reason already.
    return f"died of {name}" + (", as the kernel ends it where memory is short" if name == "SIGKILL" else "")


def is_engine(pid: int) -> bool:
    """Whether ``pid`` is an engine process, so that no stranger that got its number is signalled."""
    try:
        return b"agent.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
