"""REST, byte by byte: what is answered to what, on a real server process."""

import gzip
import http.client
import json
import zlib
from typing import Any

import numpy as np
import pytest

from inference.registry import open_session
from tests.serve import models
from tests.serve.conftest import Reply, Served, binary, tensor

X = np.random.default_rng(5).normal(size=(1, models.WIDTH)).astype(np.float32)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = open_session(models.autoencoder(), "onnx")
    try:
        return session.run({"input": x})["output"]
    finally:
        session.close()


def close(a: Any, b: Any) -> bool:
    return np.allclose(a, b, rtol=1e-4, atol=1e-5)


def split(reply: Reply) -> tuple[dict[str, Any], bytes]:
    at = int(reply.headers["inference-header-content-length"])
    return json.loads(reply.body[:at]), reply.body[at:]


def test_health_has_a_json_body(shared: Served):
    assert shared.get("/v2/health/live").json == {"live": True}
    assert shared.get("/v2/health/ready").json == {"ready": True}
    assert shared.get("/v2/models/autoencoder/ready").json == {"name": "autoencoder", "ready": True}


def test_json_in_json_out(shared: Served):
    reply = shared.infer("autoencoder", {"id": "7", "inputs": [tensor("input", "FP32", X)]})
    assert reply.status == 200
    assert list(reply.json) == ["model_name", "model_version", "outputs", "id"]
    assert reply.json["id"] == "7"
    assert close(reply.array(), expected(X))


def test_flat_and_nested_data_are_one(shared: Served):
    nested = tensor("input", "FP32", X)
    flat = nested | {"data": X.ravel().tolist()}
    one, two = (shared.infer("autoencoder", {"inputs": [t]}) for t in (nested, flat))
    assert one.body == two.body


def test_binary_in_binary_out(shared: Served):
    body, length = binary([("input", "FP32", X)], parameters={"binary_data_output": True})
    reply = shared.infer("autoencoder", body, inference_header_content_length=length)
    head, data = split(reply)
    assert list(head) == ["model_name", "model_version", "outputs"]
    assert head["outputs"][0]["parameters"] == {"binary_data_size": 256}
    assert reply.headers["content-type"] == "application/octet-stream"
    assert close(np.frombuffer(data, np.float32), expected(X).ravel())


def test_binary_in_json_out_and_the_other_way(shared: Served):
    body, length = binary([("input", "FP32", X)])
    reply = shared.infer("autoencoder", body, inference_header_content_length=length)
    assert close(reply.array(), expected(X))
    wanted = [{"name": "output", "parameters": {"binary_data": True}}]
    reply = shared.infer("autoencoder", {"inputs": [tensor("input", "FP32", X)], "outputs": wanted})
    assert close(np.frombuffer(split(reply)[1], np.float32), expected(X).ravel())


def test_a_batch_is_answered_row_by_row(shared: Served):
    x = np.random.default_rng(1).normal(size=(9, models.WIDTH)).astype(np.float32)
    reply = shared.infer("autoencoder", {"inputs": [tensor("input", "FP32", x)]})
    assert close(reply.array(), expected(x))


def test_no_rows_are_answered_with_no_rows(shared: Served):
    body, length = binary([("input", "FP32", X[:0])])
    reply = shared.infer("autoencoder", body, inference_header_content_length=length)
    assert reply.json["outputs"][0]["shape"] == [0, models.WIDTH]


def test_versions(shared: Served):
    a = np.arange(16, dtype=np.int32).reshape(1, 16)
    body = {"inputs": [tensor("INPUT0", "INT32", a), tensor("INPUT1", "INT32", a)]}
    assert shared.infer("add_sub", body).json["model_version"] == "3"
    assert shared.infer("add_sub/versions/3", body).json["model_version"] == "3"
    assert shared.infer("add_sub/versions/1", body).status == 404


def test_quantised_as_integers_and_as_real_values(shared: Served):
    spec = open_session(models.quantised(), "tflite").inputs[0]
    assert spec.scale is not None
    integers = np.clip(np.rint(X / spec.scale) + (spec.zero_point or 0), -128, 127).astype(np.int8)
    raw = shared.infer("quantised", {"inputs": [tensor(spec.name, "INT8", integers)]})
    real = shared.infer("quantised", {"inputs": [tensor(spec.name, "FP32", X)]})
    assert raw.json["outputs"][0]["datatype"] == "INT8"
    assert real.json["outputs"][0]["datatype"] == "FP32"
    session = open_session(models.quantised(), "tflite")
    scale, zero = session.outputs[0].scale, session.outputs[0].zero_point or 0
    assert scale is not None
    assert np.allclose(real.array(), (raw.array() - zero) * scale, atol=scale * 1.01)


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compression_both_ways(shared: Served, name: str, pack: Any):
    x = np.repeat(X, 16, axis=0)
    body = pack(json.dumps({"inputs": [tensor("input", "FP32", x)]}).encode())
    reply = shared.infer("autoencoder", body, content_encoding=name, accept_encoding=f"{name};q=1, br")
    assert reply.headers["content-encoding"] == name
    plain = gzip.decompress(reply.body) if name == "gzip" else zlib.decompress(reply.body)
    assert json.loads(plain)["outputs"][0]["shape"] == [16, models.WIDTH]


