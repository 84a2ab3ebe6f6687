"""HTTP/2 on an event loop (RFC 9113), the side of a server, for calls whose answer ends in trailers.

As ``http`` does for HTTP/1: nothing on the way of an ordinary call creates a task, a future or a timer,
one sweep looks at all deadlines, and all that came in one read is answered in one write.

What a client may cost: header blocks are bounded in bytes, fields and frames; streams per connection
and calls of all connections in number; messages that have not arrived whole and answers that are not read
in bytes, of all connections together. While a client does not read its answers, nothing is read from it, so
what it could make us write stays below the transport's own buffer. A client that resets much more than
it lets us finish, or sends frames that only cost, is told ENHANCE_YOUR_CALM. Whoever neither sends nor
reads on in time is let go: a stream alone where its window is shut, a connection where its socket is.
"""

import asyncio
import logging
import time
from collections import deque
from typing import Any, Final, Protocol

from agent.engine.serve import http2_frames as h2
from agent.engine.serve.http import SWEEP_S, Limits
from agent.engine.serve.http2_frames import ConnectionError2
from agent.engine.serve.http2_headers import Blocks, MalformedError

log = logging.getLogger(__name__)

STREAMS: Final = 256
"""Of one connection at once; clients keep more waiting."""
STREAM_WINDOW: Final = 256 * 1024
CONNECTION_WINDOW: Final = 1024 * 1024
FRAME: Final = 64 * 1024
"""Bytes of the largest frame that is taken."""
MAX_CONTINUATIONS: Final = 16
MAX_RESETS: Final = 100
"""More than calls that ended, on one connection."""
MAX_CHATTER: Final = 500
"""Frames between two sweeps that do nothing but cost: PING, SETTINGS, PRIORITY, empty or unknown ones."""
SMALL_WINDOW: Final = 64
"""Bytes: an honest client waits for more before it opens a window."""
CHATTER_OF_ANSWER: Final = 8
IDLE_S: Final = 600.0
PING_S: Final = 30.0
PING_TIMEOUT_S: Final = 20.0
LINGER_S: Final = 2.0
NEVER: Final = float("inf")
LARGE: Final = 16 * 1024
"""Bytes; answers below it are bounded by the number of calls."""


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


class Handler(Protocol):
    """What answers calls."""

    head: bytes
    """The header block that begins each answer."""

    def meaning(self, fields: list[tuple[bytes, bytes]]) -> Any:
        """Return what the fields of a call say; raises ``MalformedError``."""

    def begin(self, stream: "Stream", said: Any) -> None:
        """Take a new call: set ``stream.receiver``, or end the stream at once."""


