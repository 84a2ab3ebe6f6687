"""A real server process, and a plain client that shows every byte."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve import models

DEADLINE_S = 30.0


def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until ``condition`` is true; a test never sleeps for luck."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError(f"not in {deadline_s} s: {what}")


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        text: str = self.json["error"]
        return text

    def array(self, at: int = 0) -> np.ndarray[Any, Any]:
        """An FP32 output of a JSON answer."""
        output = self.json["outputs"][at]
        return np.array(output["data"], np.float32).reshape(output["shape"])


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    directory: Path
    grpc_port: int = 0

    def ask(self, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            data = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
            connection.request(method, target, data, headers or {})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, target: str, **headers: str) -> Reply:
        return self.ask("GET", target, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def infer(self, model: str, body: Any, **headers: str) -> Reply:
        return self.ask(
            "POST",
            f"/v2/models/{model}/infer",
            body,
            {k.replace("_", "-"): v for k, v in headers.items()},
        )

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return self.get("/v2/health/ready").status == 200

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code

    def metric(self, name: str) -> float:
        page = self.get("/metrics").body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
        assert found, f"{name} is not in\n{page}"
        return float(found[1])


def start(directory: Path, log: Path, *arguments: str, cache: Path | None = None) -> Served:
    """Start ``pithead-agent serve`` on a free port; returns when it listens."""
    environment = os.environ | {"PYTHONWARNINGS": "error"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "agent", "serve", str(directory), "--http-port", "0"),
                *("--probe-cache", str(cache or log.with_suffix(".probed")), *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"://[^ ]*:(\d+)", line)
    assert found, log.read_text()
    grpc = re.search(r"gRPC on [^ ]*:(\d+)", line)
    return Served(process, int(found[1]), log, directory, int(grpc[1]) if grpc else 0)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verdicts of the sandbox that the tests share."""
    return tmp_path_factory.mktemp("probed") / "probed.json"


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def shared(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    """One server for all tests that change nothing."""
    served = start(model_directory, tmp_path_factory.mktemp("log") / "serve.log", cache=cache)
    try:
        until(served.ready, "all models are loaded")
        yield served
    finally:
        code = served.stop()
    text = served.log.read_text()
    assert code == 0, text
    assert "Traceback" not in text, text


@pytest.fixture
def starts(tmp_path: Path, cache: Path) -> Iterator[Callable[..., Served]]:
    """Start servers that end with the test."""
    running: list[Served] = []

    def begin(directory: Path, *arguments: str) -> Served:
        served = start(directory, tmp_path / f"serve{len(running)}.log", *arguments, cache=cache)
        running.append(served)
        return served

    yield begin
    for served in running:
        served.stop()


def tensor(name: str, datatype: str, array: Any, **parameters: Any) -> dict[str, Any]:
    values = np.asarray(array)
    made: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
    if parameters:
        made["parameters"] = parameters
    else:
        made["data"] = values.tolist()
    return made


def binary(inputs: list[tuple[str, str, np.ndarray[Any, Any]]], **more: Any) -> tuple[bytes, str]:
    """A binary body, and the value of its header."""
    described = [tensor(n, d, a, binary_data_size=a.nbytes) for n, d, a in inputs]
    head = json.dumps({"inputs": described, **more}).encode()
    return b"".join((head, *(a.tobytes() for _, _, a in inputs))), str(len(head))
