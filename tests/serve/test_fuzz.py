"""Whatever comes, the answer is below 500, and the next one is right."""

import json
import socket
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve import models
from tests.serve.conftest import Served, binary, tensor

X = np.ones((1, models.WIDTH), np.float32)
GOOD: dict[str, Any] = {
    "id": "1",
    "parameters": {"binary_data_output": False, "priority": 0, "timeout": 1000000},
    "inputs": [tensor("input", "FP32", X)],
    "outputs": [{"name": "output", "parameters": {"binary_data": False, "classification": 0}}],
}
fuzz = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
    max_leaves=20,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value[:3]):
            found += paths(inner, (*path, i))
    return found


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def good(served: Served) -> None:
    reply = served.infer("autoencoder", GOOD)
    assert reply.status == 200, reply.body


@fuzz
@given(at=st.sampled_from(paths(GOOD)), new=json_values)
def test_one_part_of_a_request_is_anything(shared: Served, at: tuple[Any, ...], new: Any):
    reply = shared.infer("autoencoder", json.dumps(changed(GOOD, at, new)).encode())
    assert reply.status < 500, (at, new, reply.body)
    if reply.status != 200:
        assert reply.error
        good(shared)


@fuzz
@given(body=st.binary(max_size=400), head=st.integers(-5, 500) | st.text("0123456789-+_ .e", max_size=6))
def test_bodies_are_anything(shared: Served, body: bytes, head: Any):
    reply = shared.infer("autoencoder", body, inference_header_content_length=str(head))
    assert 400 <= reply.status < 500, reply.body


@fuzz
@given(
    datatype=st.sampled_from(["BOOL", "INT8", "UINT64", "FP16", "FP32", "FP64", "BF16", "BYTES", "X", ""]),
    shape=st.lists(st.integers(-2, 2**70) | st.integers(0, 70), max_size=5),
    size=st.integers(-1, 400),
    data=st.binary(max_size=300),
)
def test_binary_tensors_are_anything(shared: Served, datatype: str, shape: list[int], size: int, data: bytes):
    described = {
        "name": "input",
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": size},
    }
    head = json.dumps({"inputs": [described]}).encode()
    reply = shared.infer("autoencoder", head + data, inference_header_content_length=str(len(head)))
    assert reply.status < 500, reply.body
    assert reply.status == 200 or reply.error


def raw(served: Served, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := sock.recv(65536):
                parts.append(part)
        except ConnectionResetError:
            pass
    return b"".join(parts)


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@fuzz
@given(data=st.binary(max_size=300))
def test_bytes_on_the_socket_are_anything(shared: Served, data: bytes):
    assert all(code < 500 for code in statuses(raw(shared, data)))


BODY, HEAD = binary([("input", "FP32", X)])
REQUEST = (
    f"POST /v2/models/autoencoder/infer HTTP/1.1\r\nHost: localhost\r\n"
    f"Inference-Header-Content-Length: {HEAD}\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode() + BODY


@fuzz
@given(
    at=st.integers(0, len(REQUEST) - 1),
    length=st.integers(0, 12),
    new=st.binary(max_size=12),
    again=st.integers(1, 2),
)
def test_a_request_with_some_bytes_changed(shared: Served, at: int, length: int, new: bytes, again: int):
    data = REQUEST[:at] + new + REQUEST[at + length :]
    answer = raw(shared, data * again)
    assert all(code < 500 for code in statuses(answer)), answer
    good(shared)


@fuzz
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "PATCH"]),
    parts=st.lists(
        st.sampled_from(
            [
                *(
                    "v2",
                    "models",
                    "autoencoder",
                    "infer",
                    "versions",
                    "1",
                    "ready",
                    "config",
                    "stats",
                    "trace",
                ),
                *(
                    "setting",
                    "logging",
                    "systemsharedmemory",
                    "cudasharedmemory",
                    "region",
                    "register",
                    "status",
                ),
                *(
                    "repository",
                    "index",
                    "load",
                    "",
                    "..",
                    "%2e%2e",
                    "%00",
                    "%ff",
                    "a b",
                    "metrics",
                    "health",
                ),
            ]
        ),
        max_size=6,
    ),
    body=st.binary(max_size=50) | json_values.map(lambda v: json.dumps(v).encode()),
)
def test_targets_are_anything(shared: Served, method: str, parts: list[str], body: bytes):
    target = "/" + "/".join(parts).replace(" ", "%20")
    if parts[:1] == ["v2"] and parts[-1] == "unregister":
        return
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    codes = statuses(raw(shared, head + body))
    assert all(code < 500 for code in codes), codes
    assert codes