def test_large_bodies_are_compressed_elsewhere(shared: Served):
    x = np.random.default_rng(2).normal(size=(6000, models.WIDTH)).astype(np.float32)
    body, length = binary([("input", "FP32", x)], parameters={"binary_data_output": True})
    reply = shared.infer(
        "autoencoder",
        gzip.compress(body, 1),
        inference_header_content_length=length,
        content_encoding="gzip",
        accept_encoding="gzip",
    )
    plain = gzip.decompress(reply.body)
    at = int(reply.headers["inference-header-content-length"])
    assert close(np.frombuffer(plain[at:], np.float32).reshape(x.shape), expected(x))


def test_a_compression_bomb_is_refused(shared: Served):
    reply = shared.infer("autoencoder", gzip.compress(b" " * 80_000_000, 9), content_encoding="gzip")
    assert (reply.status, "inflates" in reply.error) == (413, True)


FP32 = tensor("input", "FP32", X)
BAD: list[tuple[Any, dict[str, str], int, str]] = [
    (b"", {}, 400, "JSON"),
    (b"{", {}, 400, "JSON"),
    (b"[]", {}, 400, "object"),
    ({}, {}, 400, "inputs"),
    ({"inputs": []}, {}, 400, "'input' is missing"),
    ({"inputs": [FP32, FP32]}, {}, 400, "inputs[1].name"),
    ({"inputs": [FP32 | {"name": "x"}]}, {}, 400, "'x' is no input"),
    ({"inputs": [FP32 | {"datatype": "FP99"}]}, {}, 400, "inputs[0].datatype"),
    ({"inputs": [FP32 | {"datatype": "FP64"}]}, {}, 400, "datatype"),
    ({"inputs": [FP32 | {"datatype": "BF16"}]}, {}, 400, "binary only"),
    ({"inputs": [FP32 | {"shape": [1, 63]}]}, {}, 400, "inputs[0].data"),
    ({"inputs": [FP32 | {"shape": [-1, 64]}]}, {}, 400, "inputs[0].shape"),
    ({"inputs": [FP32 | {"shape": [2**40, 2**40]}]}, {}, 400, "inputs[0].shape"),
    ({"inputs": [FP32 | {"shape": [1] * 40}]}, {}, 400, "inputs[0].shape"),
    ({"inputs": [FP32 | {"shape": [64]}]}, {}, 400, "shape"),
    ({"inputs": [FP32 | {"shape": "1,64"}]}, {}, 400, "$.inputs[0].shape"),
    ({"inputs": [FP32 | {"data": ["a"] * 64}]}, {}, 400, "inputs[0].data[0]"),
    ({"inputs": [FP32 | {"data": [1e300] * 64}]}, {}, 400, "too large"),
    ({"inputs": [FP32 | {"data": [[[1.0] * 64]]}]}, {}, 400, "nested"),
    ({"inputs": [FP32 | {"data": 3}]}, {}, 400, "inputs[0].data"),
    ({"inputs": [tensor("input", "FP32", X, other=1)]}, {}, 400, "has no data"),
    ({"inputs": [FP32 | {"parameters": {"binary_data_size": 4}}]}, {}, 400, "both"),
    ({"inputs": [tensor("input", "FP32", X, binary_data_size=256)]}, {}, 400, "binary_data_size"),
    ({"inputs": [tensor("input", "FP32", X, binary_data_size=-1)]}, {}, 400, "binary_data_size"),
    ({"inputs": [tensor("input", "FP32", X, binary_data_size="9")]}, {}, 400, "binary_data_size"),
    ({"inputs": [FP32], "outputs": [{"name": "no"}]}, {}, 400, "'no' is no output"),
    ({"inputs": [FP32], "outputs": [{"name": "output"}] * 2}, {}, 400, "outputs[1].name"),
    (
        {"inputs": [FP32], "outputs": [{"name": "output", "parameters": {"classification": -1}}]},
        {},
        400,
        "classification",
    ),
    ({"inputs": [FP32], "parameters": {"priority": -1}}, {}, 400, "parameters.priority"),
    ({"inputs": [FP32], "parameters": {"timeout": "x"}}, {}, 400, "parameters.timeout"),
    ({"inputs": [FP32], "parameters": {"binary_data_output": 1}}, {}, 400, "binary_data_output"),
    ({"inputs": [FP32], "id": "x" * 5000}, {}, 400, "id"),
    ({"inputs": [FP32]}, {"inference-header-content-length": "999999"}, 400, "Inference-Header"),
    ({"inputs": [FP32]}, {"inference-header-content-length": "-1"}, 400, "Inference-Header"),
    ({"inputs": [FP32]}, {"inference-header-content-length": "1_0"}, 400, "Inference-Header"),
    ({"inputs": [FP32]}, {"content-encoding": "br"}, 415, "gzip and deflate"),
    ({"inputs": [FP32]}, {"content-encoding": "gzip"}, 400, "Content-Encoding"),
    (gzip.compress(b"{}", mtime=0)[:-3], {"content-encoding": "gzip"}, 400, "complete"),
    (gzip.compress(b"{}", mtime=0) + b"x", {"content-encoding": "gzip"}, 400, "complete"),
    ('{"inputs":' + "[" * 100_000, {}, 400, "inputs"),
    ('{"other":' + "[" * 100_000, {}, 400, "JSON"),
    ('{"inputs":[{"name":"input","datatype":"FP32","shape":[1,64],"data":' + "[" * 100_000, {}, 400, "JSON"),
]


