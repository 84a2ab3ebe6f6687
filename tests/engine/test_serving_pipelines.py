"""Pipelines of what slots hold, in a real engine process."""

import json
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from agent.core.serve_models import Client as ClientLimit
from agent.core.serve_models import PipelineSpec, Step
from agent.ports import ModelSpec, PipelineState, ServeSpec
from agent.service.ailing import ailing
from contract.manifest import Channel
from models.dense import Layer, Network
from tests.engine.conftest import CHANNELS, Engine, Package, Supervisor, make_package
from tests.engine.test_serving_slots import call, connect, model, said_of, served, settings, until_serves
from tests.serve.grpc_client import Client, array, message

LINE = "line"


def affine(weight: float, bias: float, width: int = len(CHANNELS)) -> Network:
    """A network that gives ``weight`` x + ``bias``."""
    return Network((Layer(np.eye(width) * weight, np.full(width, bias), relu=False),))


def package(directory: Path, net: Network, version: str = "1.0.0", width: int = len(CHANNELS)) -> Package:
    channels = tuple(Channel(name=f"c{n}", minimum=-1000.0, maximum=1000.0) for n in range(width))
    return make_package(directory, kind="float32.onnx", version=version, net=net, channels=channels)


class Line:
    """``double``, then ``shift``: two models of one device, and the pipeline of both."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        made = package(directory, affine(2.0, 0.0))
        (takes,), (gives,) = made.variant.inputs, made.variant.outputs
        steps = (
            Step("shift", inputs={takes.name: "doubled"}, outputs={gives.name: "y"}),
            Step("double", inputs={takes.name: "x"}, outputs={gives.name: "doubled"}),
        )
        self.pipelines = {LINE: PipelineSpec(("x",), ("y",), steps)}
        self.double = model(made, model_name="double")

    def shift(self, bias: float, activation: int, width: int = len(CHANNELS)) -> ModelSpec:
        made = package(self.directory, affine(1.0, bias, width), f"1.0.{activation}", width)
        return model(made, activation, model_name="shift")


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def body(value: float = 1.0) -> dict[str, Any]:
    data = [value] * len(CHANNELS)
    return {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, len(data)], "data": data}]}


def ask(url: str, value: float = 1.0) -> tuple[int, Any]:
    """Return the status, and what comes out of it for ``value``."""
    status, said = call(url, "POST", f"/v2/models/{LINE}/infer", body(value))
    return status, said["outputs"][0]["data"][0] if status == 200 else said["error"]


def pipeline(supervisor: Supervisor) -> PipelineState:
    state = supervisor.serving
    assert state is not None
    return state.pipelines[0]


def test_a_pipeline_runs_over_the_models_in_service_and_a_swap_costs_none_of_its_requests(
    engine: Engine, line: Line
):
    supervisor = engine.connect()
    given = settings(grpc_port=0, pipelines=line.pipelines)
    first = line.shift(1.0, 1)
    supervisor.configure(serve=ServeSpec(given, (line.double, first)))
    listening = until_serves(supervisor, line.double, first)
    supervisor.until(lambda: not pipeline(supervisor).detail, "the pipeline can be asked")
    url = listening.url
    assert call(url, "GET", "/v2/health/ready")[0] == 200
    assert call(url, "GET", f"/v2/models/{LINE}")[1]["platform"] == "ensemble"
    assert ask(url, 3.0) == (200, 7.0)
    with grpc.insecure_channel(listening.grpc) as channel:
        answer = Client(channel).infer(message(np.array([[3.0] * 3], np.float32), LINE, "x"))
    assert float(array(answer)[0, 0]) == 7.0

    seen: Counter[tuple[int, float]] = Counter()
    end = threading.Event()

    def keep_asking() -> None:
        connection = connect(url)
        text = json.dumps(body())
        while not end.is_set():
            connection.request("POST", f"/v2/models/{LINE}/infer", text)
            found = connection.getresponse()
            said = json.loads(found.read())
            seen[found.status, said["outputs"][0]["data"][0] if found.status == 200 else -1.0] += 1
        connection.close()

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        for activation in range(2, 6):
            spec = line.shift(float(activation), activation)
            supervisor.configure(serve=ServeSpec(given, (line.double, spec)))
            until_serves(supervisor, line.double, spec)
    finally:
        end.set()
        asking.join(20)
    assert set(seen) <= {(200, float(2 + bias)) for bias in range(1, 6)}
    assert len(seen) > 1
    assert ask(url) == (200, 7.0)
    asked = sum(seen.values()) + 3
    supervisor.until(lambda: pipeline(supervisor).requests == asked, "its requests are counted")
    counted = Counter[str]()

    def all_counted() -> bool:
        counted.clear()
        for summary in served(supervisor):
            counted[summary.model_name] += summary.count
        return counted == {"double": asked, "shift": asked}

    supervisor.until(all_counted, "each step counts for its model")


def test_a_version_that_does_not_fit_the_device_s_pipeline_fails_its_trial(engine: Engine, line: Line):
    supervisor = engine.connect()
    given = settings(pipelines=line.pipelines)
    good, wide = line.shift(1.0, 1), line.shift(1.0, 2, width=4)
    supervisor.configure(serve=ServeSpec(given, (line.double, good)))
    url = until_serves(supervisor, line.double, good).url
    supervisor.until(lambda: ask(url) == (200, 3.0), "the pipeline answers")
    supervisor.configure(serve=ServeSpec(given, (line.double, wide)))
    supervisor.until(lambda: said_of(supervisor, "shift").state == "failed", "it counts against the new one")
    state = said_of(supervisor, "shift")
    assert (state.code, state.digest, state.activation) == ("serve.not_ready", wide.digest, 2)
    assert "pipeline line: step 1 (shift)" in state.detail
    assert said_of(supervisor, "double").state == "running"
    status, error = ask(url)
    assert (status, error.split(":")[0]) == (503, "serve.not_ready")
    (told,) = ailing([], supervisor.serving)
    assert (told.lane, told.what, told.code, told.detail) == (
        LINE,
        "pipeline",
        "serve.not_ready",
        state.detail,
    )

    supervisor.configure(serve=ServeSpec(given, (line.double, good)))
    until_serves(supervisor, line.double, good)
    assert ask(url) == (200, 3.0)
    supervisor.until(lambda: not ailing([], supervisor.serving), "all is well again")


def test_a_pipeline_that_never_worked_speaks_against_no_model(engine: Engine, line: Line):
    supervisor = engine.connect()
    given = settings(pipelines=line.pipelines, clients={"anybody": ClientLimit(rate=0.01, burst=2)})
    wide = line.shift(1.0, 1, width=4)
    supervisor.configure(serve=ServeSpec(given, (line.double,)))
    until_serves(supervisor, line.double)
    supervisor.until(lambda: "no model 'shift'" in pipeline(supervisor).detail, "it says what it lacks")
    supervisor.configure(serve=ServeSpec(given, (line.double, wide)))
    url = until_serves(supervisor, line.double, wide).url
    supervisor.until(
        lambda: "does not fit tensor" in pipeline(supervisor).detail, "it says what does not fit"
    )
    assert {m.state for m in supervisor.serving.models} == {"running"}
    assert call(url, "GET", "/v2/health/ready")[0] == 503
    fits = line.shift(5.0, 2)
    supervisor.configure(serve=ServeSpec(given, (line.double, fits)))
    until_serves(supervisor, line.double, fits)
    assert [ask(url)[0] for _ in range(3)] == [200, 200, 429], "its clients have their limits"