class Server:
    """What all connections of a listener share."""

    def __init__(self, handler: Handler, limits: Limits, *, tls: bool = False) -> None:
        self.handler, self.limits, self.tls = handler, limits, tls
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

    def protocol(self) -> "Connection":
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
        for connection in list(self.connections):
            connection.sweep(now)
        self._timer = self.loop.call_later(SWEEP_S, self._sweep)


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
        self.window = STREAM_WINDOW
        """Bytes that the client may still send."""
        self.taken = 0
        """Bytes that it has sent since it was last told that it may send more."""
        self.hold = False
        """Not to tell it for now."""
        self.unsent: deque[bytes | memoryview] = deque()
        self.unsent_bytes = 0
        self.trailers: bytes | None = None
        self._begun = False
        self._stalled = NEVER
        self.ended = False
        """The client has sent all."""
        self.open = True
        self.deadline = NEVER

    def send(self, body: bytes, trailers: bytes | None = None) -> None:
        """Send a piece of the answer; with ``trailers`` the last one, which ends the stream."""
        if not self.open:
            return
        connection = self.connection
        connection.chatter -= CHATTER_OF_ANSWER  # clients open windows and ping for what they get
        size = len(body)
        if not self._begun:
            self._begun = True
            block = connection.server.handler.head
            connection.write(h2.HEAD.pack(len(block) << 8 | h2.HEADERS, h2.END_HEADERS, self.id) + block)
        at_once = not self.unsent and not connection.unread and size <= connection.largest
        if at_once and size <= self.send_window and size <= connection.send_window:
            if size:
                self.send_window -= size
                connection.send_window -= size
                connection.write(h2.HEAD.pack(size << 8 | h2.DATA, 0, self.id) + body)
            if trailers is not None:
                self.finish(trailers)
            return
        self.trailers = trailers
        if size:
            if size >= LARGE and not connection.server.make_room(size, but=connection):
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
        connection.finished += 1
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
            room -= size
            self._account(-size)
            self._stalled = time.monotonic() + connection.server.limits.read_s
        if self.unsent or connection.unread:
            return
        del connection.blocked[self.id]
        self._stalled = NEVER
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
            self.deadline = NEVER
            self.receiver.overdue()

    def _account(self, size: int) -> None:
        self.unsent_bytes += size
        self.connection.unread_bytes += size
        self.connection.server.held += size


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.streams: dict[int, Stream] = {}
        self.blocked: dict[int, Stream] = {}
        """Those with something to send that cannot be sent yet."""
        self.send_window = h2.WINDOW
        self.largest = h2.SMALLEST_FRAME
        """Bytes of a frame that the client takes."""
        self.finished = 0
        self.unread = False
        """The client does not read: nothing more goes into the transport."""
        self.unread_bytes = 0
        self.peer = ""
        self._blocks: Blocks[Any] = Blocks(server.limits.header_bytes, server.handler.meaning)
        self._transport: Any = None
        self._out: list[bytes | memoryview] = []
        self._flushing = False
        """A flush will come without being asked for."""
        self._rest = b""
        self._preface = False
        self._settled = False
        self._window = h2.WINDOW
        self._taken = 0
        self._first_window = h2.WINDOW
        self._last = 0
        self._block: bytearray | None = None
        """Header fields whose end has not come."""
        self._block_of = (0, 0, 0)
        self._resets = 0
        self.chatter = 0
        self._leaving = False
        self._closing = False
        self._deadline = 0.0
        self._heard = 0.0
        self._pinged = False

    # ---- from the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is there."""
        self._transport = transport
        server = self.server
        self._heard = time.monotonic()
        self._deadline = self._heard + server.limits.header_s
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        tls = transport.get_extra_info("ssl_object")
        strange = tls is not None and tls.selected_alpn_protocol() != "h2"
        if strange or server.stopping or len(server.connections) >= server.limits.connections:
            server.turned_away += 1
            self._closing = True
            self._transport.close()
            return
        server.connections.add(self)
        self._transport.write(
            h2.settings(
                {
                    h2.MAX_CONCURRENT_STREAMS: STREAMS,
                    h2.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                    h2.MAX_FRAME_SIZE: FRAME,
                    h2.MAX_HEADER_LIST_SIZE: server.limits.header_bytes,
                }
            )
            + h2.number(h2.WINDOW_UPDATE, 0, CONNECTION_WINDOW - h2.WINDOW)
        )
        self._window = CONNECTION_WINDOW

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """It is gone; what it waits for is given up."""
        self._closing = True
        self._out.clear()
        self._keep(b"")
        for stream in list(self.streams.values()):
            self._give_up(stream)
        self.server.connections.discard(self)

    def eof_received(self) -> bool:
        """A client that sends no more cannot take answers either: its windows would stay shut."""
        return False

    def pause_writing(self) -> None:
        """The client does not read; nothing is read from it until it does."""
        self.unread = True
        self._deadline = time.monotonic() + self.server.limits.read_s
        if not self._closing:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again."""
        self.unread = False
        self._rest_now()
        if not self._closing:
            self._transport.resume_reading()
            self.push()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._closing:
            return
        if self._rest:
            data = self._rest + data
        self._flushing = True
        try:
            at = self._parse(data)
            self._keep(data[at:])
        except ConnectionError2 as error:
            self._fail(error)
        except Exception:
            log.exception("http2.failed")
            self.abort()
        finally:
            self._flushing = False
        self._heard = time.monotonic()
        self._pinged = False
        self._flush()

    def _keep(self, rest: bytes) -> None:
        """Count the part of a frame that waits for its end."""
        self.server.held += len(rest) - len(self._rest)
        self._rest = rest

    # ---- writing

    def write(self, data: bytes | memoryview) -> None:
        """Send with whatever else is sent in this turn of the loop."""
        if self._closing:
            return
        self._out.append(data)
        if not self._flushing:
            self._flushing = True
            self.server.loop.call_soon(self._flush_later)

    def _flush_later(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        if self._out and not self._transport.is_closing():
            data = b"".join(self._out)
            self._out.clear()
            self._transport.write(data)
        if self._leaving and not self.streams and not self._closing:
            self._closing = True
            self._deadline = time.monotonic() + LINGER_S
            self._transport.close()

    def push(self) -> None:
        """Send what waits, of each stream in turn."""
        while self.blocked and self.send_window > 0 and not self.unread and not self._closing:
            before = self.send_window
            for stream in list(self.blocked.values()):
                if stream.id in self.blocked:
                    stream.push(self.largest)
            if self._out:
                self._flush()  # so that the transport can say that it has enough
            if self.send_window == before:
                return
        for stream in list(self.blocked.values()):
            if not stream.unsent and not self.unread:
                stream.push(0)

    # ---- reading

    def _parse(self, data: bytes) -> int:
        """Take all whole frames; return where what is left begins."""
        at, end = 0, len(data)
        if not self._preface:
            at = self._opening(data)
            if not at:
                return 0
        unpack = h2.HEAD.unpack_from
        while end - at >= h2.HEAD_BYTES and not self._closing:
            first, flags, number = unpack(data, at)
            size, kind = first >> 8, first & 0xFF
            if size > FRAME:
                raise ConnectionError2(h2.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            until = at + h2.HEAD_BYTES + size
            if until > end:
                break
            payload = data[at + h2.HEAD_BYTES : until]
            at = until
            number &= 0x7FFFFFFF
            if self._block is not None or not self._settled:
                self._in_order(kind, flags, number)
            if kind == h2.DATA:
                self._data(flags, number, payload)
            elif kind == h2.HEADERS:
                self._headers(flags, number, payload)
            else:
                self._other(kind, flags, number, payload)
        return at

    def _opening(self, data: bytes) -> int:
        """Return where the frames begin; 0 where that has not come."""
        if not h2.PREFACE.startswith(data[: len(h2.PREFACE)]):
            raise ConnectionError2(h2.PROTOCOL_ERROR, "this does not begin as HTTP/2 does")
        if len(data) < len(h2.PREFACE):
            return 0
        self._preface = True
        return len(h2.PREFACE)

    def _in_order(self, kind: int, flags: int, number: int) -> None:
        """Take SETTINGS first, and between HEADERS and the end of its fields nothing else."""
        if self._block is not None and (kind != h2.CONTINUATION or number != self._block_of[0]):
            raise ConnectionError2(h2.PROTOCOL_ERROR, "CONTINUATION is missing")
        if not self._settled:
            if kind != h2.SETTINGS or flags & h2.ACK:
                raise ConnectionError2(h2.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self._settled = True
            self._rest_now()

    def _other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == h2.CONTINUATION:
            self._continuation(flags, payload)
        elif kind == h2.WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == h2.RST_STREAM:
            self._reset_by_client(number, payload)
        elif kind == h2.PUSH_PROMISE:
            raise ConnectionError2(h2.PROTOCOL_ERROR, "clients do not push")
        else:
            self._chat()
            if kind == h2.SETTINGS:
                self._settings(flags, number, payload)
            elif kind == h2.PING:
                self._ping(flags, number, payload)
            elif kind == h2.GOAWAY:
                _on_connection(number)
                self._leaving = True
            elif kind == h2.PRIORITY and len(payload) != 5:  # noqa: PLR2004 - RFC 9113, 6.3
                raise ConnectionError2(h2.FRAME_SIZE_ERROR, "PRIORITY")

    def _chat(self) -> None:
        self.chatter += 1
        if self.chatter > MAX_CHATTER:
            raise ConnectionError2(h2.ENHANCE_YOUR_CALM, "too many frames that do nothing")

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = h2.unpadded(flags, payload)
        if flags & h2.WITH_PRIORITY:
            if len(payload) < 5:  # noqa: PLR2004
                raise ConnectionError2(h2.FRAME_SIZE_ERROR, "HEADERS")
            payload = payload[5:]
        if not number & 1:
            raise ConnectionError2(h2.PROTOCOL_ERROR, f"stream {number} is not a client's")
        if flags & h2.END_HEADERS:
            self._fields(flags, number, payload)
            return
        self._block = bytearray(payload)
        self._block_of = (number, flags, 0)
        self._bounded()

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise ConnectionError2(h2.PROTOCOL_ERROR, "CONTINUATION of nothing")
        number, first, count = self._block_of
        self._block += payload
        self._block_of = (number, first, count + 1)
        self._bounded()
        if flags & h2.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._rest_now()
            self._fields(first, number, block)

    def _bounded(self) -> None:
        """Refuse blocks without end."""
        assert self._block is not None
        if len(self._block) > self.server.limits.header_bytes or self._block_of[2] > MAX_CONTINUATIONS:
            raise ConnectionError2(h2.ENHANCE_YOUR_CALM, "too many header fields")
        if not self._block_of[2]:
            self._deadline = time.monotonic() + self.server.limits.header_s

    def _fields(self, flags: int, number: int, block: bytes) -> None:
        """Begin a call, or take a client's trailers, which say nothing here."""
        stream = self.streams.get(number)
        try:
            said = self._blocks.decode(block)
        except MalformedError:
            said = None
        ended = bool(flags & h2.END_STREAM)
        if stream is not None:
            if stream.ended or not ended:
                self._wrong(stream, h2.STREAM_CLOSED if stream.ended else h2.PROTOCOL_ERROR)
            else:
                self._deliver(stream, b"", ended=True)
            return
        if number <= self._last:  # to one that has ended here, and the client did not know yet
            self._chat()
            return
        if self._leaving:
            return
        self._last = number
        server = self.server
        if said is None:
            self._wrong(Stream(self, number, 0), h2.PROTOCOL_ERROR)
            return
        if len(self.streams) >= STREAMS:
            self._wrong(Stream(self, number, 0), h2.REFUSED_STREAM)
            return
        stream = self.streams[number] = Stream(self, number, self._first_window)
        server.calls += 1
        self._deadline = NEVER
        stream.ended = ended
        server.handler.begin(stream, said)
        if ended and stream.receiver is not None and stream.open:
            stream.receiver.data(b"", ended=True)

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        if size == 0 and not flags & h2.END_STREAM:
            self._chat()
        self._window -= size
        if self._window < 0:
            raise ConnectionError2(h2.FLOW_CONTROL_ERROR, "more than the connection's window")
        self._taken += size
        if self._taken >= CONNECTION_WINDOW // 2:
            self._out.append(h2.number(h2.WINDOW_UPDATE, 0, self._taken))
            self._window += self._taken
            self._taken = 0
        stream = self.streams.get(number)
        body = h2.unpadded(flags, payload)
        if stream is None:
            if number == 0 or (number > self._last and not self._leaving):
                raise ConnectionError2(h2.PROTOCOL_ERROR, f"DATA of stream {number}, which is not open")
            return
        if stream.ended:
            self._wrong(stream, h2.STREAM_CLOSED)
            return
        stream.window -= size
        if stream.window < 0:
            self._wrong(stream, h2.FLOW_CONTROL_ERROR)
            return
        stream.taken += size
        self._deliver(stream, body, ended=bool(flags & h2.END_STREAM))
        if stream.open and not stream.hold and stream.taken >= STREAM_WINDOW // 2:
            stream.resume()

    def _deliver(self, stream: Stream, body: bytes, *, ended: bool) -> None:
        stream.ended = ended
        if stream.receiver is not None:
            stream.receiver.data(body, ended=ended)

    def _window_update(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:  # noqa: PLR2004 - RFC 9113, 6.9
            raise ConnectionError2(h2.FRAME_SIZE_ERROR, "WINDOW_UPDATE")
        more = h2.NUMBER.unpack(payload)[0] & 0x7FFFFFFF
        if number == 0:
            self.send_window += more
            if not more or self.send_window > h2.LARGEST_WINDOW:
                code = h2.FLOW_CONTROL_ERROR if more else h2.PROTOCOL_ERROR
                raise ConnectionError2(code, "WINDOW_UPDATE")
        else:
            stream = self.streams.get(number)
            if stream is None:
                if number > self._last:
                    raise ConnectionError2(h2.PROTOCOL_ERROR, "WINDOW_UPDATE of a stream that is not open")
                self._chat()
                return
            stream.send_window += more
            if not more or stream.send_window > h2.LARGEST_WINDOW:
                self._wrong(stream, h2.FLOW_CONTROL_ERROR if more else h2.PROTOCOL_ERROR)
                return
        if self.blocked:
            self.push()
        elif more < SMALL_WINDOW:
            self._chat()

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        _on_connection(number)
        if len(payload) % 6 or (flags & h2.ACK and payload):
            raise ConnectionError2(h2.FRAME_SIZE_ERROR, "SETTINGS")
        if flags & h2.ACK:
            return
        said = dict(h2.PAIR.iter_unpack(payload))
        window = said.get(h2.INITIAL_WINDOW_SIZE)
        if said.get(h2.ENABLE_PUSH, 0) > 1:
            raise ConnectionError2(h2.PROTOCOL_ERROR, "ENABLE_PUSH")
        largest = said.get(h2.MAX_FRAME_SIZE, self.largest)
        if not h2.SMALLEST_FRAME <= largest <= h2.LARGEST_FRAME:
            raise ConnectionError2(h2.PROTOCOL_ERROR, "MAX_FRAME_SIZE")
        self.largest = min(largest, FRAME)
        if window is not None:
            if window > h2.LARGEST_WINDOW:
                raise ConnectionError2(h2.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")
            change, self._first_window = window - self._first_window, window
            for stream in self.streams.values():
                stream.send_window += change
                if stream.send_window > h2.LARGEST_WINDOW:
                    raise ConnectionError2(h2.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")
        self._out.append(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self.push()

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        _on_connection(number)
        if len(payload) != 8:  # noqa: PLR2004 - RFC 9113, 6.7
            raise ConnectionError2(h2.FRAME_SIZE_ERROR, "PING")
        if not flags & h2.ACK:
            self._out.append(h2.frame(h2.PING, h2.ACK, 0, payload))

    def _reset_by_client(self, number: int, payload: bytes) -> None:
        if len(payload) != 4:  # noqa: PLR2004 - RFC 9113, 6.4
            raise ConnectionError2(h2.FRAME_SIZE_ERROR, "RST_STREAM")
        if number == 0 or (number > self._last and not self._leaving):
            raise ConnectionError2(h2.PROTOCOL_ERROR, "RST_STREAM of a stream that is not open")
        stream = self.streams.get(number)
        if stream is not None:
            self._give_up(stream)
            self._count_reset()
        else:
            self._chat()

    def _count_reset(self) -> None:
        """Who opens calls only to give them up makes work that nobody waits for (CVE-2023-44487)."""
        self._resets += 1
        if self._resets > MAX_RESETS + self.finished:
            raise ConnectionError2(h2.ENHANCE_YOUR_CALM, "too many calls are given up")

    def _wrong(self, stream: Stream, code: int) -> None:
        """Reset a stream on which the client broke the protocol; it cannot do so for ever."""
        self.reset(stream, code)
        self._count_reset()

    # ---- streams and deadlines

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream at once."""
        self.write(h2.number(h2.RST_STREAM, stream.id, code))
        self._give_up(stream)

    def _give_up(self, stream: Stream) -> None:
        receiver = stream.receiver
        self.forget(stream)
        if receiver is not None:
            receiver.lost()

    def forget(self, stream: Stream) -> None:
        """Free what a stream holds."""
        stream.open = False
        stream.receiver = None
        if self.streams.pop(stream.id, None) is None:
            return
        self.server.calls -= 1
        self.server.held -= stream.unsent_bytes
        self.unread_bytes -= stream.unsent_bytes
        stream.unsent_bytes = 0
        stream.unsent.clear()
        self.blocked.pop(stream.id, None)
        if not self.streams:
            self._rest_now()
            if self._leaving and not self._flushing:
                self._flush()

    def _rest_now(self) -> None:
        limits = self.server.limits
        if self._block is not None or not self._settled:
            return  # the deadline for it stands
        if self.streams:
            self._deadline = NEVER
        else:
            self._deadline = time.monotonic() + IDLE_S
        if self.unread:
            self._deadline = time.monotonic() + limits.read_s

    def sweep(self, now: float) -> None:
        """Look at the deadlines."""
        self.chatter = 0
        for stream in list(self.streams.values()):
            stream.sweep(now)
        if now > self._deadline:
            if self._closing or self.unread or not self._settled or self._block is not None:
                self.abort()
            else:
                self.leave(h2.NO_ERROR, "idle")
        elif self._settled and not self._closing and not self.unread:
            if self._pinged and now > self._heard + PING_S + PING_TIMEOUT_S:
                self.abort()
            elif not self._pinged and now > self._heard + PING_S:
                self._pinged = True
                self.write(h2.frame(h2.PING, 0, 0, bytes(8)))

    # ---- ending

    def leave(self, code: int, words: str) -> None:
        """Take no more calls; end when those that are there have ended."""
        if not self._leaving:
            self.write(h2.goaway(self._last, code, words))
            self._leaving = True
        self._flush()

    def _fail(self, error: ConnectionError2) -> None:
        self.write(h2.goaway(self._last, error.code, error.words))
        self._out, last = [], b"".join(self._out)
        for stream in list(self.streams.values()):
            self._give_up(stream)
        self._closing = True
        self._out.clear()
        self._deadline = time.monotonic() + LINGER_S
        self._transport.write(last)
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._closing = True
        self._transport.abort()


def _on_connection(number: int) -> None:
    if number:
        raise ConnectionError2(h2.PROTOCOL_ERROR, "this frame is not of a stream")
