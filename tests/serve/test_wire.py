"""The HTTP server against clients that are slow, rude, or broken: real sockets, byte by byte."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.serve import models
from tests.serve.conftest import Served, binary, start, until

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
X = np.ones((1, models.WIDTH), np.float32)


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=20)


def receive(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    try:
        while data := sock.recv(65536):
            parts.append(data)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def infer_request(*, chunked: bool = False) -> bytes:
    body, head = binary([("input", "FP32", X)])
    lines = "POST /v2/models/autoencoder/infer HTTP/1.1\r\nHost: localhost\r\n"
    lines += f"Inference-Header-Content-Length: {head}\r\n"
    if not chunked:
        return f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(body[i : i + 50]), body[i : i + 50]) for i in range(0, len(body), 50)
    )
    return f"{lines}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


@pytest.fixture(scope="module")
def strict(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    """A server that waits one second for anything, and takes ten connections."""
    served = start(
        model_directory / "autoencoder.onnx",
        tmp_path_factory.mktemp("strict") / "serve.log",
        *("--client-timeout-s", "1", "--max-connections", "10", "--max-body-mb", "1"),
        cache=cache,
    )
    until(served.ready, "the model is loaded")
    yield served
    assert served.stop() == 0
    assert "Traceback" not in served.log.read_text()


def test_pipelined_requests_are_answered_in_their_order(shared: Served):
    with connect(shared) as sock:
        targets = [f"/v2/models/nothing{i}" for i in range(50)]
        sock.sendall(
            b"".join(f"GET {t} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for t in targets)
            + infer_request()
            + b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        answer = receive(sock).decode("latin-1")
    places = [answer.index(f"'nothing{i}'") for i in range(50)]
    assert places == sorted(places)
    assert answer.index('"model_name":"autoencoder"') > places[-1]
    assert answer.count("HTTP/1.1 ") == 52


def test_chunked_bodies(shared: Served):
    with connect(shared) as sock:
        sock.sendall(infer_request(chunked=True))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_request_byte_by_byte(shared: Served):
    with connect(shared) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in infer_request():
            sock.sendall(bytes([byte]))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_expect_continue(shared: Served):
    head, _, body = infer_request().partition(b"\r\n\r\n")
    with connect(shared) as sock:
        sock.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_who_closes_its_end_still_gets_the_answer(shared: Served):
    with connect(shared) as sock:
        sock.sendall(infer_request())
        sock.shutdown(socket.SHUT_WR)
        assert status(receive(sock)) == 200


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
        (b"GET\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 40_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"a%d: b\r\n" % i for i in range(200)) + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
    ],
)
def test_what_is_not_http_is_told_so_and_let_go(shared: Served, raw: bytes, code: int):
    with connect(shared) as sock:
        sock.sendall(raw)
        answer = receive(sock)
    assert status(answer) == code, answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert shared.get("/v2/health/live").status == 200


WISH = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def test_an_upgrade_is_passed_over_and_its_body_is_not(shared: Served):
    """As Java's client and ``curl --http2`` send it."""
    get = LIVE.replace(b"\r\n\r\n", b"\r\n" + WISH + b"\r\n")
    posts = [
        infer_request(chunked=chunked).replace(b"Host: localhost\r\n", b"Host: localhost\r\n" + WISH)
        for chunked in (False, True)
    ]
    last = LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with connect(shared) as sock:
        sock.sendall(get + b"".join(posts) + last)
        answer = receive(sock)
    assert answer.count(b"HTTP/1.1 200") == 4, answer
    assert answer.count(b"HTTP/1.1 ") == 4


