"""Swaps under load over gRPC: calls and a stream, and none fails."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from agent.engine.serve.proto.messages import SERVICE
from tests.serve import models
from tests.serve.conftest import Served, until
from tests.serve.grpc_client import ONE, Client, array, client, message
from tests.serve.test_under_load import put

pytestmark = [pytest.mark.xdist_group("serve-load")]

SWAPS = 20


class Load:
    """Clients that ask until they are told to stop."""

    def __init__(self, port: int) -> None:
        self.stop = threading.Event()
        self.answers: set[bytes] = set()
        self.count = 0
        self.failures: list[Any] = []
        self._lock = threading.Lock()
        works = [self._calls, self._calls, self._stream]
        self.threads = [threading.Thread(target=self._with, args=(port, work)) for work in works]
        for thread in self.threads:
            thread.start()

    def _with(self, port: int, work: Callable[[Client], None]) -> None:
        try:
            with client(port) as c:
                work(c)
        except (grpc.RpcError, AssertionError) as error:
            self.failures.append(error)

    def _seen(self, answer: Any) -> None:
        with self._lock:
            self.count += 1
            self.answers.add(array(answer).tobytes())

    def _calls(self, c: Client) -> None:
        said = message(model="model").SerializeToString()
        ask = c.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        while not self.stop.is_set():
            self._seen(c.infer(said))
            several = [ask.future(said, timeout=20) for _ in range(8)]
            for call in several:
                assert call.code() is grpc.StatusCode.OK, call.details()

    def _stream(self, c: Client) -> None:
        data = message(model="model").SerializeToString()
        room = threading.Semaphore(8)

        def said() -> Iterator[bytes]:
            while not self.stop.is_set():
                if room.acquire(timeout=0.1):
                    yield data

        for answer in c.stream(said(), timeout=None):
            room.release()
            assert not answer.error_message, answer.error_message
            self._seen(answer.infer_response)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(30)


def test_twenty_swaps_without_a_failed_call(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "models"
    put(directory, 1, models.autoencoder(1))
    served = starts(directory, "--grpc-port", "0")
    until(served.ready, "the model is loaded")
    load = Load(served.grpc_port)
    try:
        with client(served.grpc_port) as c:
            for version in range(2, 2 + SWAPS):
                put(directory, version, models.autoencoder(version))
                before = load.count
                assert c.ask("RepositoryModelLoad", model_name="model").isLoaded
                assert c.infer(message(model="model")).model_version == str(version)
                until(lambda before=before: load.count > before + 20 or load.failures, "the load goes on")
    finally:
        load.end()
    assert load.failures == []
    assert len(load.answers) >= SWAPS, "each version has answered"
    assert served.metric('pithead_grpc_responses_total{code="OK"}') > 20 * SWAPS
    assert "RpcError" not in served.log.read_text()
    x = np.frombuffer(next(iter(load.answers)), np.float32)
    assert np.isfinite(x).all()
    assert x.size == ONE.size
