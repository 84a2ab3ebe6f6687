"""HTTP/2 as no client of gRPC speaks it: each bound of ``http2`` by a raw socket; ``h2`` as a client."""

import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest

from agent.engine.serve import http2_bounds as bounds
from agent.engine.serve import http2_frames as frames
from agent.engine.serve.http2_frames import frame, literal, number
from agent.engine.serve.proto.messages import CLASSES
from tests.serve.conftest import Served, start, until
from tests.serve.grpc_client import ONE, client, message
from tests.serve.raw_http2 import INFER, LAST, OPENING, SMALL, STREAM, WHOLE, Raw, call, framed, head

pytestmark = [pytest.mark.xdist_group("serve-grpc-hostile")]


@pytest.fixture(scope="module")
def served(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("hostile") / "serve.log"
    arguments = ("--grpc-port", "0", "--max-body-mb", "2", "--client-timeout-s", "2")
    running = start(model_directory / "autoencoder.onnx", log, *arguments, cache=cache)
    until(running.ready, "the model is loaded")
    yield running
    with client(running.grpc_port) as c:
        assert c.infer().model_name == "autoencoder"
    assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while Raw.made:
        Raw.made.pop().sock.close()


@pytest.fixture
def raw(served: Served) -> Raw:
    return Raw(served.grpc_port)


def test_calls_that_come_in_one_read_are_all_answered(raw: Raw):
    raw.say(b"".join(call(2 * i + 1) for i in range(200)))
    ends = {s for k, f, s, _ in _until_ends(raw, 200) if k == frames.HEADERS and f & LAST}
    assert ends == {2 * i + 1 for i in range(200)}


def _until_ends(raw: Raw, count: int) -> Iterator[tuple[int, int, int, bytes]]:
    for each in raw.come():
        yield each
        count -= each[0] == frames.HEADERS and bool(each[1] & LAST)
        if not count:
            return


def test_padding_continuation_priority_and_unknown_frames(raw: Raw):
    block = head()
    padded = b"\x03" + bytes(4) + b"\x10" + block[:20] + bytes(3)
    raw.say(
        frame(0xFA, 0, 0, b"unknown")
        + frame(frames.PRIORITY, 0, 1, bytes(5))
        + frame(frames.HEADERS, frames.PADDED | frames.WITH_PRIORITY, 1, padded)
        + frame(frames.CONTINUATION, 0, 1, block[20:30])
        + frame(frames.CONTINUATION, WHOLE, 1, block[30:])
    )
    body = framed(SMALL)
    raw.say(frame(frames.DATA, frames.PADDED, 1, b"\x02" + body[:3] + bytes(2)))
    raw.say(frame(frames.DATA, 0, 1, body[3:]) + frame(frames.HEADERS, WHOLE | LAST, 1, literal(b"x", b"y")))
    assert raw.ended(1) == literal(b"grpc-status", b"0")
    raw.say(frame(frames.PING, 0, 0, b"12345678"))
    assert raw.next(frames.PING)[1:] == (frames.ACK, 0, b"12345678")


P, F, S = frames.PROTOCOL_ERROR, frames.FLOW_CONTROL_ERROR, frames.FRAME_SIZE_ERROR
CALM = frames.ENHANCE_YOUR_CALM
HEAD_1 = frame(frames.HEADERS, WHOLE, 1, head())


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frame(frames.DATA, 0, 1, b"x"), P),
        (frame(frames.DATA, 0, 0, b"x"), P),
        (frame(frames.HEADERS, WHOLE, 2, head()), P),
        (frame(frames.HEADERS, 0, 1, head()) + frame(frames.PING, 0, 0, bytes(8)), P),
        (frame(frames.CONTINUATION, WHOLE, 1, head()), P),
        (frame(frames.HEADERS, WHOLE | frames.PADDED, 1, b"\xff" + head()[:9]), P),
        (frame(frames.PUSH_PROMISE, WHOLE, 1, bytes(4)), P),
        (frame(frames.RST_STREAM, 0, 9, bytes(4)), P),
        (frame(frames.SETTINGS, 0, 1), P),
        (frame(frames.SETTINGS, 0, 0, bytes(5)), S),
        (frames.settings({frames.MAX_FRAME_SIZE: 1}), P),
        (frames.settings({frames.INITIAL_WINDOW_SIZE: 2**31}), F),
        (frame(frames.PING, 0, 0, bytes(7)), S),
        (frame(frames.GOAWAY, 0, 0, bytes(7)), S),
        (frame(frames.WINDOW_UPDATE, 0, 0, bytes(3)), S),
        (number(frames.WINDOW_UPDATE, 0, 0), P),
        (number(frames.WINDOW_UPDATE, 0, 2**31 - 1), F),
        (number(frames.WINDOW_UPDATE, 7, 1), P),
        (HEAD_1 + number(frames.WINDOW_UPDATE, 1, 65_536) + frames.settings({4: 2**31 - 1}), F),
        (b"\xff\xff\xff\0\0\0\0\0\1", S),
        (frame(frames.HEADERS, WHOLE, 1, b"\xff\xff\xff\xff"), frames.COMPRESSION_ERROR),
        (frame(frames.HEADERS, WHOLE, 1, b"\x3f\xe1\xff\x03"), frames.COMPRESSION_ERROR),
        (frame(frames.HEADERS, WHOLE, 1, b"\x20" * 3 + head()), frames.COMPRESSION_ERROR),
        (frame(frames.HEADERS, WHOLE, 1, head() + bytes(40_000)), frames.ENHANCE_YOUR_CALM),
    ],
)
def test_what_breaks_the_protocol_ends_the_connection(raw: Raw, said: bytes, code: int):
    raw.say(said)
    assert raw.code() == code
    assert list(raw.come()) == []


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (HEAD_1 + number(frames.WINDOW_UPDATE, 1, 2**31 - 1), F),
        (HEAD_1 + number(frames.WINDOW_UPDATE, 1, 0), P),
        (frame(frames.HEADERS, WHOLE, 1, literal(b":path", INFER)), P),
        (frame(frames.HEADERS, WHOLE, 1, head(INFER, (b"Upper", b"x"))), P),
        (frame(frames.HEADERS, WHOLE, 1, head(INFER, (b"connection", b"close"))), P),
        (frame(frames.HEADERS, WHOLE, 1, head(INFER, (b":late", b"x"))), P),
        (frame(frames.HEADERS, WHOLE, 1, head(INFER, (b"grpc-timeout", b"soon"))), P),
        (frame(frames.HEADERS, WHOLE, 1, head(INFER, *((b"x%d" % i, b"") for i in range(100)))), P),
    ],
)
def test_what_breaks_one_call_leaves_the_others(raw: Raw, said: bytes, code: int):
    raw.say(said)
    assert raw.code(frames.RST_STREAM) == code
    raw.say(call(3))
    assert raw.ended(3) == literal(b"grpc-status", b"0")


