"""HTTP/2 on an event loop (RFC 9113), the side of a server, for calls whose answer ends in trailers.

As ``http`` does for HTTP/1: nothing on the way of an ordinary call creates a task, a future or a timer,
one sweep looks at all deadlines, and all that came in one read is answered in one write.

What a client may cost: header blocks are bounded in bytes, fields and frames; streams per connection
and calls of all connections in number; messages that have not arrived whole and answers that are not read
in bytes, of all connections together. While a client does not read its answers, nothing is read from it, so
what it could make us write stays below the transport's own buffer. A client that gives up more calls than
it lets us answer, or sends frames that only cost, is told ENHANCE_YOUR_CALM. Whoever neither sends nor
reads on in time is let go: a stream alone where its window is shut, a connection where its socket is.

Here is what all connections of a listener share; ``http2_connection`` is one client, ``http2_reader`` what it
says, ``http2_stream`` one call, ``http2_bounds`` the numbers.
"""

import asyncio
import time
from typing import Any, Protocol

from agent.engine.serve import http2_frames as h2
from agent.engine.serve.http import SWEEP_S, Limits
from agent.engine.serve.http2_connection import Connection
from agent.engine.serve.http2_stream import Stream


class Handler(Protocol):
    """What answers calls."""

    head: bytes
    """The header block that begins each answer."""

    def meaning(self, fields: list[tuple[bytes, bytes]]) -> Any:
        """Return what the fields of a call say; raises ``MalformedError``."""

    def begin(self, stream: Stream, said: Any) -> None:
        """Take a new call: set ``stream.receiver``, or end the stream at once."""

    def sweep(self) -> None:
        """Look, a few times a second, whether calls may go on."""


class Server:
    """What all connections of a listener share."""

    def __init__(self, handler: Handler, limits: Limits) -> None:
        self.handler, self.limits = handler, limits
        self.most_held = max(limits.all_bodies_bytes, limits.body_bytes)
        self.connections: set[Connection] = set()
        self.held = 0
        """Bytes of what is not answered, and of answers that are not read."""
        self.calls = 0
        """Streams that are open."""
        self.turned_away = 0
        self.stopping = False
        self.loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sweep()

    def protocol(self) -> Connection:
        """Return a protocol for a new connection."""
        return Connection(self)

    async def close(self, timeout_s: float) -> None:
        """Let the calls that are there end, and take no more."""
        self.stopping = True
        end = time.monotonic() + timeout_s
        while self.connections and time.monotonic() < end:
            for connection in list(self.connections):
                connection.leave(h2.NO_ERROR, "the server ends")
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()

    def make_room(self, size: int, but: Connection | None = None) -> bool:
        """Return whether ``size`` more bytes can be held; who leaves most unread makes room for others."""
        missing = self.held + size - self.most_held
        if missing <= 0:
            return True
        unread = [c for c in self.connections if c.unread_bytes and c is not but]
        if sum(c.unread_bytes for c in unread) < missing:
            return False
        for connection in sorted(unread, key=lambda c: -c.unread_bytes):
            connection.abort()
            if self.held + size <= self.most_held:
                break
        return True

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self.connections):
            connection.sweep(now)
        self.handler.sweep()
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)
