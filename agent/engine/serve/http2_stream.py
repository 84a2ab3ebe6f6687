"""One call on a connection of HTTP/2: what is sent on it, as far as the client's windows are open."""

import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from agent.engine.serve import http2_bounds as bounds
from agent.engine.serve import http2_frames as h2

if TYPE_CHECKING:
    from agent.engine.serve.http2_connection import Connection


class Receiver(Protocol):
    """What a stream's call is to whoever answers it."""

    def data(self, payload: bytes, *, ended: bool) -> None:
        """Take a piece of what the client sends, perhaps empty; ``ended`` says that it was the last."""

    def lost(self) -> None:
        """The client no longer waits; nothing more may be sent."""

    def overdue(self) -> None:
        """The stream's ``deadline`` is over."""

    def drained(self) -> None:
        """All that was sent has left for the socket."""


class Stream:
    """One call on a connection. ``deadline`` is when its receiver wants to be woken."""

    __slots__ = (
        "_begun", "_stalled", "connection", "deadline", "ended", "hold", "id", "open", "receiver",
        "send_window", "taken", "trailers", "unsent", "unsent_bytes", "window",
    )  # fmt: skip

    def __init__(self, connection: "Connection", number: int, window: int) -> None:
        self.connection, self.id = connection, number
        self.receiver: Receiver | None = None
        self.send_window = window
        self.window = bounds.STREAM_WINDOW
        """Bytes that the client may still send."""
        self.taken = 0
        """Bytes that it has sent since it was last told that it may send more."""
        self.hold = False
        """Not to tell it for now."""
        self.unsent: deque[bytes | memoryview] = deque()
        self.unsent_bytes = 0
        self.trailers: bytes | None = None
        self._begun = False
        self._stalled = bounds.NEVER
        self.ended = False
        """The client has sent all."""
        self.open = True
        self.deadline = bounds.NEVER

    def send(self, body: bytes, trailers: bytes | None = None) -> None:
        """Send a piece of the answer; with ``trailers`` the last one, which ends the stream."""
        if not self.open:
            return
        connection = self.connection
        size = len(body)
        if not self._begun:
            self._begun = True
            block = connection.server.handler.head
            connection.write(h2.HEAD.pack(len(block) << 8 | h2.HEADERS, h2.END_HEADERS, self.id) + block)
        at_once = not self.unsent and size <= connection.largest and connection.has_room
        if at_once and size <= self.send_window and size <= connection.send_window:
            if size:
                self.send_window -= size
                connection.send_window -= size
                connection.write(h2.HEAD.pack(size << 8 | h2.DATA, 0, self.id) + body)
                connection.patience.give()
            if trailers is not None:
                self.finish(trailers)
            return
        self.trailers = trailers
        if size:
            if size >= bounds.LARGE and not connection.server.make_room(size, but=connection):
                connection.reset(self, h2.ENHANCE_YOUR_CALM)
                return
            self.unsent.append(body)
            self._account(size)
        self._stalled = time.monotonic() + connection.server.limits.read_s
        connection.blocked[self.id] = self
        connection.push()

    def refuse(self, block: bytes) -> None:
        """End with ``block``: trailers alone where nothing was sent, else after what was."""
        if self._begun:
            self.send(b"", block)
        elif self.open:
            self.finish(self.connection.server.handler.head + block)

    def finish(self, block: bytes) -> None:
        """Send the last header block and be done."""
        connection = self.connection
        flags = h2.END_HEADERS | h2.END_STREAM
        connection.write(h2.HEAD.pack(len(block) << 8 | h2.HEADERS, flags, self.id) + block)
        if not self.ended:  # what is still to come is not wanted, RFC 9113, 8.1
            connection.write(h2.number(h2.RST_STREAM, self.id, h2.NO_ERROR))
        connection.patience.give()
        connection.forget(self)

    def push(self, room: int) -> None:
        """Send up to ``room`` bytes of what waits, as far as the windows are open."""
        connection = self.connection
        while self.unsent and room > 0 and not connection.unread:
            first = self.unsent[0]
            size = min(len(first), self.send_window, connection.send_window, connection.largest)
            if size <= 0:
                return
            if size == len(first):
                self.unsent.popleft()
            else:
                self.unsent[0] = memoryview(first)[size:]
            connection.write(h2.HEAD.pack(size << 8 | h2.DATA, 0, self.id))
            connection.write(first[:size])
            self.send_window -= size
            connection.send_window -= size
            if size >= bounds.SMALL:
                connection.patience.give()
            room -= size
            self._account(-size)
            self._stalled = time.monotonic() + connection.server.limits.read_s
        if self.unsent or connection.unread:
            return
        del connection.blocked[self.id]
        self._stalled = bounds.NEVER
        if self.trailers is not None:
            self.finish(self.trailers)
        elif self.receiver is not None:
            self.receiver.drained()

    def resume(self) -> None:
        """Let the client send as much as its window allows."""
        self.hold = False
        if self.taken and self.open and not self.ended:
            self.connection.write(h2.number(h2.WINDOW_UPDATE, self.id, self.taken))
            self.window += self.taken
            self.taken = 0

    def sweep(self, now: float) -> None:
        """Look at the deadlines."""
        if now > self._stalled and not self.connection.unread:
            self.connection.reset(self, h2.CANCEL)
        elif now > self.deadline and self.receiver is not None:
            self.deadline = bounds.NEVER
            self.receiver.overdue()

    def _account(self, size: int) -> None:
        self.unsent_bytes += size
        self.connection.unread_bytes += size
        self.connection.server.held += size
