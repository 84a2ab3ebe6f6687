"""The engine's end of the socket: takes the supervisor's orders, hands out what the lanes made.

The engine outlives its supervisor: without one it goes on, and keeps its
products. A newer connection replaces the older, so that a supervisor that
hangs cannot shut its successor out.
"""

import logging
import os
import selectors
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from agent.core.frames import FrameReader
from agent.engine.clock import Clock
from agent.engine.lane import Lane
from agent.engine.loading import Loader
from agent.engine.outlet import Outlet, encoded
from agent.engine.serving import Serving
from agent.ports import MAX_IPC_MESSAGE, Configure, Hello, Stored, ToEngine, socket_address
from contract.errors import PitheadError

log = logging.getLogger(__name__)

CHECK_S: Final = 1.0
"""How often the socket's file is looked at."""
GONE_CHECKS: Final = 10
"""The socket's file may be missing for so many checks before the engine ends."""
SEND_AHEAD: Final = 256 * 1024
"""Bytes that may wait for the supervisor to read them."""
FAREWELL_S: Final = 2.0
LANE_END_S: Final = 2.0
SERVING_END_S: Final = 3.0
"""For requests that are being answered; all of a farewell must end before the supervisor insists."""
SHORTEST_BUCKET_S: Final = 0.1
LONGEST_BUCKET_S: Final = 86_400.0

_decoder = msgspec.msgpack.Decoder(ToEngine)


def listen(path: Path) -> socket.socket:
    """Return a socket that listens on ``path``, which only this user may open; an older one is replaced.

    It is bound beside ``path`` and renamed, so that ``path`` always leads to somebody.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        beside.unlink(missing_ok=True)
        with socket_address(beside) as address:
            server.bind(address)
        server.listen(4)
        beside.rename(path)
    except OSError as error:
        server.close()
        raise PitheadError("config.invalid", f"--socket {path}: {error}") from error
    finally:
        os.umask(mask)
    server.setblocking(False)
    return server


class Connection:
    """One supervisor."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = FrameReader(MAX_IPC_MESSAGE)
        self.out = bytearray()

    def read(self) -> list[bytes] | None:
        """Return the messages that came, or None when the other side is gone."""
        try:
            data = self.sock.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self.reader.feed(data) if data else None

    def write(self) -> bool:
        """Send what fits; return False when the other side is gone."""
        while self.out:
            try:
                sent = self.sock.send(memoryview(self.out)[:65536])
            except BlockingIOError:
                return True
            except OSError:
                return False
            del self.out[:sent]
        return True


