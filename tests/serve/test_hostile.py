"""Requests that are meant to cost much: nobody else waits for them, and memory stays where it is."""

import gzip
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest

from agent.engine.serve.proto.messages import CLASSES, SERVICE
from tests.serve import models
from tests.serve.conftest import DEADLINE_S, Served, binary, start, tensor, until

MB = 1024 * 1024


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("hostile")
    (directory / "autoencoder.onnx").write_bytes(models.autoencoder())
    (directory / "texts.onnx").write_bytes(models.texts())
    (directory / "loop.onnx").write_bytes(models.loop())
    (directory / "products.onnx").write_bytes(models.products())
    (directory / "slow.onnx").write_bytes(models.slow())
    running = start(directory, tmp_path_factory.mktemp("log") / "serve.log", "--grpc-port", "0", cache=cache)
    try:
        until(running.ready, "all models are loaded")
        yield running
    finally:
        code = running.stop()
    text = running.log.read_text()
    assert code == 0, text
    assert "Traceback" not in text, text


class Watch:
    """Another client, which asks whether the server lives, all the time."""

    def __init__(self, served: Served) -> None:
        self._served, self._over, self.worst_s = served, threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._served.port, timeout=DEADLINE_S)
        while not self._over.is_set():
            begin = time.monotonic()
            connection.request("GET", "/v2/health/live")
            assert connection.getresponse().read()
            self.worst_s = max(self.worst_s, time.monotonic() - begin)
        connection.close()


def memory_mb(served: Served) -> int:
    pages = Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]
    return int(pages) * 4096 // MB


def described(datatype: str, shape: list[int], size: int, name: str = "x") -> bytes:
    wanted = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [wanted]}).encode()


def empty_texts() -> tuple[bytes, dict[str, str]]:
    head = described("BYTES", [8 * MB], 32 * MB)
    headers = {"Content-Encoding": "gzip", "Inference-Header-Content-Length": str(len(head))}
    return gzip.compress(head + bytes(32 * MB), 9), headers


def in_json(datatype: str, shape: list[int], value: bytes, count: int) -> tuple[bytes, dict[str, str]]:
    head = json.dumps({"inputs": [{"name": "x", "datatype": datatype, "shape": shape, "data": 0}]}).encode()
    return head.replace(b'"data": 0', b'"data": [' + b",".join([value] * count) + b"]"), {}


def test_long_targets_are_not_remembered(served: Served):
    before = memory_mb(served)
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=DEADLINE_S)
    for i in range(1500):
        connection.request("GET", f"/v2/health/live?{i}" + "x" * 30_000)
        assert connection.getresponse().read()
    connection.close()
    assert memory_mb(served) - before < 20