def rapid_resets() -> bytes:
    return b"".join(
        frame(frames.HEADERS, WHOLE, 2 * i + 1, head()) + number(frames.RST_STREAM, 2 * i + 1, frames.CANCEL)
        for i in range(int(1.5 * bounds.AT_ONCE))
    )


def made_to_reset() -> bytes:
    """Resets that the client makes the server send."""
    return b"".join(
        frame(frames.HEADERS, WHOLE, 2 * i + 1, head()) + number(frames.WINDOW_UPDATE, 2 * i + 1, 0)
        for i in range(int(1.5 * bounds.AT_ONCE))
    )


FLOOD = 3 * bounds.AT_ONCE
"""What a machine that is slow may take back in the meantime is less."""
CHEAP_FLOOD = int(1.5 * bounds.AT_ONCE / bounds.CHEAP)


@pytest.mark.parametrize(
    "said",
    [
        rapid_resets(),
        made_to_reset(),
        frame(frames.PING, 0, 0, bytes(8)) * FLOOD,
        frame(frames.SETTINGS, 0, 0) * FLOOD,
        frame(frames.PRIORITY, 0, 1, bytes(5)) * CHEAP_FLOOD,
        number(frames.WINDOW_UPDATE, 0, 1) * CHEAP_FLOOD,
        frame(0xFA, 0, 0) * CHEAP_FLOOD,
        HEAD_1 + frame(frames.DATA, 0, 1) * FLOOD,
        HEAD_1 + frame(frames.DATA, frames.PADDED, 1, b"\x01\0") * FLOOD,
        HEAD_1 + frame(frames.DATA, 0, 1, b"\0") * CHEAP_FLOOD,
        frame(frames.PING, frames.ACK, 0, bytes(8)) * CHEAP_FLOOD,
        HEAD_1 + number(frames.RST_STREAM, 1, 0) * FLOOD,
        HEAD_1 + number(frames.RST_STREAM, 1, 0) + HEAD_1 * FLOOD,
        b"".join(frame(frames.HEADERS, WHOLE | LAST, 2 * i + 1, head()) for i in range(FLOOD)),
        frame(frames.HEADERS, 0, 1) + frame(frames.CONTINUATION, 0, 1) * FLOOD,
        frame(frames.HEADERS, 0, 1) + frame(frames.CONTINUATION, 0, 1, bytes(9000)) * 5,
    ],
    ids=[
        *("rapid-reset", "made-you-reset", "ping", "settings", "priority", "window", "unknown", "empty-data"),
        *("padding", "small-data", "pong", "reset-again", "headers-again", "headers-only"),
        *("empty-continuation", "continuation"),
    ],
)
def test_floods_are_told_to_calm_down(raw: Raw, said: bytes):
    raw.say(said)
    assert raw.code() == CALM