class Server:
    """The engine's main thread."""

    def __init__(self, path: Path, clock: Clock, runtimes: dict[str, str]) -> None:
        self._path, self._clock = path, clock
        self._hello = Hello(pid=os.getpid(), started_mono_us=clock.mono(), runtimes=runtimes)
        self._listener = listen(path)
        self._mine = _identity(path)
        self._missing = 0
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._woken = False
        self._outlet = Outlet(clock, self._wake)
        self._loader = Loader()
        self._lanes: dict[str, Lane] = {}
        self._ending: list[Lane] = []
        self._serving = Serving(self._outlet, clock)
        self._peer: Connection | None = None
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_out, selectors.EVENT_READ, self._drain)

    @property
    def wake_fd(self) -> int:
        """Bytes written here wake the server, for ``signal.set_wakeup_fd``."""
        return self._wake_in.fileno()

    def stop(self) -> None:
        """End soon; may be called in a signal handler."""
        self._stopping = True

    def run(self) -> bool:
        """Serve until ``stop`` or until another engine has taken the socket's file.

        Return whether all threads have ended; if not, a model hangs.
        """
        self._loader.start()
        log.info("engine.started", extra={"facts": {"pid": self._hello.pid, "socket": str(self._path)}})
        check = self._clock.mono()
        while not self._stopping:
            self._turn(CHECK_S)
            if self._clock.mono() - check >= CHECK_S * 1e6:
                check = self._clock.mono()
                self._stopping = self._stopping or self._replaced()
                self._bury()
        return self._end()

    def _turn(self, timeout_s: float) -> None:
        for selected, _ in self._selector.select(timeout_s):
            act: Callable[[], None] = selected.data
            act()
        self._send()

    def _end(self) -> bool:
        self._ending += self._lanes.values()
        self._lanes = {}
        for lane in self._ending:
            lane.stop()
        self._serving.stop()
        until = self._clock.mono() + round(LANE_END_S * 1e6)
        hanging = [
            lane.name for lane in self._ending if not lane.join(max(0.0, (until - self._clock.mono()) / 1e6))
        ]
        if not self._serving.join(SERVING_END_S):
            hanging.append("serving")
        if hanging:
            log.warning("engine.lanes_hang", extra={"facts": {"lanes": hanging}})
        until = self._clock.mono() + round(FAREWELL_S * 1e6)
        while self._peer is not None and self._outlet.waiting and self._clock.mono() < until:
            self._turn(0.1)
        facts = {"not_stored": self._outlet.waiting, "lost": self._outlet.lost}
        log.info("engine.stopped", extra={"facts": facts})
        self._drop_peer()
        for end in (self._selector, self._listener, self._wake_in, self._wake_out):
            end.close()
        if _identity(self._path) == self._mine:
            self._path.unlink(missing_ok=True)
        return self._loader.stop(LANE_END_S) and not hanging

    def _bury(self) -> None:
        for lane in [lane for lane in self._ending if lane.join(0)]:
            self._ending.remove(lane)
            if lane.name not in self._lanes:
                self._outlet.forget_lane(lane.name)

    def _replaced(self) -> bool:
        found = _identity(self._path)
        if found == self._mine:
            self._missing = 0
            return False
        if found is None:
            self._missing += 1
            if self._missing < GONE_CHECKS:
                return False
        log.warning("engine.replaced", extra={"facts": {"socket": str(self._path), "gone": found is None}})
        return True

    # ---- the supervisor

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if self._peer is not None:
            log.info("supervisor.replaced")
        self._drop_peer()
        self._peer = Connection(sock)
        self._peer.out += encoded(self._hello)
        self._outlet.rewind()
        self._selector.register(sock, selectors.EVENT_READ, self._receive)
        log.info("supervisor.connected")

    def _drop_peer(self) -> None:
        if self._peer is None:
            return
        self._selector.unregister(self._peer.sock)
        self._peer.sock.close()
        self._peer = None

    def _receive(self) -> None:
        peer = self._peer
        if peer is None:
            return
        try:
            payloads = peer.read()
            if payloads is None:
                log.info("supervisor.gone")
                self._drop_peer()
                return
            for payload in payloads:
                self._take(_decoder.decode(payload))
        except (PitheadError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("supervisor.malformed", extra={"facts": {"detail": str(error)}})
            self._drop_peer()

    def _take(self, message: ToEngine) -> None:
        match message:
            case Stored(n=n):
                self._outlet.stored(n)
            case Configure():
                self._configure(message)

    def _configure(self, wanted: Configure) -> None:
        bucket_s = min(wanted.bucket_s, LONGEST_BUCKET_S)
        bucket_s = max(bucket_s, SHORTEST_BUCKET_S)
        self._serving.configure(wanted.serve, bucket_s)
        names = {spec.lane for spec in wanted.lanes}
        for name in [n for n in self._lanes if n not in names]:
            lane = self._lanes.pop(name)
            lane.stop()
            self._ending.append(lane)
            self._outlet.forget_lane(name)
        for spec in wanted.lanes:
            if spec.lane in self._lanes:
                self._lanes[spec.lane].configure(spec, bucket_s)
            else:
                lane = Lane(spec, bucket_s, self._outlet, self._loader, self._clock)
                self._lanes[spec.lane] = lane
                lane.start()

    def _send(self) -> None:
        peer = self._peer
        if peer is None:
            return
        while True:
            room = SEND_AHEAD - len(peer.out)
            if room > 0:
                peer.out += self._outlet.take(room)
            full = len(peer.out)
            if not peer.write():
                self._drop_peer()
                return
            if peer.out or not full:
                break
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.out else 0)
        if self._selector.get_key(peer.sock).events != events:
            self._selector.modify(peer.sock, events, self._receive)

    # ---- waking up

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            with suppress(BlockingIOError, OSError):
                self._wake_in.send(b"\0")

    def _drain(self) -> None:
        with suppress(BlockingIOError):
            self._wake_out.recv(4096)
        # Only now: who wakes before this line has left its message already, and it is sent next.
        self._woken = False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else (0, 0)
