"""TLS connections, accepted one by one, so that handshakes under way are counted and bounded.

The event loop's own TLS listener shows a connection after its handshake only:
whoever never ends one would hold a descriptor and a context each, without
being counted. Here a handshake has a deadline, and where too many are under
way the oldest is let go, since honest ones take milliseconds.
"""

import asyncio
import logging
import socket
import ssl
import time
from contextlib import suppress
from typing import Final

from agent.engine.serve.http import Server

log = logging.getLogger(__name__)

SHARE: Final = 4
"""One connection in so many may be at its handshake."""
LEAST: Final = 8
PAUSE_S: Final = 0.1
"""After an accept that failed: descriptors are used up, most likely."""


class Listener:
    """Accepts on some sockets, and shakes hands."""

    def __init__(self, listening: list[socket.socket], server: Server, context: ssl.SSLContext) -> None:
        self._listening, self._server, self._context = listening, server, context
        limits = server.limits
        self._most = min(limits.connections, max(LEAST, limits.connections // SHARE))
        self._deadline_s = limits.header_s
        self._under_way: dict[asyncio.Task[None], socket.socket] = {}
        """The oldest first."""
        self._tasks = [asyncio.create_task(self._accept(sock)) for sock in listening]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listening[0].getsockname()[1])

    def close(self) -> None:
        """Take no more, and let go of whoever is at a handshake."""
        for task in self._tasks:
            task.cancel()
        for sock in self._listening:
            sock.close()
        for sock in self._under_way.values():
            _end(sock)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("serving.accept_failed", extra={"facts": {"why": error.strerror}})
                await asyncio.sleep(PAUSE_S)
                continue
            server = self._server
            if len(server.connections) + len(self._under_way) >= server.limits.connections:
                server.turned_away += 1
                if not self._under_way:
                    sock.close()
                    continue
                self._drop_oldest()
            elif len(self._under_way) >= self._most:
                server.turned_away += 1
                self._drop_oldest()
            task = loop.create_task(self._shake(sock))
            self._under_way[task] = sock
            server.shaking = len(self._under_way)
            task.add_done_callback(self._done)

    def _drop_oldest(self) -> None:
        task = next(iter(self._under_way))
        _end(self._under_way.pop(task))

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._under_way.pop(task, None)
        self._server.shaking = len(self._under_way)

    async def _shake(self, sock: socket.socket) -> None:
        began = time.monotonic()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                self._server.protocol,
                sock,
                ssl=self._context,
                ssl_handshake_timeout=self._deadline_s,
            )
        except (OSError, ssl.SSLError, asyncio.CancelledError) as error:
            _end(sock)
            took = round(time.monotonic() - began, 3)
            log.debug("serving.handshake_failed", extra={"facts": {"why": str(error)[:200], "s": took}})


def _end(sock: socket.socket) -> None:
    """Let the handshake see the end of its connection: the transport holds the socket, and closes it."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