def test_answers_that_nobody_reads_are_given_up(served: Served):
    rows = 60_000
    body, head = binary(
        [("input", "FP32", np.ones((rows, models.WIDTH), np.float32))],
        parameters={"binary_data_output": True},
    )
    lines = "POST /v2/models/autoencoder/infer HTTP/1.1\r\nHost: localhost\r\n"
    request = (
        f"{lines}Inference-Header-Content-Length: {head}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    assert len(body) > 14 * MB
    gone, before = 0, memory_mb(served)
    with ExitStack() as open_ones:
        sockets = []
        for _ in range(80):
            sock = socket.create_connection(("127.0.0.1", served.port), timeout=DEADLINE_S)
            sockets.append(open_ones.enter_context(sock))
            sock.sendall(request)
        in_flight = 'pithead_model_in_flight{model="autoencoder",version="1"}'
        until(lambda: served.metric(in_flight) == 0, "all are run")
        assert memory_mb(served) - before < 850  # 80 answers are 1200 MB
        for sock in sockets:
            sock.setblocking(False)
            try:
                while data := sock.recv(MB):
                    assert data
            except BlockingIOError:
                continue
            except ConnectionResetError:
                pass
            gone += 1
    assert gone >= 40
    assert served.get("/v2/health/ready").status == 200


@pytest.mark.alone
@pytest.mark.parametrize(
    ("body", "headers"),
    [
        empty_texts(),
        in_json("INT64", [4 * MB], b"1", 4 * MB),
        in_json("FP32", [3 * MB, 1], b"[1]", 3 * MB),
        (gzip.compress(b" " * 60 * MB, 9), {"Content-Encoding": "gzip"}),
    ],
    ids=["texts", "integers", "nested", "bomb"],
)
def test_nobody_waits_for_a_body_that_takes_long_to_take_apart(
    served: Served, body: bytes, headers: dict[str, str]
):
    with Watch(served) as other:
        answer = served.ask("POST", "/v2/models/nothing/infer", body, headers)
    assert answer.status in {400, 404, 413}, answer.body
    assert other.worst_s < 0.4


@pytest.mark.alone
@pytest.mark.parametrize("datatype", ["BYTES", "FP32"])
def test_nobody_waits_for_a_message_that_takes_long_to_take_apart(served: Served, datatype: str):
    message = CLASSES["ModelInferRequest"](model_name="nothing")
    message.inputs.add(name="x", datatype=datatype, shape=[8 * MB])
    message.raw_input_contents.append(bytes(32 * MB))
    with (
        grpc.insecure_channel(
            f"127.0.0.1:{served.grpc_port}", options=[("grpc.max_send_message_length", -1)]
        ) as channel,
        Watch(served) as other,
    ):
        call: Any = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        with pytest.raises(grpc.RpcError) as caught:
            call(message.SerializeToString(), timeout=DEADLINE_S)
    error: Any = caught.value
    assert error.code() in {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT}
    assert other.worst_s < 0.8  # 1.3 s and 5 s on the loop


@pytest.mark.alone
def test_nobody_waits_for_a_run_that_its_input_makes_long(served: Served):
    with Watch(served) as other:
        answer = served.infer("loop", {"inputs": [tensor("n", "INT64", [1_000_000])]})
    assert answer.array().tolist() == [1_000_000]
    assert other.worst_s < 0.2


@pytest.mark.alone
def test_nobody_waits_for_a_run_of_another_size_than_was_measured(served: Served):
    body, head = binary([("x", "FP32", np.ones((6000, 4), np.float32))])
    with Watch(served) as other:
        answer = served.infer("products", body, Inference_Header_Content_Length=head)
    assert answer.status == 413, answer.body[:200]
    assert "binary_data_output" in answer.error
    assert other.worst_s < 0.2


def test_classification_of_no_rows(served: Served):
    asked = {"name": "output", "parameters": {"classification": 2}}
    none = {"name": "input", "datatype": "FP32", "shape": [0, models.WIDTH], "data": []}
    answer = served.infer("autoencoder", {"inputs": [none], "outputs": [asked]})
    assert answer.status == 200, answer.body
    assert answer.json["outputs"][0]["shape"] == [0, 2]


def test_bodies_count_until_they_are_answered(served: Served):
    """Pipelined behind a run they would otherwise wait in memory, as many as somebody sends."""
    busy, head = binary([("x", "FP32", np.ones((600, 4), np.float32))])
    lines = "POST /v2/models/slow/infer HTTP/1.1\r\nHost: localhost\r\n"
    first = (
        f"{lines}Inference-Header-Content-Length: {head}\r\nContent-Length: {len(busy)}\r\n\r\n".encode()
        + busy
    )
    junk = b"POST /v2/models/nothing/infer HTTP/1.1\r\nHost: [::1]\r\nContent-Length: %d\r\n\r\n" % (30 * MB)
    junk += bytes(30 * MB)
    before = memory_mb(served)
    peak = 0
    with ExitStack() as open_ones:
        for _ in range(3):
            sock = socket.create_connection(("127.0.0.1", served.port), timeout=1)
            open_ones.enter_context(sock)
            try:
                sock.sendall(first)
                for _ in range(8):
                    sock.sendall(junk)
                    peak = max(peak, memory_mb(served))
            except OSError:  # it takes no more
                continue
    assert peak - before < 450
    until(lambda: served.metric('pithead_model_in_flight{model="slow",version="1"}') == 0, "it is calm again")


def test_a_region_of_another_size_than_its_tensor_is_not_read(served: Served):
    name = f"pithead-test-{served.process.pid}"
    path = Path("/dev/shm") / name
    with path.open("wb") as file:
        file.truncate(2048 * MB)  # it claims more than it has
    try:
        said = {"key": name, "offset": 0, "byte_size": 2048 * MB}
        assert served.ask("POST", "/v2/systemsharedmemory/region/r/register", said).status == 200
        shared = {"shared_memory_region": "r", "shared_memory_byte_size": 2048 * MB}
        before = memory_mb(served)
        answers = [
            served.infer("autoencoder", {"inputs": [tensor("input", "FP32", np.ones(shape), **shared)]})
            for shape in ((1, models.WIDTH), (1, 1))
        ]
        texts = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": shared}
        answers.append(served.infer("texts", {"inputs": [texts]}))
        assert [answer.status for answer in answers] == [400] * 3
        assert memory_mb(served) - before < 50
        peak = next(
            int(line.split()[1]) // 1024
            for line in Path(f"/proc/{served.process.pid}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        )
        assert peak < 1500
    finally:
        served.ask("POST", "/v2/systemsharedmemory/region/r/unregister")
        path.unlink()


def test_statistics_stay_small_whatever_sizes_come(served: Served):
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=DEADLINE_S)
    before = json.loads(served.get("/v2/models/autoencoder/stats").body)["model_stats"][0]
    for rows in range(1, 400):
        body, head = binary(
            [("input", "FP32", np.ones((rows, models.WIDTH), np.float32))],
            parameters={"binary_data_output": True},
        )
        connection.request(
            "POST", "/v2/models/autoencoder/infer", body, {"Inference-Header-Content-Length": head}
        )
        assert connection.getresponse().read()
    connection.close()
    stats = json.loads(served.get("/v2/models/autoencoder/stats").body)["model_stats"][0]
    assert len(stats["batch_stats"]) <= 280
    runs = sum(each["compute_infer"]["count"] for each in stats["batch_stats"])
    assert runs == stats["execution_count"]
    assert stats["inference_stats"]["success"]["count"] - before["inference_stats"]["success"]["count"] == 399


def put(directory: Path, name: str, content: bytes) -> None:
    (directory / "new").write_bytes(content)
    (directory / "new").rename(directory / name)


def test_a_load_that_finds_another_under_way_serves_what_is_there_now(
    starts: Callable[..., Served], tmp_path: Path
):
    """Whoever replaces a file and asks for it is not told that all is well while the one before it serves."""
    directory = tmp_path / "models"
    directory.mkdir()
    put(directory, "m.onnx", models.autoencoder(0))
    served = starts(directory)
    until(served.ready, "it is loaded")
    # Bytes that nobody has tried take a while, since they go through the sandbox first.
    put(directory, "m.onnx", models.autoencoder(int(time.time())))
    former = threading.Thread(target=served.ask, args=("POST", "/v2/repository/models/m/load"))
    former.start()
    until(lambda: children(served), "the sandbox has begun")
    put(directory, "m.onnx", models.autoencoder(0))
    answer = served.ask("POST", "/v2/repository/models/m/load")
    former.join()
    assert answer.status == 200, answer.body
    x = np.ones((1, models.WIDTH), np.float32)
    got = served.infer("m", {"inputs": [tensor("input", "FP32", x)]}).array()
    served.stop()
    again = starts(directory)
    until(again.ready, "it is loaded")
    assert np.array_equal(got, again.infer("m", {"inputs": [tensor("input", "FP32", x)]}).array())


def children(served: Served) -> str:
    return Path(f"/proc/{served.process.pid}/task/{served.process.pid}/children").read_text() or "".join(
        task.read_text() for task in Path(f"/proc/{served.process.pid}/task").glob("*/children")
    )


def test_what_is_no_file_is_not_opened(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "m.onnx").write_bytes(models.autoencoder(0))
    os.mkfifo(tmp_path / "pipe.onnx")  # who opens it waits for somebody to write
    served = starts(tmp_path)
    until(served.ready, "the model is loaded", 10)
    assert served.ask("POST", "/v2/repository/models/pipe/load").status == 404
    assert served.ask("POST", "/v2/repository/models/m/load").status == 200
