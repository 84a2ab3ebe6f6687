"""HTTP/1.1 on an event loop: bytes in, ``Request`` out; ``Response`` in, bytes out.

Parsing is llhttp's (httptools). What is here is what a server must have
around it: pipelined requests are answered in their order, one at a time; a
client that sends too slowly, too much, or does not read its answers costs
little and is let go; what cannot be understood is answered with one 4xx.

Nothing on the way of an ordinary request creates a task, a future or a
timer: one sweep a second looks at all deadlines.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Final, TypeAlias

import httptools
from msgspec import Struct

log = logging.getLogger(__name__)

JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"
TEXT: Final = b"text/plain; version=0.0.4; charset=utf-8"
SWEEP_S: Final = 0.5
MAX_HEADERS: Final = 100
MAX_QUEUED: Final = 16
"""Pipelined requests of one connection that wait, before no more is read from it."""
LINGER_S: Final = 2.0
_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


class Limits(Struct, frozen=True):
    """What a client may cost."""

    connections: int = 1000
    header_bytes: int = 32 * 1024
    body_bytes: int = 64 * 1024 * 1024
    all_bodies_bytes: int = 256 * 1024 * 1024
    """Of all connections together: bodies until they are answered, and answers that nobody reads."""
    header_s: float = 10.0
    """From a request's first byte to the end of its headers."""
    body_s: float = 60.0
    """From there to the end of its body."""
    idle_s: float = 75.0
    """Without a request."""
    read_s: float = 30.0
    """For a client to read on, when its answers no longer fit into the socket."""


class Request:
    """A request that has arrived whole."""

    __slots__ = ("body", "head_only", "headers", "keep_alive", "method", "peer", "size", "target")

    def __init__(self, method: bytes, target: bytes, headers: dict[bytes, bytes], peer: str) -> None:
        self.method = method
        self.target = target
        """As it came: path and query, escaped."""
        self.headers = headers
        """By name in lower case."""
        self.body: bytes | bytearray = b""
        self.size = 0
        """Bytes of the body as they came."""
        self.head_only = False
        """Its answer is that to GET, without the body."""
        self.keep_alive = True
        self.peer = peer


class Response:
    """An answer. ``head`` are complete header lines, each with its line end."""

    __slots__ = ("body", "content_type", "head", "status")

    def __init__(self, status: int, body: bytes = b"", content_type: bytes = JSON, head: bytes = b"") -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.head = head


Respond: TypeAlias = Callable[[Response], None]
Handler: TypeAlias = Callable[[Request, Respond], None]
"""Calls ``respond`` once, perhaps before it returns; raises nothing."""
Refusal: TypeAlias = Callable[[int, str], Response]
"""Makes the answer to what could not be understood, of status and words."""


class Server:
    """What all connections of a listener share."""

    def __init__(self, handler: Handler, refusal: Refusal, limits: Limits) -> None:
        self.handler, self.refusal, self.limits = handler, refusal, limits
        self.most_held = max(limits.all_bodies_bytes, limits.body_bytes)
        self.connections: set[Connection] = set()
        self.held = 0
        """Bytes of bodies that are not answered, and of answers that nobody reads."""
        self.statuses: dict[int, int] = {}
        """Answers by status."""
        self.turned_away = self.shaking = 0
        """Connections that were not taken, and those at their TLS handshake."""
        self.date = b""
        self.stopping = False
        self.loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._sweep()

    def protocol(self) -> "Connection":
        """Return a protocol for a new connection."""
        return Connection(self)

    async def close(self, timeout_s: float) -> None:
        """Let the connections finish what they are at, and end them."""
        self.stopping = True
        end = time.monotonic() + timeout_s
        while self.connections and time.monotonic() < end:
            for connection in list(self.connections):
                connection.end_when_idle()
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()

    def make_room(self, size: int, but: "Connection | None" = None) -> bool:
        """Return whether ``size`` more bytes can be held; who leaves most unread makes room for others."""
        while self.held + size > self.most_held:
            unread = [c for c in self.connections if c.unread_bytes and c is not but]
            if not unread:
                return False
            max(unread, key=lambda c: c.unread_bytes).abort()
        return True

    def _sweep(self) -> None:
        now = time.monotonic()
        self.date = b"date: " + formatdate(usegmt=True).encode() + b"\r\n"
        for connection in list(self.connections):
            if now > connection.deadline:
                connection.overdue(now)
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)


