"""One client of HTTP/2: its transport, its streams, and how long it may keep still."""

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from agent.engine.serve import http2_bounds as bounds
from agent.engine.serve import http2_frames as h2
from agent.engine.serve.http2_reader import Reader
from agent.engine.serve.http2_stream import Stream

if TYPE_CHECKING:
    from agent.engine.serve.http2 import Server

log = logging.getLogger(__name__)


class Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, server: "Server") -> None:
        self.server = server
        self.streams: dict[int, Stream] = {}
        self.blocked: dict[int, Stream] = {}
        """Those with something to send that cannot be sent yet."""
        self.send_window = h2.WINDOW
        self.largest = h2.SMALLEST_FRAME
        """Bytes of a frame that the client takes."""
        self.patience = bounds.Patience()
        self.unread = False
        """The client does not read: nothing more goes into the transport."""
        self.unread_bytes = 0
        self.peer = ""
        self.leaving = False
        """No more calls are taken."""
        self.closing = False
        self._reader = Reader(self)
        self._transport: Any = None
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._pushing = self._push_again = False
        self._parted = False
        """What has come is taken in parts; the next will be without being asked for."""
        self._flushing = False
        """A flush will come without being asked for."""
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
            self.closing = True
            self._transport.close()
            return
        server.connections.add(self)
        self._transport.write(
            h2.settings(
                {
                    h2.MAX_CONCURRENT_STREAMS: bounds.STREAMS,
                    h2.INITIAL_WINDOW_SIZE: bounds.STREAM_WINDOW,
                    h2.MAX_FRAME_SIZE: bounds.FRAME,
                    h2.MAX_HEADER_LIST_SIZE: server.limits.header_bytes,
                }
            )
            + h2.number(h2.WINDOW_UPDATE, 0, bounds.CONNECTION_WINDOW - h2.WINDOW)
        )

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """It is gone; what it waits for is given up."""
        self.closing = True
        self._out.clear()
        self._reader.forget()
        self._give_all_up()
        self.server.connections.discard(self)

    def eof_received(self) -> bool:
        """A client that sends no more cannot take answers either: its windows would stay shut."""
        return False

    def pause_writing(self) -> None:
        """The client does not read; nothing is read from it until it does."""
        self.unread = True
        self._deadline = time.monotonic() + self.server.limits.read_s
        if not self.closing:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """It reads again: go on, but not from within the transport, which may be about to close."""
        self.unread = False
        self.rest()
        self.server.loop.call_soon(self._resume)

    def _resume(self) -> None:
        if self.closing or self.unread:
            return
        self.push()
        self._read_on()

    def _read_on(self) -> None:
        if self.closing or self.unread:
            return
        if self._parted:
            self._take_more()
        else:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self.closing:
            return
        self._heard = time.monotonic()
        self._pinged = False
        self._take(data)

    def _take(self, data: bytes) -> None:
        self._flushing = True
        try:
            more = self._reader.feed(data, wait=self._parted)
        except h2.BrokenError as error:
            self._fail(error)
        except Exception:
            log.exception("http2.failed")
            self.abort()
        else:
            if more and not self._parted and not self.closing:
                self._parted = True
                self._transport.pause_reading()
                self.server.loop.call_soon(self._take_more)
        finally:
            self._flushing = False
        self._flush()

    def _take_more(self) -> None:
        """Go on with what came, after the others' turn."""
        if self.closing or self.unread:
            return
        self._parted = False
        self._take(b"")
        if not self._parted and not self.closing and not self.unread:
            self._transport.resume_reading()

    # ---- writing

    def write(self, data: bytes | memoryview) -> None:
        """Send with whatever else is sent in this turn of the loop."""
        if self.closing:
            return
        self._out.append(data)
        self._out_bytes += len(data)
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
            self._out_bytes = 0
            self._transport.write(data)
        if self.leaving and not self.streams and not self.closing:
            self._close(self.server.limits.read_s)

    @property
    def has_room(self) -> bool:
        """Whether more may be written before the transport is asked if it has enough."""
        return not self.unread and self._out_bytes < bounds.OUT

    def push(self, only: Stream | None = None) -> None:
        """Send what waits: of each stream in turn, or of one alone whose window has opened."""
        if self._pushing:  # by a receiver that was told that its answer has left
            self._push_again = True
            return
        self._pushing = True
        try:
            while self._push_round(list(self.blocked.values()) if only is None else [only]):
                only = None if self._push_again else only
        finally:
            self._pushing = False

    def _push_round(self, streams: list[Stream]) -> bool:
        """Send a frame of each; return whether there may be more to send."""
        before, self._push_again = self.send_window, False
        for stream in streams:
            if self.unread or self.closing:
                return False
            if stream.id in self.blocked:
                stream.push(self.largest)
                if not self.has_room:
                    self._flush()  # so that the transport can say that it has enough
        return bool(self.blocked) and (self._push_again or self.send_window != before)

    # ---- streams

    def begin(self, stream: Stream) -> None:
        """Have one more."""
        self.streams[stream.id] = stream
        self.server.calls += 1
        self._deadline = bounds.NEVER

    def reset(self, stream: Stream, code: int) -> None:
        """End a stream at once."""
        self.write(h2.number(h2.RST_STREAM, stream.id, code))
        self.give_up(stream)

    def give_up(self, stream: Stream) -> None:
        """Tell whoever answers a stream that nobody waits."""
        receiver = stream.receiver
        self.forget(stream)
        if receiver is not None:
            receiver.lost()

    def _give_all_up(self) -> None:
        for stream in list(self.streams.values()):
            self.give_up(stream)

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
            self.rest()
            if self.leaving and not self._flushing:
                self._flush()

    # ---- deadlines

    def rest(self) -> None:
        """Find out how long the client may keep still now."""
        now = time.monotonic()
        if self.unread:
            self._deadline = now + self.server.limits.read_s
        elif self._reader.waits:
            self._deadline = min(self._deadline, now + self.server.limits.header_s)
        else:
            self._deadline = bounds.NEVER if self.streams else now + bounds.IDLE_S

    def sweep(self, now: float) -> None:
        """Look at the deadlines."""
        self.patience.sweep()
        for stream in list(self.streams.values()):
            stream.sweep(now)
        if now > self._deadline:
            if self.closing or self.unread or self._reader.waits:
                self.abort()
            else:
                self.leave(h2.NO_ERROR, "idle")
        elif self._reader.settled and not self.closing and not self.unread:
            if self._pinged and now > self._heard + bounds.PING_S + bounds.PING_TIMEOUT_S:
                self.abort()
            elif not self._pinged and now > self._heard + bounds.PING_S:
                self._pinged = True
                self.write(h2.frame(h2.PING, 0, 0, bytes(8)))

    # ---- ending

    def leave(self, code: int, words: str) -> None:
        """Take no more calls; end when those that are there have ended."""
        if not self.leaving:
            self.write(h2.goaway(self._reader.last, code, words))
            self.leaving = True
        self._flush()

    def _fail(self, error: h2.BrokenError) -> None:
        self.write(h2.goaway(self._reader.last, error.code, error.words))
        last = b"".join(self._out)
        self._give_all_up()
        self._out.clear()
        self._transport.write(last)
        self._close(bounds.LINGER_S)

    def _close(self, linger_s: float) -> None:
        """Close when all that was written has been read, and at last after ``linger_s``."""
        self.closing = True
        self._deadline = time.monotonic() + linger_s
        self._transport.close()

    def abort(self) -> None:
        """Close at once; what it holds is free when this returns."""
        self.closing = True
        self._reader.forget()
        self._give_all_up()
        self._transport.abort()