def test_an_upgrade_byte_by_byte(shared: Served):
    with connect(shared) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in infer_request().replace(b"Host: localhost\r\n", b"Host: localhost\r\n" + WISH):
            sock.sendall(bytes([byte]))
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_answer_to_head_has_no_body(shared: Served):
    with connect(shared) as sock:
        sock.sendall(
            LIVE.replace(b"GET", b"HEAD") + LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        first, second, body = receive(sock).split(b"\r\n\r\n")
    assert (status(first), status(second)) == (200, 200)
    assert b"content-length: 13" in first
    assert body == b'{"live":true}'


def test_a_target_in_absolute_form(shared: Served):
    with connect(shared) as sock:
        sock.sendall(LIVE.replace(b" /v2", b" http://x/v2"))
        assert sock.recv(1000).startswith(b"HTTP/1.1 200")


def test_what_trails_a_body_is_no_header(shared: Served):
    request = infer_request(chunked=True)
    assert request.endswith(b"0\r\n\r\n")
    with connect(shared) as sock:
        sock.sendall(request[:-2] + b"Content-Encoding: br\r\nInference-Header-Content-Length: 1\r\n\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")


def test_what_follows_a_broken_request_is_not_answered(shared: Served):
    with connect(shared) as sock:
        sock.sendall(LIVE + b"nonsense\r\n\r\n" + LIVE)
        answer = receive(sock)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.count(b"HTTP/1.1 400") == 1


def test_too_large_a_body_is_told_before_it_is_sent(strict: Served):
    with connect(strict) as sock:
        sock.sendall(b"POST /v2/models/autoencoder/infer HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n")
        assert status(receive(sock)) == 413


def test_too_large_a_chunked_body_is_told_though_it_is_still_sent(strict: Served):
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with connect(strict) as sock:
        sock.sendall(b"POST /v2/models/autoencoder/infer HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            sock.sendall(chunk)
        assert status(receive(sock)) == 413


@pytest.mark.parametrize(
    "beginning",
    [
        b"",
        b"GET /v2 HT",
        b"GET /v2 HTTP/1.1\r\nHost: localhost\r\nA",
        b"POST /v2/models/autoencoder/infer HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc",
        LIVE,
    ],
    ids=["nothing", "line", "headers", "body", "idle"],
)
def test_who_falls_silent_is_let_go(strict: Served, beginning: bytes):
    with connect(strict) as sock:
        sock.sendall(beginning)
        begin = time.monotonic()
        answer = receive(sock)
        assert time.monotonic() - begin < 10
    if beginning not in {b"", LIVE}:
        assert status(answer) == 408, answer


def test_dribbling_clients_hold_nobody(strict: Served):
    slow = [connect(strict) for _ in range(6)]
    try:
        for sock in slow:
            sock.sendall(b"POST /v2/models/autoencoder/infer HTTP/1.1\r\nContent-Length: 1000\r\n\r\n")
        end = time.monotonic() + 8
        gone = 0
        while gone < len(slow) and time.monotonic() < end:
            assert strict.get("/v2/health/live").status == 200
            gone = 0
            for sock in slow:
                try:
                    sock.sendall(b"x")
                except OSError:
                    gone += 1
            time.sleep(0.1)
        assert gone == len(slow)
    finally:
        for sock in slow:
            sock.close()


def test_more_connections_than_are_taken_are_told_so(strict: Served):
    held = []
    try:
        answers = []
        for _ in range(14):
            sock = connect(strict)
            held.append(sock)
        for sock in held:
            sock.settimeout(0.3)
            try:
                answers.append(sock.recv(4096))
            except TimeoutError:
                continue
        assert any(a.startswith(b"HTTP/1.1 503") for a in answers)
    finally:
        for sock in held:
            sock.close()
    until(lambda: strict.get("/v2/health/live").status == 200, "it takes connections again")


def test_who_does_not_read_is_let_go_and_costs_little(starts: Callable[..., Served], model_directory: Path):
    served = starts(model_directory / "every_type.onnx", "--client-timeout-s", "1")
    until(served.ready, "the model is loaded")
    before = served.metric("process_resident_memory_bytes")
    request = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(served) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(1)
        sent = 0
        try:
            while sent < 50_000_000:
                sent += sock.send(request * 1000)
        except (TimeoutError, ConnectionError):
            pass
        assert sent < 50_000_000
        until(lambda: served.metric("pithead_http_connections") == 1, "it is let go")
    assert served.metric("process_resident_memory_bytes") - before < 20e6


def test_half_open_connections_do_not_hold_descriptors(strict: Served):
    begin = strict.metric("process_open_fds")
    for _ in range(5):
        for sock in [connect(strict) for _ in range(5)]:
            sock.sendall(b"GET /v2 HTTP/1.1\r\n")
            sock.close()
    until(lambda: strict.metric("process_open_fds") <= begin, "all are closed")