def test_a_bomb_of_header_fields(raw: Raw):
    """A field of 4 kB into the table, then an index to it, again and again (CVE-2016-6581)."""
    value = b"x" * 3900
    entry = (
        b"\x40\x01x" + b"\x7f" + bytes([(len(value) - 127) & 0x7F | 0x80, (len(value) - 127) >> 7]) + value
    )
    raw.say(frame(frames.HEADERS, WHOLE, 1, entry + b"\xbe" * 10_000))
    assert raw.code() == frames.COMPRESSION_ERROR


def test_more_streams_than_are_taken_are_refused(raw: Raw):
    raw.say(b"".join(frame(frames.HEADERS, WHOLE, 2 * i + 1, head()) for i in range(bounds.STREAMS + 1)))
    _, _, stream, payload = raw.next(frames.RST_STREAM)
    assert (stream, payload) == (2 * bounds.STREAMS + 1, struct.pack(">I", frames.REFUSED_STREAM))


def test_more_than_a_window_that_is_not_opened_again(served: Served):
    """Nothing is read from a stream whose answers are not; what comes even so ends it."""
    raw = Raw(served.grpc_port, frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
    said = framed(SMALL) * (bounds.STREAM_WINDOW // len(SMALL) + 200)
    pieces = (frame(frames.DATA, 0, 1, said[i : i + 16_000]) for i in range(0, len(said), 16_000))
    raw.say(frame(frames.HEADERS, WHOLE, 1, head(STREAM)) + b"".join(pieces))
    assert raw.code(frames.RST_STREAM) == frames.FLOW_CONTROL_ERROR


def test_a_message_that_says_that_it_is_too_large_is_not_waited_for(raw: Raw):
    raw.say(HEAD_1 + frame(frames.DATA, 0, 1, b"\0" + (2**31).to_bytes(4, "big")))
    assert b"serve.too_large" in raw.ended(1)
    assert raw.code(frames.RST_STREAM) == frames.NO_ERROR


def test_who_does_not_go_on_is_let_go(served: Served):
    openings = (b"", frames.PREFACE[:9], frames.PREFACE, OPENING + frame(frames.HEADERS, 0, 1))
    silent = [Raw(served.grpc_port, opening) for opening in openings]
    half = frame(frames.DATA, 0, 1, framed(SMALL)[:-1])
    slow = [Raw(served.grpc_port) for _ in range(2)]
    for raw, path in zip(slow, (INFER, STREAM), strict=True):
        raw.say(frame(frames.HEADERS, WHOLE, 1, head(path)) + half)
    shut = Raw(served.grpc_port, frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
    shut.say(call(1))
    for raw in slow:
        assert b"serve.timeout" in raw.ended(1)
    assert shut.code(frames.RST_STREAM) == frames.CANCEL
    shut.say(call(3) + number(frames.WINDOW_UPDATE, 3, 100_000))
    assert shut.ended(3) == literal(b"grpc-status", b"0")
    for raw in silent:
        assert {each[0] for each in raw.come()} <= {frames.SETTINGS, frames.WINDOW_UPDATE}


def test_a_client_that_does_not_read_is_let_go(served: Served):
    raw = Raw(served.grpc_port, frames.PREFACE + frames.settings({frames.INITIAL_WINDOW_SIZE: 2**30}), 4096)
    raw.say(number(frames.WINDOW_UPDATE, 0, 2**30))
    body = framed(message(np.zeros((2000, 64), np.float32)).SerializeToString())
    raw.sock.settimeout(0.2)
    ended = time.monotonic() + 30
    stream = 1
    try:
        while time.monotonic() < ended:  # only the server's end of it ends this
            pieces = [body[i : i + 16_000] for i in range(0, len(body), 16_000)]
            said = frame(frames.HEADERS, WHOLE, stream, head())
            said += b"".join(frame(frames.DATA, 0, stream, piece) for piece in pieces)
            said += frame(frames.DATA, LAST, stream, b"")
            while said:
                try:
                    said = said[raw.sock.send(said) :]
                except TimeoutError:
                    assert time.monotonic() < ended, "it is let go"
            stream += 2
        pytest.fail("it is let go")
    except (ConnectionResetError, BrokenPipeError):
        pass
    until(
        lambda: served.metric('pithead_model_in_flight{model="autoencoder",version="1"}') == 0, "all is done"
    )


def test_trailers_alone_and_a_message_that_is_no_plain_text(raw: Raw):
    raw.say(call(1, head(b"/x%/\xe9")))
    block = raw.ended(1)
    assert literal(b"grpc-status", b"12") in block
    assert b"/x%25/%C3%A9" in block
    raw.say(frame(frames.HEADERS, WHOLE | LAST, 3, head().replace(b"application/grpc", b"application/json")))
    assert raw.ended(3) == b"\x10\x07:status\x03415"


def test_the_h2_library_as_a_client(served: Served):
    made = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    made.initiate_connection()
    fields = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", INFER.decode())]
    fields += [("content-type", "application/grpc+proto"), ("te", "trailers"), ("grpc-timeout", "20S")]
    big = framed(message(np.zeros((500, 64), np.float32)).SerializeToString())
    answers: dict[int, bytes] = {}
    ends: dict[int, dict[str, str]] = {}
    with socket.create_connection(("127.0.0.1", served.grpc_port), timeout=20) as sock:
        for i in range(20):
            stream = 2 * i + 1
            made.send_headers(stream, fields)
            left = framed(SMALL) if i % 5 else big
            while left:
                window = made.local_flow_control_window(stream)
                size = min(len(left), window, made.max_outbound_frame_size)
                if size:
                    made.send_data(stream, left[:size])
                    left = left[size:]
                sock.sendall(made.data_to_send())
                if not size:
                    _take(made, sock, answers, ends)
            made.end_stream(stream)
        while len(ends) < 20:
            sock.sendall(made.data_to_send())
            _take(made, sock, answers, ends)
    assert all(each["grpc-status"] == "0" for each in ends.values())
    said = CLASSES["ModelInferResponse"].FromString(answers[3][5:])
    assert list(said.outputs[0].shape) == [1, 64]
    assert len(said.raw_output_contents[0]) == ONE.nbytes


def _take(
    made: h2.connection.H2Connection,
    sock: socket.socket,
    answers: dict[int, bytes],
    ends: dict[int, dict[str, str]],
) -> None:
    for event in made.receive_data(sock.recv(65536)):
        if isinstance(event, h2.events.DataReceived):
            answers[event.stream_id] = answers.get(event.stream_id, b"") + event.data
            made.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.TrailersReceived):
            ends[event.stream_id] = dict(event.headers)
