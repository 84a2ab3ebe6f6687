"""Bounds of HTTP/2 that a client meets only after minutes or gigabytes: a server with smaller ones."""

import asyncio
import gzip
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest

from agent.engine.serve import grpc_server, http
from agent.engine.serve import http2_bounds as bounds
from agent.engine.serve import http2_frames as frames
from agent.engine.serve.grpc_stream import AHEAD
from agent.engine.serve.http2_connection import Connection
from agent.engine.serve.http2_frames import frame, literal, number
from agent.engine.serve.requests import InferResponse
from agent.engine.serve.tokens import Principal, Tokens
from tests.engine.certificates import Identity
from tests.serve.conftest import until
from tests.serve.grpc_client import message
from tests.serve.raw_http2 import INFER, LAST, OPENING, SMALL, STREAM, WHOLE, Raw, call, framed, head

OK = literal(b"grpc-status", b"0")
WIDE = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31 - 1})
SHUT = frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0})
T = TypeVar("T")


class Answers:
    """A service whose answers come when the test wants them."""

    def __init__(self, floats: int) -> None:
        policy = SimpleNamespace(timeout_s=30.0)
        self.catalogue = SimpleNamespace(limits=SimpleNamespace(policy=policy))
        self.grpc_answers: dict[str, int] = {}
        self.at_once = True
        self.waiting: list[Callable[[], None]] = []
        self._floats = floats

    def submit(self, request: Any, done: Callable[[InferResponse], None]) -> None:
        outputs = {"y": np.zeros(self._floats, np.float32)}
        answer = InferResponse(request.model, "1", outputs, request.id)
        if self.at_once:
            asyncio.get_running_loop().call_soon(done, answer)
        else:
            self.waiting.append(lambda: done(answer))


