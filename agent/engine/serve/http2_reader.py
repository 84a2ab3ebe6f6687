"""What a client of HTTP/2 says: bytes in, frames told apart, and what each of them does to its connection."""

from typing import TYPE_CHECKING, Any

from agent.engine.serve import http2_bounds as bounds
from agent.engine.serve import http2_frames as h2
from agent.engine.serve.http2_headers import Blocks, MalformedError
from agent.engine.serve.http2_stream import Stream

if TYPE_CHECKING:
    from agent.engine.serve.http2_connection import Connection

_PRIORITY_BYTES, _PING_BYTES, _GOAWAY_BYTES, _NUMBER_BYTES, _SETTING_BYTES = 5, 8, 8, 4, 6


class Reader:
    """Of one connection. Raises ``BrokenError`` where nothing that is said can be trusted any more."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        server = self._server = connection.server
        self._blocks: Blocks[Any] = Blocks(server.limits.header_bytes, server.handler.meaning)
        self._rest = b""
        self._turn = 0
        """Frames that may still be taken in this turn of the loop."""
        self._preface = False
        self.settled = False
        """Its first SETTINGS have come."""
        self._window = bounds.CONNECTION_WINDOW
        """Bytes that it may still send on all streams."""
        self._taken = 0
        self._first_window = h2.WINDOW
        """Bytes that may be sent on a new stream."""
        self.last = 0
        """The newest stream."""
        self._block: bytearray | None = None
        """Header fields whose end has not come."""
        self._block_of = (0, 0, 0)
        """Their stream, the flags of its first frame, and how many came after that."""

    @property
    def waits(self) -> bool:
        """Whether the client has begun what it must end soon."""
        return self._block is not None or not self.settled

    def feed(self, data: bytes, *, wait: bool = False) -> bool:
        """Take what came, or let it ``wait`` behind what does; return whether whole frames may be left."""
        if self._rest:
            data = self._rest + data
        if wait:
            self._keep(data)
            return True
        at = self._parse(data)
        self._keep(data[at:])
        return self._turn <= 0

    def forget(self) -> None:
        """Hold nothing any more."""
        self._keep(b"")

    def _keep(self, rest: bytes) -> None:
        """Count the part of a frame that waits for its end."""
        self._server.held += len(rest) - len(self._rest)
        self._rest = rest

    # ---- frames

    def _parse(self, data: bytes) -> int:
        """Take all whole frames; return where what is left begins."""
        at, end = 0, len(data)
        if not self._preface:
            at = self._opening(data)
            if not at:
                return 0
        self._turn = bounds.TURN
        unpack, connection = h2.HEAD.unpack_from, self._connection
        while end - at >= h2.HEAD_BYTES and self._turn > 0 and not connection.closing:
            first, flags, number = unpack(data, at)
            size, kind = first >> 8, first & 0xFF
            if size > bounds.FRAME:
                raise h2.BrokenError(h2.FRAME_SIZE_ERROR, f"a frame of {size} bytes")
            until = at + h2.HEAD_BYTES + size
            if until > end:
                break
            payload = data[at + h2.HEAD_BYTES : until]
            at = until
            self._turn -= 1
            number &= 0x7FFFFFFF
            if self._block is not None or not self.settled:
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
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "this does not begin as HTTP/2 does")
        if len(data) < len(h2.PREFACE):
            return 0
        self._preface = True
        return len(h2.PREFACE)

    def _in_order(self, kind: int, flags: int, number: int) -> None:
        """Take SETTINGS first, and between HEADERS and the end of its fields nothing else."""
        if self._block is not None and (kind != h2.CONTINUATION or number != self._block_of[0]):
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "CONTINUATION is missing")
        if not self.settled:
            if kind != h2.SETTINGS or flags & h2.ACK:
                raise h2.BrokenError(h2.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            self.settled = True
            self._connection.rest()

    def _other(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == h2.CONTINUATION:
            self._continuation(flags, payload)
        elif kind == h2.WINDOW_UPDATE:
            self._window_update(number, payload)
        elif kind == h2.RST_STREAM:
            self._reset(number, payload)
        elif kind == h2.SETTINGS:
            self._settings(flags, number, payload)
        elif kind == h2.PING:
            self._ping(flags, number, payload)
        elif kind == h2.GOAWAY:
            _on_connection(number)
            _sized(payload[:_GOAWAY_BYTES], _GOAWAY_BYTES, "GOAWAY")
            self._connection.patience.take(1)
            self._connection.leaving = True
        elif kind == h2.PUSH_PROMISE:
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "clients do not push")
        else:
            self._connection.patience.take(bounds.CHEAP)
            if kind == h2.PRIORITY:
                _sized(payload, _PRIORITY_BYTES, "PRIORITY")

    # ---- calls

    def _headers(self, flags: int, number: int, payload: bytes) -> None:
        payload = h2.unpadded(flags, payload)
        if flags & h2.WITH_PRIORITY:
            _sized(payload[:_PRIORITY_BYTES], _PRIORITY_BYTES, "HEADERS")
            payload = payload[_PRIORITY_BYTES:]
        if not number & 1:
            raise h2.BrokenError(h2.PROTOCOL_ERROR, f"stream {number} is not a client's")
        if flags & h2.END_HEADERS:
            self._fields(flags, number, payload)
            return
        self._block = bytearray(payload)
        self._block_of = (number, flags, 0)
        self._bounded()
        self._connection.rest()

    def _continuation(self, flags: int, payload: bytes) -> None:
        if self._block is None:
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "CONTINUATION of nothing")
        number, first, count = self._block_of
        self._block += payload
        self._block_of = (number, first, count + 1)
        self._bounded()
        if flags & h2.END_HEADERS:
            block, self._block = bytes(self._block), None
            self._connection.rest()
            self._fields(first, number, block)

    def _bounded(self) -> None:
        """Refuse blocks without end."""
        assert self._block is not None
        if (
            len(self._block) > self._server.limits.header_bytes
            or self._block_of[2] > bounds.MAX_CONTINUATIONS
        ):
            raise h2.BrokenError(h2.ENHANCE_YOUR_CALM, "too many header fields")

    def _fields(self, flags: int, number: int, block: bytes) -> None:
        """Begin a call, or take a client's trailers, which say nothing here."""
        connection = self._connection
        stream = connection.streams.get(number)
        try:
            said = self._blocks.decode(block)
        except MalformedError:
            said = None
        ended = bool(flags & h2.END_STREAM)
        if stream is not None:
            if stream.ended or not ended:
                self._wrong(stream, h2.STREAM_CLOSED if stream.ended else h2.PROTOCOL_ERROR)
            else:
                _deliver(stream, b"", ended=True)
            return
        if number <= self.last:  # it has ended here, and the client did not know yet
            connection.patience.take(1)
            return
        if connection.leaving:  # another server will answer it
            connection.patience.take(bounds.CHEAP)
            return
        self.last = number
        if said is None:
            self._wrong(Stream(connection, number, 0), h2.PROTOCOL_ERROR)
        elif len(connection.streams) >= bounds.STREAMS:
            self._wrong(Stream(connection, number, 0), h2.REFUSED_STREAM)
        else:
            self._begin(number, said, ended=ended)

    def _begin(self, number: int, said: Any, *, ended: bool) -> None:
        connection = self._connection
        if ended:  # no message, but an answer, which gives one back
            connection.patience.take(2)
        stream = Stream(connection, number, self._first_window)
        connection.begin(stream)
        self._turn -= bounds.CALL
        stream.ended = ended
        self._server.handler.begin(stream, said)
        if ended and stream.receiver is not None and stream.open:
            stream.receiver.data(b"", ended=True)

    def _data(self, flags: int, number: int, payload: bytes) -> None:
        size = len(payload)
        self._window -= size
        if self._window < 0:
            raise h2.BrokenError(h2.FLOW_CONTROL_ERROR, "more than the connection's window")
        self._taken += size
        connection = self._connection
        if self._taken >= bounds.CONNECTION_WINDOW // 2:
            connection.write(h2.number(h2.WINDOW_UPDATE, 0, self._taken))
            self._window += self._taken
            self._taken = 0
        stream = connection.streams.get(number)
        body = h2.unpadded(flags, payload)
        ended = bool(flags & h2.END_STREAM)
        if len(body) < bounds.SMALL and not ended:
            connection.patience.take(bounds.CHEAP if body else 1)
        if stream is None:
            if number == 0 or (number > self.last and not connection.leaving):
                raise h2.BrokenError(h2.PROTOCOL_ERROR, f"DATA of stream {number}, which is not open")
            return
        if stream.ended:
            self._wrong(stream, h2.STREAM_CLOSED)
            return
        stream.window -= size
        if stream.window < 0:
            self._wrong(stream, h2.FLOW_CONTROL_ERROR)
            return
        stream.taken += size
        _deliver(stream, body, ended=ended)
        if stream.open and not stream.hold and stream.taken >= bounds.STREAM_WINDOW // 2:
            stream.resume()

    def _reset(self, number: int, payload: bytes) -> None:
        """Give a call up. Who opens calls only for that makes work for nobody (CVE-2023-44487)."""
        _sized(payload, _NUMBER_BYTES, "RST_STREAM")
        connection = self._connection
        if number == 0 or (number > self.last and not connection.leaving):
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "RST_STREAM of a stream that is not open")
        stream = connection.streams.get(number)
        if stream is not None:
            connection.give_up(stream)
        connection.patience.take(1)

    def _wrong(self, stream: Stream, code: int) -> None:
        """Reset a stream on which the client broke the protocol; it cannot do so for ever."""
        self._connection.reset(stream, code)
        self._connection.patience.take(1)

    # ---- windows, settings, pings

    def _window_update(self, number: int, payload: bytes) -> None:
        _sized(payload, _NUMBER_BYTES, "WINDOW_UPDATE")
        more = h2.NUMBER.unpack(payload)[0] & 0x7FFFFFFF
        connection = self._connection
        before, looked_at = connection.send_window, 1
        if number == 0:
            before += more
            connection.send_window = before
            if not more or before > h2.LARGEST_WINDOW:
                raise h2.BrokenError(h2.FLOW_CONTROL_ERROR if more else h2.PROTOCOL_ERROR, "WINDOW_UPDATE")
            if connection.blocked:
                looked_at += len(connection.blocked)
                connection.push()
        elif (stream := connection.streams.get(number)) is not None:
            stream.send_window += more
            if not more or stream.send_window > h2.LARGEST_WINDOW:
                self._wrong(stream, h2.FLOW_CONTROL_ERROR if more else h2.PROTOCOL_ERROR)
                return
            if number in connection.blocked:
                connection.push(stream)
        elif number > self.last:
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "WINDOW_UPDATE of a stream that is not open")
        if before - connection.send_window < bounds.SMALL:
            connection.patience.take(bounds.CHEAP * looked_at)

    def _settings(self, flags: int, number: int, payload: bytes) -> None:
        _on_connection(number)
        if len(payload) % _SETTING_BYTES or (flags & h2.ACK and payload):
            raise h2.BrokenError(h2.FRAME_SIZE_ERROR, "SETTINGS")
        connection = self._connection
        if flags & h2.ACK:
            connection.patience.take(bounds.CHEAP)
            return
        connection.patience.take(
            1 + bounds.CHEAP * (len(payload) // _SETTING_BYTES + len(connection.streams))
        )
        said = dict(h2.PAIR.iter_unpack(payload))
        if said.get(h2.ENABLE_PUSH, 0) > 1:
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "ENABLE_PUSH")
        largest = said.get(h2.MAX_FRAME_SIZE, connection.largest)
        if not h2.SMALLEST_FRAME <= largest <= h2.LARGEST_FRAME:
            raise h2.BrokenError(h2.PROTOCOL_ERROR, "MAX_FRAME_SIZE")
        connection.largest = min(largest, bounds.FRAME)
        self._first_windows(said.get(h2.INITIAL_WINDOW_SIZE, self._first_window))
        connection.write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        connection.push()

    def _first_windows(self, window: int) -> None:
        """Change the window with which streams begin, and by as much that of those that are open."""
        change, self._first_window = window - self._first_window, window
        if window > h2.LARGEST_WINDOW:
            raise h2.BrokenError(h2.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")
        if not change:
            return
        for stream in self._connection.streams.values():
            stream.send_window += change
            if stream.send_window > h2.LARGEST_WINDOW:
                raise h2.BrokenError(h2.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE")

    def _ping(self, flags: int, number: int, payload: bytes) -> None:
        _on_connection(number)
        _sized(payload, _PING_BYTES, "PING")
        if flags & h2.ACK:
            self._connection.patience.take(bounds.CHEAP)
        else:
            self._connection.patience.take(1)
            self._connection.write(h2.frame(h2.PING, h2.ACK, 0, payload))


def _deliver(stream: Stream, body: bytes, *, ended: bool) -> None:
    stream.ended = ended
    if stream.receiver is not None:
        stream.receiver.data(body, ended=ended)


def _on_connection(number: int) -> None:
    if number:
        raise h2.BrokenError(h2.PROTOCOL_ERROR, "this frame is not of a stream")


def _sized(payload: bytes, size: int, words: str) -> None:
    if len(payload) != size:
        raise h2.BrokenError(h2.FRAME_SIZE_ERROR, words)
