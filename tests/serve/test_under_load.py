"""Swaps, overload, hangs and budgets, on a real server under real load."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve import models
from tests.serve.conftest import Served, binary, tensor, until

pytestmark = [pytest.mark.xdist_group("serve-load")]


def request(model: str, x: np.ndarray[Any, Any], name: str) -> bytes:
    body, head = binary([(name, "FP32", x)])
    return (
        f"POST /v2/models/{model}/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {head}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


@dataclass
class Seen:
    codes: dict[int, int] = field(default_factory=dict)
    accepted_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    retry_after: set[bytes] = field(default_factory=set)
    bodies: set[bytes] = field(default_factory=set)

    def p99(self, times: list[float]) -> float:
        return sorted(times)[int(len(times) * 0.99)]

    @property
    def total(self) -> int:
        return sum(self.codes.values())


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes, seen: Seen) -> None:
    begin = time.perf_counter()
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
    body = await reader.readexactly(int(length.split(b":")[1]))
    took = time.perf_counter() - begin
    code = int(head[9:12])
    seen.codes[code] = seen.codes.get(code, 0) + 1
    if code == 200:
        seen.accepted_s.append(took)
        seen.bodies.add(body[-32:])
    else:
        seen.refused_s.append(took)
        seen.retry_after.update(line for line in head.split(b"\r\n") if line.startswith(b"retry-after"))


async def closed_loop(port: int, data: bytes, clients: int, stop: threading.Event, seen: Seen) -> None:
    """Each client asks again when it is answered."""

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not stop.is_set():
            await ask(reader, writer, data, seen)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))


async def open_loop(port: int, data: bytes, rate: float, seconds: float, connections: int) -> Seen:
    """Requests come at their times, whether those before are answered or not; idle connections take them."""
    seen = Seen()
    idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(connections)]
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        pair = idle.pop()
        await ask(*pair, data, seen)
        idle.append(pair)

    begin = time.perf_counter()
    for i in range(int(rate * seconds)):
        wait = begin + i / rate - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        if not idle:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(one())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for _, writer in idle:
        writer.close()
    return seen


def put(directory: Path, version: int, content: bytes) -> None:
    folder = directory / "model" / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(content)


def test_twenty_swaps_without_a_failed_request(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "models"
    put(directory, 1, models.autoencoder(0))
    served = starts(directory)
    until(served.ready, "the first version is loaded")
    seen, stop = Seen(), threading.Event()
    data = request("model", np.ones((1, models.WIDTH), np.float32), "input")
    load = threading.Thread(target=lambda: asyncio.run(closed_loop(served.port, data, 8, stop, seen)))
    load.start()
    try:
        for version in range(2, 22):
            put(directory, version, models.autoencoder(version))
            reply = served.ask("POST", "/v2/repository/models/model/load")
            assert reply.status == 200, reply.body
            metadata = served.get("/v2/models/model").json
            assert metadata["versions"] == [str(version)]
            shutil.rmtree(directory / "model" / str(version - 1))
            before = seen.total
            until(lambda before=before: seen.total > before + 50, "requests go on")
    finally:
        stop.set()
        load.join()
    assert set(seen.codes) == {200}, seen.codes
    assert seen.total > 1000
    assert len(seen.bodies) >= 21, "every version has answered"
    assert served.metric("pithead_model_loads_total") == 21


def test_the_same_version_with_other_bytes_is_swapped_too(starts: Callable[..., Served], tmp_path: Path):
    file = tmp_path / "model.onnx"
    file.write_bytes(models.autoencoder(0))
    served = starts(tmp_path / "model.onnx")
    until(served.ready, "the model is loaded")
    body = {"inputs": [tensor("input", "FP32", np.ones((1, models.WIDTH), np.float32))]}
    one = served.infer("model", body).body
    beside = tmp_path / "beside"
    beside.write_bytes(models.autoencoder(1))
    beside.rename(file)
    assert served.ask("POST", "/v2/repository/models/model/load").status == 200
    assert served.infer("model", body).body != one
    file.write_bytes(b"broken")
    reply = served.ask("POST", "/v2/repository/models/model/load")
    assert (reply.status, "load_failed" in reply.error or "unsafe" in reply.error) == (503, True), reply.body
    assert served.infer("model", body).status == 200, "what served goes on"


@pytest.mark.alone
def test_overload_is_told_at_once_and_what_is_accepted_is_in_time(
    starts: Callable[..., Served], tmp_path: Path
):
    # Slow enough that who makes the load takes little of the machine.
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1024, layers=40))
    data = request("slow", np.ones((1, 4), np.float32), "x")
    calm_server = starts(tmp_path / "slow.onnx", "--max-batch", "1")
    until(calm_server.ready, "the model is loaded")
    stop, calm = threading.Event(), Seen()
    timer = threading.Timer(2.0, stop.set)
    timer.start()
    asyncio.run(closed_loop(calm_server.port, data, 1, stop, calm))
    run_s = sorted(calm.accepted_s)[len(calm.accepted_s) // 2]
    unloaded = calm.p99(calm.accepted_s)
    calm_server.stop()

    served = starts(tmp_path / "slow.onnx", "--max-batch", "1", "--max-wait-ms", str(run_s * 1000 * 0.6))
    until(served.ready, "the model is loaded")
    before = served.metric("process_resident_memory_bytes")
    seen = asyncio.run(open_loop(served.port, data, 5 / run_s, 2.5, 200))
    assert set(seen.codes) == {200, 503}, seen.codes
    assert seen.codes[200] * run_s > 0.9, "it goes on serving"
    assert seen.retry_after
    assert seen.p99(seen.accepted_s) <= 3 * unloaded + run_s, (unloaded, run_s)
    assert sorted(seen.refused_s)[len(seen.refused_s) // 2] < run_s
    assert served.metric("process_resident_memory_bytes") - before < 20e6
    assert served.infer("slow", {"inputs": [tensor("x", "FP32", np.ones((1, 4), np.float32))]}).status == 200


@pytest.mark.alone
def test_many_at_once_run_together(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1500, inner=1))
    served = starts(tmp_path / "slow.onnx")
    until(served.ready, "the model is loaded")
    x = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
    alone = served.infer("slow", {"inputs": [tensor("x", "FP32", x)]}).array()
    seen, stop = Seen(), threading.Event()
    threading.Timer(0.7, stop.set).start()
    asyncio.run(closed_loop(served.port, request("slow", x, "x"), 16, stop, seen))
    stats = served.get("/v2/models/slow/stats").json["model_stats"][0]
    assert stats["execution_count"] < stats["inference_count"] * 0.7, stats
    assert np.allclose(served.infer("slow", {"inputs": [tensor("x", "FP32", x)]}).array(), alone, atol=1e-4)
    assert set(seen.codes) == {200}


def test_a_request_that_waits_too_long_is_told_so(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1024, layers=60))
    served = starts(tmp_path / "slow.onnx", "--max-batch", "1")
    until(served.ready, "the model is loaded")
    body = {"inputs": [tensor("x", "FP32", np.ones((1, 4), np.float32))], "parameters": {"timeout": 1000}}
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(served.infer("slow", body).status)) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(codes) <= {200, 504}
    assert 504 in codes


def test_models_share_a_budget_and_come_back_when_asked(starts: Callable[..., Served], tmp_path: Path):
    big = models.slow(width=1500, layers=1)  # 9 MB of weights
    for i in range(4):
        (tmp_path / f"m{i}.onnx").write_bytes(big + b"")
    served = starts(tmp_path, "--memory-budget", "45", "--lazy")
    until(served.ready, "idle models count as ready")
    body = {"inputs": [tensor("x", "FP32", np.ones((1, 4), np.float32))]}
    assert served.metric("pithead_model_loads_total") == 0
    first = served.infer("m0", body)
    assert first.status == 200
    for i in range(4):
        assert served.infer(f"m{i}", body).body.replace(f"m{i}".encode(), b"m0") == first.body
    assert served.metric("pithead_model_evictions_total") >= 1
    lines = {line["name"]: line for line in served.ask("POST", "/v2/repository/index").json}
    assert lines["m0"]["state"] == "READY"
    assert "not in memory" in lines["m0"]["reason"]
    assert served.metric('pithead_model_loaded{model="m0",version="1"}') == 0
    begin = time.perf_counter()
    assert served.infer("m0", body).status == 200
    assert time.perf_counter() - begin < 5


def test_it_ends_after_the_requests_that_it_has_taken(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1024, layers=200))
    served = starts(tmp_path / "slow.onnx")
    until(served.ready, "the model is loaded")
    data = request("slow", np.ones((1, 4), np.float32), "x")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as sock:
        sock.sendall(data)
        until(lambda: served.metric('pithead_model_in_flight{model="slow",version="1"}') >= 1, "it runs")
        served.process.terminate()
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    assert served.stop() == 0


def test_ready_tells_when_a_model_does_not_load(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "good.onnx").write_bytes(models.autoencoder())
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    served = starts(tmp_path)
    until(lambda: served.get("/v2/models/good/ready").status == 200, "the good one is loaded")
    until(lambda: served.get("/v2/models/bad/ready").status == 503, "the bad one has failed")
    assert served.get("/v2/health/ready").status == 503
    reply = served.infer("bad", {"inputs": []})
    assert (reply.status, "load_failed" in reply.error) == (503, True), json.loads(reply.body)