class Connection(asyncio.Protocol):
    """One client. Its deadline is the next moment at which it has to have done something."""

    __slots__ = (
        "_body", "_busy", "_closing", "_deaf", "_header_bytes", "_headers", "_headers_done", "_in_message",
        "_paused", "_peer", "_pumping", "_queue", "_received", "_refused", "_server", "_target",
        "_transport", "_unread", "deadline", "parser", "unread_bytes",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self._server = server
        self.parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._peer = ""
        self._queue: deque[Request] = deque()
        self._headers: dict[bytes, bytes] = {}
        self._target = b""
        self._header_bytes = 0
        self._headers_done = False
        self._body: bytes | bytearray | None = None
        self._received = 0
        self._in_message = False
        self._busy = False
        self._pumping = False
        self._paused = False
        self._unread = False
        self.unread_bytes = 0
        """Of its answers, that are not in the socket."""
        self._closing = False
        self._deaf = False
        self._refused: Response | None = None
        self.deadline = 0.0

    # ---- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        server = self._server
        self.deadline = time.monotonic() + server.limits.header_s
        if server.stopping or len(server.connections) >= server.limits.connections:
            server.turned_away += 1
            self._write(server.refusal(503, "too many connections"), keep_alive=False)
            self._closing = True
            transport.close()
            return
        server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """It is gone; what it waits for is answered into the void."""
        self._closing = True
        for request in self._queue:
            self._server.held -= request.size
        self._queue.clear()
        self._forget_body()
        self._account(0)
        self._server.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._closing or self._deaf or self._refused is not None:
            return
        rest: bytes | None = data
        while rest is not None:
            rest = self._feed(rest)
        if not self._pumping:
            self._pump()

    def _feed(self, data: bytes) -> bytes | None:
        """Parse ``data``; return what a new parser has to begin with, where this one is lost."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT" or self._refused is not None:
                self._deaf = True
                return None
            # RFC 9110, 7.8: who does not upgrade goes on as if it had not been asked for. The parser left out
            # the body, so the request begins once more, without the wish.
            kept = {k: v for k, v in self._headers.items() if k not in {b"upgrade", b"connection"}}
            if not self.parser.should_keep_alive() or b"close" in self._headers[b"connection"].lower():
                kept[b"connection"] = b"close"
            lines = b"".join(b"%b: %b\r\n" % pair for pair in kept.items())
            version = self.parser.get_http_version().encode()
            again = b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self._target, version, lines)
            self.parser = httptools.HttpRequestParser(self)
            return again + data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            self._refuse(400, f"not HTTP: {error}"[:200])
        return None

    def eof_received(self) -> bool:
        """The client sends no more; what it asked is still answered."""
        self._deaf = True
        return self._busy or bool(self._queue)

    def pause_writing(self) -> None:
        """The client does not read."""
        server = self._server
        self._unread = True
        self.deadline = time.monotonic() + server.limits.read_s
        self._account(self._transport.get_write_buffer_size())
        server.make_room(0, but=self)

    def resume_writing(self) -> None:
        """It reads again."""
        self._unread = False
        self._account(0)
        self._rest()
        self._pump()

    def _account(self, unread: int) -> None:
        self._server.held += unread - self.unread_bytes
        self.unread_bytes = unread

    # ---- from the parser

    def on_message_begin(self) -> None:
        """A request begins."""
        self._headers = {}
        self._headers_done = False
        self._target = b""
        self._header_bytes = 0
        self._in_message = True
        if not self._busy:
            self.deadline = time.monotonic() + self._server.limits.header_s

    def on_url(self, url: bytes) -> None:
        """A piece of the target."""
        self._target = self._target + url if self._target else url
        self._header_bytes += len(url)
        if self._header_bytes > self._server.limits.header_bytes:
            self._refuse(414, "the target is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; of several of one name the last counts. What trails a body is passed over."""
        self._header_bytes += len(name) + len(value)
        headers = self._headers
        headers[name.lower()] = value
        if self._header_bytes > self._server.limits.header_bytes or len(headers) > MAX_HEADERS:
            self._refuse(431, "too many headers")

    def on_headers_complete(self) -> None:
        """All headers are there."""
        headers = self._headers
        self._headers_done = True
        said = headers.get(b"content-length")
        if said is not None:
            length = int(said)  # llhttp has let digits through only
            limits = self._server.limits
            if length > limits.body_bytes:
                self._refuse(413, f"the body has {length} bytes, at most {limits.body_bytes} are taken")
                return
            if self._server.held + length > self._server.most_held and not self._server.make_room(length):
                self._refuse(503, "too many bodies are not answered yet")
                return
        elif b"transfer-encoding" in headers:
            self._headers = _Complete(headers)
        else:
            return
        if not self._busy:
            self.deadline = time.monotonic() + self._server.limits.body_s
        if headers.get(b"expect", b"").lower() == b"100-continue" and not self._busy and not self._queue:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        held = self._body
        if held is None:
            self._body = body
        elif isinstance(held, bytes):
            self._body = bytearray(held) + body
        else:
            held += body
        server = self._server
        self._received += len(body)
        server.held += len(body)
        if self._received > server.limits.body_bytes:
            self._refuse(413, f"at most {server.limits.body_bytes} bytes of body are taken")
        elif server.held > server.most_held and not server.make_room(0):
            self._refuse(503, "too many bodies are not answered yet")

    def on_message_complete(self) -> None:
        """A request is there."""
        self._in_message = False
        if self._refused is not None:
            return
        parser = self.parser
        method = parser.get_method()
        if b"upgrade" in self._headers and parser.should_upgrade() and method != b"CONNECT":
            return  # its body is still to come, see `_feed`
        target = self._target
        if target[:1] != b"/" and b"://" in target:
            target = b"/" + target.partition(b"://")[2].partition(b"/")[2]  # in absolute form, as to a proxy
        request = Request(method, target, self._headers, self._peer)
        if method == b"HEAD":
            request.head_only, request.method = True, b"GET"
        request.keep_alive = parser.should_keep_alive()
        if b"connection" in self._headers and parser.get_http_version() == "1.0":
            request.keep_alive = False
        if self._body is not None:
            request.body = self._body
            request.size, self._received, self._body = self._received, 0, None
        self._queue.append(request)
        if len(self._queue) >= MAX_QUEUED and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    # ---- answering

    def _pump(self) -> None:
        """Answer what waits, in its order, as long as answers come at once."""
        self._pumping = True
        server = self._server
        queue = self._queue
        while queue and not self._busy and not self._closing and not self._unread:
            request = queue.popleft()
            self._busy = True
            self.deadline = float("inf")
            server.handler(request, _Respond(self, request))
        self._pumping = False
        if self._paused and len(queue) < MAX_QUEUED // 2 and not self._closing:
            self._paused = False
            self._transport.resume_reading()
        if self._refused is not None and not queue and not self._busy and not self._closing:
            self._last_words(self._refused)

    def respond(self, response: Response, request: Request) -> None:
        """Send the answer to the request that is at work."""
        self._server.held -= request.size
        if not self._busy or self._closing:
            return
        self._busy = False
        keep_alive = request.keep_alive
        server = self._server
        if server.stopping or (self._deaf and not self._queue):
            keep_alive = False
        self._write(response, keep_alive, head_only=request.head_only)
        if not keep_alive:
            self._closing = True
            self._transport.close()
            return
        self._rest()
        if not self._pumping and (self._queue or self._refused is not None):
            self._pump()

    def _write(self, response: Response, keep_alive: bool, *, head_only: bool = False) -> None:  # noqa: FBT001 - the hot path
        server = self._server
        status = response.status
        statuses = server.statuses
        statuses[status] = statuses.get(status, 0) + 1
        body = response.body
        first = _OK if status == 200 else b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b""))  # noqa: PLR2004
        self._transport.write(
            b"%b%bcontent-type: %b\r\n%bcontent-length: %d\r\n%b\r\n%b"
            % (
                first,
                server.date,
                response.content_type,
                response.head,
                len(body),
                b"" if keep_alive else b"connection: close\r\n",
                b"" if head_only else body,
            )
        )

    def _rest(self) -> None:
        limits = self._server.limits
        if self._unread:
            self.deadline = time.monotonic() + limits.read_s
        elif self._in_message:
            self.deadline = time.monotonic() + (limits.body_s if self._headers_done else limits.header_s)
        else:
            self.deadline = time.monotonic() + limits.idle_s

    # ---- ending

    def overdue(self, now: float) -> None:
        """The deadline is over."""
        if self._unread and not self._closing:
            left = self._transport.get_write_buffer_size()
            if left < self.unread_bytes:  # slowly, but it reads
                self._account(left)
                self.deadline = now + self._server.limits.read_s
            else:
                self.abort()
        elif self._closing:
            self.abort()
        elif self._in_message and self._refused is None:
            self._refuse(408, "the request did not arrive in time")
            self._pump()
        else:
            self._closing = True
            self._transport.close()
            self.deadline = now + LINGER_S

    def end_when_idle(self) -> None:
        """Close unless something is being answered."""
        if not self._busy and not self._queue and not self._closing:
            self._closing = True
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._account(0)
        self._transport.abort()

    def _refuse(self, status: int, why: str) -> None:
        if self._refused is None:
            self._refused = self._server.refusal(status, why)
            self._forget_body()

    def _last_words(self, response: Response) -> None:
        """Answer and close, but read on for a moment: what is still sent would reset the answer away."""
        self._write(response, keep_alive=False)
        self._closing = True
        self.deadline = time.monotonic() + LINGER_S
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()

    def _forget_body(self) -> None:
        self._server.held -= self._received
        self._received = 0
        self._body = None


class _Complete(dict[bytes, bytes]):
    """Headers to which what trails a chunked body adds nothing (RFC 9110, 6.5.1)."""

    def __setitem__(self, name: bytes, value: bytes) -> None:
        """Leave it out."""


class _Respond:
    """Answers one request, once."""

    __slots__ = ("_connection", "_request")

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection: Connection | None = connection
        self._request = request

    def __call__(self, response: Response) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.respond(response, self._request)


_OK: Final = b"HTTP/1.1 200 OK\r\n"