class Within:
    """The listener, in a loop on a thread of its own."""

    def __init__(
        self,
        limits: http.Limits,
        floats: int = 4,
        tokens: Tokens | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.answers = Answers(floats)
        self.server = self.run(self._start(grpc_server.Listen("127.0.0.1", 0, limits, tls), tokens))
        self.port = self.server.port

    async def _start(self, listen: grpc_server.Listen, tokens: Tokens | None) -> grpc_server.Server:
        server = grpc_server.Server(self.answers, tokens, listen)  # type: ignore[arg-type]
        await server.start()
        return server

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def do(self, work: Callable[[], T]) -> T:
        """In the loop's thread."""

        async def done() -> T:
            return work()

        result: T = self.run(done())
        return result

    @property
    def http2(self) -> Any:
        return self.server.http2

    @property
    def connection(self) -> Connection:
        until(lambda: self.http2.connections, "it is connected")
        (found,) = self.http2.connections
        assert isinstance(found, Connection)
        return found

    def answer(self) -> None:
        """All that wait, the newest first."""
        waiting, self.answers.waiting = self.answers.waiting, []
        for done in reversed(waiting):
            done()

    def close(self) -> None:
        self.run(self.server.stop(0))
        self.do(self.answer)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(20)
        self.loop.close()
        assert (self.http2.held, self.http2.calls) == (0, 0), "all is given back"


@pytest.fixture
def starts() -> Iterator[Callable[..., Within]]:
    running: list[Within] = []

    def begin(*, floats: int = 4, tokens: Any = None, tls: Any = None, **limits: Any) -> Within:
        running.append(Within(http.Limits(**limits), floats, tokens, tls))
        return running[-1]

    yield begin
    for each in running:
        each.close()
    while Raw.made:
        Raw.made.pop().sock.close()


def data(stream: int, payload: bytes, size: int = 16_000, last: int = LAST) -> bytes:
    pieces = [payload[i : i + size] for i in range(0, len(payload), size)]
    made = [frame(frames.DATA, 0, stream, piece) for piece in pieces]
    return b"".join(made) + (frame(frames.DATA, last, stream) if last else b"")


def opened(stream: int, path: bytes = INFER) -> bytes:
    return frame(frames.HEADERS, WHOLE, stream, head(path))


def messages(raw: Raw, stream: int = 1) -> tuple[int, bytes]:
    """How many messages come on a stream, and the block with which it ends."""
    got, count, at = bytearray(), 0, 0
    for kind, flags, number_, payload in raw.come():
        if (kind, number_) == (frames.DATA, stream):
            got += payload
        elif (kind, number_) == (frames.HEADERS, stream) and flags & LAST:
            while at < len(got):
                count, at = count + 1, at + 5 + int.from_bytes(got[at + 1 : at + 5], "big")
            return count, payload
    raise AssertionError("the stream does not end")


# ---- bytes


def test_halves_of_messages_are_bounded_together(starts: Callable[..., Within]):
    served = starts(body_bytes=200_000, all_bodies_bytes=200_000)
    body = framed(message(np.zeros((500, 64), np.float32)).SerializeToString())
    first, second = Raw(served.port), Raw(served.port)
    first.say(opened(1) + data(1, body[:110_000], last=0))
    until(lambda: served.http2.held >= 110_000, "it is held")
    second.say(opened(1) + data(1, body[:110_000], last=0))
    assert b"serve.overloaded" in second.ended(1)
    first.say(data(1, body[110_000:]))
    assert first.ended(1) == OK


def test_what_a_message_inflates_to_counts(starts: Callable[..., Within]):
    served = starts(body_bytes=400_000, all_bodies_bytes=400_000)
    served.answers.at_once = False
    raw = Raw(served.port)
    packed = gzip.compress(message(np.zeros((1000, 64), np.float32)).SerializeToString())
    body = b"\1" + len(packed).to_bytes(4, "big") + packed
    block = head(STREAM, (b"grpc-encoding", b"gzip"))
    raw.say(frame(frames.HEADERS, WHOLE, 1, block) + frame(frames.DATA, LAST, 1, body * 3))
    until(lambda: len(served.answers.waiting) == 1 and not served.http2.held < 256_000, "one is under way")
    until(lambda: not served.server.handler._tasks, "the others are taken apart")
    assert len(served.answers.waiting) == 1, "there is room for one"
    served.do(served.answer)
    assert messages(raw) == (3, OK)
    assert served.answers.grpc_answers == {"OK": 1}


def test_who_reads_nothing_makes_room_for_others(starts: Callable[..., Within]):
    served = starts(floats=50_000, body_bytes=1_000_000, all_bodies_bytes=1_000_000)
    deaf = Raw(served.port, SHUT)
    for i in range(4):
        deaf.say(call(2 * i + 1))
    until(lambda: served.http2.held >= 800_000, "answers wait")
    other = Raw(served.port, WIDE + number(frames.WINDOW_UPDATE, 0, 2**30))
    other.say(opened(1) + data(1, framed(message(np.zeros((1000, 64), np.float32)).SerializeToString())))
    assert other.ended(1) == OK
    assert not [each for each in deaf.come() if each[0] == frames.RST_STREAM], "its connection has ended"


def test_one_connection_leaves_little_in_the_transport(starts: Callable[..., Within]):
    served = starts(floats=15_000)
    opening = WIDE + number(frames.WINDOW_UPDATE, 0, 1)
    deaf = Raw(served.port, opening, buffer=4096)
    deaf.say(b"".join(call(2 * i + 1) for i in range(200)))
    until(lambda: served.http2.held > 199 * 60_000 - 65_536, "answers wait for the window")
    deaf.say(number(frames.WINDOW_UPDATE, 0, 2**30))
    until(lambda: served.connection.unread, "the socket is full")
    transport = served.connection._transport
    assert served.do(transport.get_write_buffer_size) < 4 * bounds.OUT
    assert served.http2.held > 5_000_000


def test_a_unary_call_is_one_message(starts: Callable[..., Within]):
    raw = Raw(starts().port)
    raw.say(opened(1) + data(1, framed(SMALL) + b"x", last=0))
    assert b"more than one" in raw.ended(1)


# ---- time


def test_who_asks_nothing_is_let_go(starts: Callable[..., Within], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "IDLE_S", 0.2)
    served = starts()
    idle, silent, once = Raw(served.port), Raw(served.port), Raw(served.port)
    silent.say(opened(1, STREAM))
    once.say(opened(1, STREAM) + frame(frames.DATA, 0, 1, framed(SMALL)))
    assert idle.code() == frames.NO_ERROR
    assert list(idle.come()) == []
    for raw, count in ((silent, 0), (once, 1)):
        said, block = messages(raw)
        assert (said, b"no message arrived" in block) == (count, True)


def test_a_message_that_stops_in_its_midst_is_waited_for_anew_after_each(starts: Callable[..., Within]):
    served = starts()
    raw, body = Raw(served.port), framed(SMALL)
    raw.say(opened(1, STREAM) + data(1, body[:9], last=0))
    until(lambda: served.http2.held, "a part has come")
    (stream,) = served.connection.streams.values()
    before = stream.deadline
    raw.say(data(1, body[9:] + body[:9], last=0))
    raw.next(frames.DATA)
    until(lambda: before < stream.deadline < bounds.NEVER, "the next one has its own time")


def test_who_does_not_answer_pings_is_let_go(starts: Callable[..., Within], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds, "PING_S", 0.1)
    monkeypatch.setattr(bounds, "PING_TIMEOUT_S", 2.0)
    served = starts()
    alive, dead = Raw(served.port), Raw(served.port)
    for raw in (alive, dead):
        raw.say(opened(1, STREAM))
    ended = threading.Event()
    until(lambda: len(served.http2.connections) == 2, "both are there")

    def read() -> None:
        list(dead.come())
        ended.set()

    reader = threading.Thread(target=read)
    reader.start()
    while not ended.is_set():
        payload = alive.next(frames.PING)[3]
        alive.say(frame(frames.PING, frames.ACK, 0, payload))
    reader.join()
    alive.say(frame(frames.DATA, LAST, 1, framed(SMALL)))
    assert messages(alive) == (1, OK)


def test_a_silent_stream_does_not_outlive_its_token(starts: Callable[..., Within]):
    known = {hashlib.sha256(b"secret").digest(): Principal("line", admin=False)}
    tokens = Tokens(known)
    served = starts(tokens=tokens)
    raw = Raw(served.port)
    block = head(STREAM, (b"authorization", b"Bearer secret"))
    raw.say(frame(frames.HEADERS, WHOLE, 1, block) + frame(frames.DATA, 0, 1, framed(SMALL)))
    raw.next(frames.DATA)
    served.do(lambda: tokens.become(Tokens({})))
    assert b"auth.invalid" in raw.ended(1)


def test_the_end_of_the_server(starts: Callable[..., Within]):
    served = starts()
    served.answers.at_once = False
    heard, never = Raw(served.port), Raw(served.port)
    heard.say(call(1))
    until(lambda: len(served.answers.waiting) == 1, "it is asked")
    waiting = served.answers.waiting
    never.say(call(1) + call(3))
    until(lambda: len(served.answers.waiting) == 3, "all are asked")
    stopped = asyncio.run_coroutine_threadsafe(served.server.stop(1), served.loop)
    kind, _, _, payload = heard.next(frames.GOAWAY)
    assert (kind, struct.unpack(">II", payload[:8])) == (frames.GOAWAY, (1, frames.NO_ERROR))
    heard.say(call(3))
    served.do(waiting[0])
    assert heard.ended(1) == OK
    assert list(heard.come()) == [], "what it asks after that is for another server"
    assert struct.unpack(">II", never.next(frames.GOAWAY)[3][:8]) == (3, frames.NO_ERROR)
    assert list(never.come()) == []
    stopped.result(20)


# ---- TLS


def test_tls_without_http2(starts: Callable[..., Within], tmp_path: Path):
    made = Identity(tmp_path, "localhost")
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(made.certificate, made.key)
    served = starts(tls=here)
    there = ssl.create_default_context(cafile=str(made.certificate))

    def speak() -> ssl.SSLSocket:
        sock = socket.create_connection(("127.0.0.1", served.port), 20)
        return there.wrap_socket(sock, server_hostname="localhost")

    with speak() as sock:
        assert sock.recv(100) == b""
    there.set_alpn_protocols(["h2"])
    with speak() as sock:
        sock.sendall(OPENING)
        assert frames.HEAD.unpack_from(sock.recv(100))[0] & 0xFF == frames.SETTINGS


# ---- honest clients


def test_uploads_with_many_window_updates(starts: Callable[..., Within]):
    raw = Raw(starts().port)
    body = framed(message(np.zeros((800, 64), np.float32)).SerializeToString())
    for i in range(10):
        stream = 2 * i + 1
        wider = number(frames.WINDOW_UPDATE, 0, 5) + number(frames.WINDOW_UPDATE, stream, 5)
        pieces = (frame(frames.DATA, 0, stream, body[at : at + 500]) for at in range(0, len(body), 500))
        raw.say(opened(stream) + b"".join(piece + 2 * wider for piece in pieces))
        raw.say(frame(frames.DATA, LAST, stream))
        assert raw.ended(stream) == OK


def test_a_ping_for_each_answer(starts: Callable[..., Within]):
    """As grpc-go measures a connection."""
    raw = Raw(starts().port)
    raw.say(number(frames.WINDOW_UPDATE, 0, 2**30))
    for i in range(2 * bounds.AT_ONCE // 50):
        numbers = range(100 * i + 1, 100 * i + 101, 2)
        raw.say(b"".join(call(n) for n in numbers))
        for n in numbers:
            assert raw.ended(n) == OK
        raw.say(frame(frames.PING, 0, 0, bytes(8)) * 50)
    raw.say(call(99_999))
    assert raw.ended(99_999) == OK


@pytest.mark.parametrize("at_once", [True, False])
def test_many_requests_on_a_stream_that_has_ended(starts: Callable[..., Within], at_once: Any):
    served = starts()
    served.answers.at_once = at_once
    raw = Raw(served.port)
    raw.say(opened(1, STREAM) + frame(frames.DATA, LAST, 1, framed(SMALL) * 150))
    for count in () if at_once else (AHEAD, AHEAD, 150 - 2 * AHEAD):
        until(lambda count=count: len(served.answers.waiting) == count, "as many are under way as may be")
        served.do(served.answer)
    assert messages(raw) == (150, OK)


def test_a_client_that_reads_late(starts: Callable[..., Within]):
    served = starts(floats=10_000)
    raw = Raw(served.port, WIDE + number(frames.WINDOW_UPDATE, 0, 2**30), buffer=200_000)
    raw.say(opened(1, STREAM) + data(1, framed(SMALL) * 300))
    until(lambda: served.connection.unread, "the socket is full")
    assert messages(raw) == (300, OK)


def test_a_window_that_opens_for_many_streams(starts: Callable[..., Within]):
    served = starts(floats=5000)
    raw = Raw(served.port, WIDE)
    for i in range(250):
        raw.say(opened(2 * i + 1, STREAM) + frame(frames.DATA, LAST, 2 * i + 1, framed(SMALL) * 3))
    until(lambda: len(served.connection.blocked) >= 240, "answers wait for the window")
    raw.say(number(frames.WINDOW_UPDATE, 0, 2**30))
    left, size = 250, 0
    for kind, flags, _, payload in raw.come():
        size += len(payload) if kind == frames.DATA else 0
        left -= kind == frames.HEADERS and bool(flags & LAST)
        if not left:
            break
    assert size > 250 * 3 * 20_000
