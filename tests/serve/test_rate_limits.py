"""How often a client and a model may be asked, told over REST and gRPC with the time to wait."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from agent.core.serve_models import Client, Limited, ServedModel
from agent.engine.serve import rates, tokens
from agent.engine.serve.rates import Bucket, Rates
from contract.errors import PitheadError
from tests.serve import models
from tests.serve.conftest import Served, start, tensor, until
from tests.serve.grpc_client import CLASSES, client, message

BODY = {"inputs": [tensor("input", "FP32", np.ones((1, models.WIDTH), np.float32))]}
RARELY = 0.001
"""A second: nothing is paid off while a test runs."""
FILE = f"""
[models.autoencoder]
rate = {RARELY}
burst = 20

[clients."*"]
rate = {RARELY}
burst = 3

[clients.line]
rate = {RARELY}
burst = 2

[clients.boss]
"""


@dataclass
class Asked:
    served: Served
    tokens: dict[str, str]

    def infer(self, name: str, model: str = "autoencoder", body: Any = BODY):
        return self.served.infer(model, body, Authorization=f"Bearer {self.tokens[name]}")

    def head(self, name: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.tokens[name]}"),)

    def metric(self, name: str) -> float:
        page = self.served.get("/metrics", Authorization=f"Bearer {self.tokens['boss']}").body.decode()
        return float(next(line for line in page.splitlines() if line.startswith(f"{name} ")).split()[-1])


@pytest.fixture
def asked(tmp_path: Path, cache: Path) -> Iterator[Asked]:
    """A server with limits that are not used up yet."""
    directory = tmp_path / "models"
    directory.mkdir()
    for name in ("autoencoder", "other"):
        (directory / f"{name}.onnx").write_bytes(models.autoencoder())
    (directory / "serve.toml").write_text(FILE)
    made = {name: tokens.new(name, "infer") for name in ("line", "boss", "third", "fourth")}
    (tmp_path / "tokens").write_text("\n".join(line for _, line in made.values()))
    arguments = ("--token-file", str(tmp_path / "tokens"), "--grpc-port", "0")
    served = start(directory, tmp_path / "serve.log", *arguments, cache=cache)
    one = Asked(served, {name: token for name, (token, _) in made.items()})

    def ready() -> bool:
        head = one.head("boss")[0][1]
        return served.get("/v2/health/ready", Authorization=head).status == 200

    try:
        until(ready, "all models are loaded")
        yield one
    finally:
        assert served.stop() == 0
    assert "Traceback" not in served.log.read_text()


def test_a_client_is_told_429_and_when_to_come_back_and_others_are_not(asked: Asked):
    assert [asked.infer("line").status for _ in range(3)] == [200, 200, 429]
    reply = asked.infer("line", "other")
    assert reply.status == 429
    assert 900 <= int(reply.headers["retry-after"]) <= 1000
    assert reply.error.startswith("serve.rate_limited: client 'line' may ask 0.001 times a second; again in ")
    # Each of those that have no table has a limit of its own, and an empty table is no limit.
    assert [asked.infer("third").status for _ in range(4)] == [200, 200, 200, 429]
    assert [asked.infer("fourth").status for _ in range(4)] == [200, 200, 200, 429]
    assert [asked.infer("boss", "other").status for _ in range(30)] == [200] * 30
    # Whatever else it asks costs nothing.
    head = asked.head("line")[0][1]
    assert asked.served.get("/v2/models/autoencoder", Authorization=head).status == 200
    assert asked.metric('pithead_rate_limited_total{limit="client",name="line"}') == 2
    assert asked.metric('pithead_http_responses_total{code="429"}') == 4


def test_a_model_has_a_limit_for_all_together_and_a_refusal_costs_nothing(asked: Asked):
    assert asked.infer("line").status == 200
    assert [asked.infer("boss").status for _ in range(19)] == [200] * 19
    reply = asked.infer("line")
    assert (reply.status, "model 'autoencoder' may be asked 0.001" in reply.error) == (429, True)
    assert asked.infer("line", "other").status == 200  # the refused request was not counted
    assert asked.infer("line", "other").status == 429
    assert asked.metric('pithead_rate_limited_total{limit="model",name="autoencoder"}') == 1
    assert asked.infer("boss", "nobody").status == 404


def test_grpc_says_so_with_pushback_and_a_stream_goes_on(asked: Asked):
    with client(asked.served.grpc_port) as one:
        for _ in range(2):
            one.infer(metadata=asked.head("line"))
        refused = one.refused(
            message(), grpc.StatusCode.RESOURCE_EXHAUSTED, "serve.rate_limited", metadata=asked.head("line")
        )
        (pushback,) = [v for k, v in refused.trailing_metadata() if k == "grpc-retry-pushback-ms"]
        assert 900_000 <= int(pushback) <= 1_000_000
        # What REST took counts here, and the other way round.
        assert asked.infer("line").status == 429

        said = [message(id=str(i)).SerializeToString() for i in range(5)]
        got = list(one.stream(said, metadata=asked.head("third")))
        assert [answer.infer_response.id for answer in got[:3]] == ["0", "1", "2"]
        assert all("serve.rate_limited" in answer.error_message for answer in got[3:])
        assert [answer.infer_response.id for answer in got[3:]] == ["3", "4"]
        assert one.call("ServerLive", CLASSES["ServerLiveRequest"](), metadata=asked.head("line")).live


def test_without_tokens_everybody_is_one_client_and_what_was_taken_is_paid_off(
    starts: Callable[..., Served], tmp_path: Path
):
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "autoencoder.onnx").write_bytes(models.autoencoder())
    (directory / "serve.toml").write_text('[clients."*"]\nrate = 20\nburst = 2\n')
    served = starts(directory)
    until(served.ready, "it is loaded")
    first = time.monotonic()
    statuses = []
    while statuses.count(200) < 12:
        statuses.append(served.infer("autoencoder", BODY).status)
    took = time.monotonic() - first
    assert took > 10 / 20 * 0.98
    assert set(statuses) == {200, 429}
    assert "client 'anybody'" in served.infer("autoencoder", BODY).error


def test_no_limit_no_look(shared: Served):
    assert [shared.infer("autoencoder", BODY).status for _ in range(50)] == [200] * 50
    assert "pithead_rate_limited_total{" not in shared.get("/metrics").body.decode()


# ---- pure


def test_a_bucket_takes_its_burst_and_then_its_rate():
    bucket = Bucket(Limited(rate=10, burst=3))
    at, taken = 0, []
    for at in range(0, 2_000_000_000, 10_000_000):
        if bucket.wait(at) <= 0:
            bucket.take(at)
            taken.append(at)
    assert len(taken) == 3 + 19
    assert taken[:3] == [0, 10_000_000, 20_000_000]
    assert round(bucket.wait(taken[-1]) * 1e-9, 3) == 0.1
    assert bucket.wait(10**12) < 0


@pytest.mark.parametrize(("rate", "burst"), [(0.2, 1), (1.0, 1), (2.5, 3), (100.0, 100)])
def test_a_burst_is_a_second_unless_it_is_said(rate: float, burst: int):
    bucket, taken = Bucket(Limited(rate=rate)), 0
    while bucket.wait(5) <= 0:
        bucket.take(5)
        taken += 1
    assert taken == burst


def test_new_limits_keep_what_was_taken_where_they_are_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rates.time, "monotonic_ns", lambda: 1_000)
    one, each = Client(rate=1, burst=1), Client(rate=1, burst=2)
    held = Rates({"m": ServedModel(rate=1, burst=3)}, {"a": one, "*": each})
    for name in ("a", "b", "b"):
        held.admit(name, "m")

    def refused(name: str, model: str) -> bool:
        try:
            held.admit(name, model)
        except PitheadError as error:
            return error.code == "serve.rate_limited"
        return False

    held.become({"m": ServedModel(rate=1, burst=3)}, {"a": one, "*": each})
    assert [refused(n, "other") for n in ("a", "b", "c")] == [True, True, False]
    assert refused("c", "m")  # three were taken of it
    held.become({}, {"a": Client(rate=1, burst=2), "*": each})
    assert [refused(n, "m") for n in ("a", "a", "a", "b")] == [False, False, True, True]
    held.become({}, {})
    assert not refused("a", "m")
    assert Rates.of({"m": ServedModel(cache_mb=1)}, {"a": Client()}) is None