@pytest.mark.parametrize(("body", "headers", "status", "words"), BAD)
def test_bad_input_names_its_field(
    shared: Served, body: Any, headers: dict[str, str], status: int, words: str
):
    reply = shared.ask("POST", "/v2/models/autoencoder/infer", body, headers)
    assert (reply.status, words in reply.error) == (status, True), reply.body


def test_bytes_beyond_the_inputs_are_refused(shared: Served):
    body, length = binary([("input", "FP32", X)])
    reply = shared.infer("autoencoder", body + b"x", inference_header_content_length=length)
    assert (reply.status, "1 bytes of the body" in reply.error) == (400, True)


def test_one_clients_values_are_not_anothers_error(shared: Served):
    reply = shared.infer("gather", {"inputs": [tensor("i", "INT64", [7])]})
    assert (reply.status, "inference.run_failed" in reply.error) == (400, True)
    assert shared.infer("gather", {"inputs": [tensor("i", "INT64", [2])]}).array().tolist() == [[4.0, 5.0]]


def test_rows_that_depend_on_each_other_are_never_batched(shared: Served):
    assert shared.get("/v2/models/mean_over_rows/config").json["max_batch_size"] == 0
    assert shared.get("/v2/models/autoencoder/config").json["max_batch_size"] == 64


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/nothing", 404),
        ("GET", "/v2/models/nothing", 404),
        ("GET", "/v2/models/%ff", 404),
        ("GET", "/v2/models//ready", 404),
        ("GET", "/v2/models/../../etc/passwd", 404),
        ("DELETE", "/v2/models/autoencoder", 405),
        ("GET", "/v2/models/autoencoder/infer", 405),
        ("PUT", "/v2/models/autoencoder/infer", 405),
        ("POST", "/v2/health/live", 405),
        ("POST", "/v2/repository/models/nothing/load", 404),
        ("GET", "/v2/systemsharedmemory/region/x/status", 404),
    ],
)
def test_targets(shared: Served, method: str, target: str, status: int):
    assert shared.ask(method, target).status == status


def test_a_web_page_may_not_use_a_server_without_tokens(shared: Served):
    reply = shared.infer("autoencoder", {"inputs": [FP32]}, origin="https://example.org")
    assert reply.status == 403


def test_metrics_count(shared: Served):
    name = 'pithead_inference_requests_total{model="autoencoder",version="1",outcome="success"}'
    before = shared.metric(name)
    shared.infer("autoencoder", {"inputs": [FP32]})
    assert shared.metric(name) == before + 1
    bucket = 'pithead_inference_duration_seconds_bucket{model="autoencoder",version="1",le="+Inf"}'
    assert shared.metric(bucket) == before + 1


def test_a_connection_stays_and_a_request_may_ask_for_its_end(shared: Served):
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=10)
    for _ in range(3):
        connection.request("GET", "/v2")
        answer = connection.getresponse()
        answer.read()
        assert not answer.will_close
    connection.request("GET", "/v2", headers={"Connection": "close"})
    answer = connection.getresponse()
    assert answer.will_close
    connection.close()
