"""Graphs of served models: what is checked before the first request, and what a request finds."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.core.serve_models import PipelineSpec as Spec
from agent.core.serve_models import Step
from agent.core.settings import ServeMqtt
from agent.engine.serve.catalogue import Limits
from agent.engine.serve.configuration import Configuration, read
from agent.engine.serve.messages import Responder
from agent.engine.serve.opening import Opened
from agent.engine.serve.pipeline_plan import Interface, plan
from agent.engine.serve.repository import Candidate, Memory
from agent.engine.serve.requests import InferRequest
from agent.engine.serve.service import Service
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.registry import open_session
from inference.reports import Placement
from tests.engine.test_mqtt import CLOCK, MOSQUITTO, Broker
from tests.engine.test_serving_mqtt import Asker
from tests.serve import models
from tests.serve.conftest import Served, binary, start, tensor, until
from tests.serve.grpc_client import array, client, message

X = TensorSpec("x", "FP32", (-1, 4))
Y = TensorSpec("y", "FP32", (-1, 4))
LINE = Interface((X,), (Y,), batches=True)


def spec(*steps: Step, inputs: tuple[str, ...] = ("a",), outputs: tuple[str, ...] = ("c",)) -> Spec:
    return Spec(inputs, outputs, steps)


def step(model: str, takes: str, makes: str) -> Step:
    return Step(model, inputs={"x": takes}, outputs={"y": makes})


def refusal(given: Spec, **known: Interface) -> str:
    with pytest.raises(PitheadError) as caught:
        plan("line", given, {(name, ""): interface for name, interface in known.items()})
    assert caught.value.code == "config.invalid"
    return caught.value.detail


def test_a_plan_infers_what_flows_and_what_runs_first():
    wide = Interface((TensorSpec("l", "FP32", (1, 4)), TensorSpec("r", "FP32", (-1, 4))), (Y,))
    join = Step("join", inputs={"l": "b1", "r": "b2"}, outputs={"y": "c"})
    given = spec(join, step("one", "a", "b1"), step("two", "a", "b2"))
    made = plan("line", given, {("join", ""): wide, ("one", ""): LINE, ("two", ""): LINE})
    assert made.first == (1, 2)
    assert [s.waits for s in made.steps] == [2, 0, 0]
    assert made.takers["b1"] == (0,)
    assert [(t.name, t.datatype, t.shape) for t in made.inputs] == [("a", "FP32", (-1, 4))]
    assert [(t.name, t.datatype, t.shape) for t in made.outputs] == [("c", "FP32", (-1, 4))]
    assert not made.batches


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (spec(step("none", "a", "c")), "step 1 (none): no model 'none' is served"),
        (spec(step("m", "zz", "c")), "step 1 (m): input 'x' takes tensor 'zz', which nothing makes"),
        (spec(Step("m", inputs={"q": "a"})), "step 1 (m): inputs: 'q' is no input of the model"),
        (
            spec(step("m", "a", "b"), step("m", "b", "b"), outputs=("b",)),
            "step 2 (m): makes tensor 'b', and so does step 1 (m)",
        ),
        (spec(step("m", "a", "c"), step("m", "a", "d")), "step 2 (m): nothing takes what it makes: ['d']"),
        (spec(step("m", "a", "c"), inputs=("a", "b")), "inputs: no step takes tensor 'b'"),
        (spec(step("m", "a", "b")), "outputs: no step makes tensor 'c'"),
        (
            spec(step("m", "a", "c"), step("m", "e", "d"), step("m", "d", "e"), outputs=("c", "e")),
            "waits for itself: step 3 (m) needs 'd', step 2 (m) needs 'e'",
        ),
        (
            spec(step("m", "a", "b"), step("whole", "b", "c")),
            "step 2 (whole): input 'x' takes INT64, tensor 'b' (output 'y' of step 1 (m)) is FP32",
        ),
        (
            spec(step("m", "a", "b"), step("long", "b", "c")),
            "step 2 (long): input 'x': shape [-1, 5] does not fit tensor 'b' (output 'y' of step 1 (m)), [-1",
        ),
        (
            spec(step("m", "a", "c"), step("whole", "a", "d"), outputs=("c", "d")),
            "step 2 (whole): input 'x' takes INT64, tensor 'a' is FP32",
        ),
    ],
)
def test_what_cannot_fit_is_named(given: Spec, words: str):
    said = refusal(
        given,
        m=LINE,
        whole=Interface((TensorSpec("x", "INT64", (-1, 4)),), (Y,)),
        long=Interface((TensorSpec("x", "FP32", (-1, 5)),), (Y,)),
    )
    assert said.startswith("pipeline line: ")
    assert words in said


def test_quantised_steps_take_reals_or_their_own_integers():
    coarse = Interface(
        (TensorSpec("x", "INT8", (1, 4), 0.5, 0),), (TensorSpec("y", "INT8", (1, 4), 0.25, 1),)
    )
    fine = Interface((TensorSpec("x", "INT8", (1, 4), 0.1, 0),), (TensorSpec("y", "INT8", (1, 4), 0.1, 0),))
    after_floats = plan(
        "p", spec(step("m", "a", "b"), step("q", "b", "c")), {("m", ""): LINE, ("q", ""): coarse}
    )
    assert after_floats.outputs[0].datatype == "FP32"
    alone = plan("p", spec(step("q", "a", "c")), {("q", ""): coarse})
    assert (alone.inputs[0].datatype, alone.outputs[0].datatype) == ("INT8", "INT8")
    assert alone.reals == {"a"}
    said = refusal(spec(step("q", "a", "b"), step("f", "b", "c")), q=coarse, f=fine)
    assert "takes INT8 (scale 0.1, zero point 0)" in said
    assert "INT8 (scale 0.25, zero point 1)" in said


# ---- in this process: what cannot be seen from outside


class Watched:
    """A session that remembers the arrays that went in and came out, and may wait."""

    accelerator, runtime = "cpu", "test"
    placement = Placement(())

    def __init__(self, factor: float, wait_s: float = 0.0) -> None:
        self.inputs, self.outputs = (X,), (Y,)
        self.factor, self.wait_s = factor, wait_s
        self.took: list[Any] = []
        self.gave: list[Any] = []
        self.closed = False

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        assert not self.closed
        if self.wait_s:
            time.sleep(self.wait_s)
        made = inputs["x"] * np.float32(self.factor)
        self.took.append(inputs["x"])
        self.gave.append(made)
        return {"y": made}

    def reset(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def candidate(name: str, session: Any, identity: str = "1") -> Candidate:
    opened = Opened(session, session.inputs, session.outputs, 100)
    return Candidate(name, "1", "test", identity, lambda: opened)


def run(test: Callable[[Service, Memory], Any], pipeline: Spec, **sessions: Any) -> None:
    async def main() -> None:
        memory = Memory()
        for name, session in sessions.items():
            memory.put(candidate(name, session))
        service = Service([memory], Limits(configuration=Configuration(pipelines={"line": pipeline})))
        await service.start()
        end = time.monotonic() + 20
        while not service.ready:
            assert time.monotonic() < end
            await asyncio.sleep(0.005)
        try:
            await test(service, memory)
        finally:
            await service.stop()

    asyncio.run(main())


def ones(rows: int = 1) -> dict[str, Any]:
    return {"a": np.ones((rows, 4), np.float32)}


def test_the_same_memory_goes_from_step_to_step():
    first, second = Watched(2), Watched(3)

    async def test(service: Service, _memory: Memory) -> None:
        given = ones()
        answer = await service.infer(InferRequest("line", given))
        assert first.took[-1] is given["a"]
        assert second.took[-1] is first.gave[-1]
        assert answer.outputs["c"] is second.gave[-1]
        assert answer.outputs["c"].tolist() == [[6.0] * 4]

    run(test, spec(step("first", "a", "b"), step("second", "b", "c")), first=first, second=second)


def test_the_same_memory_goes_through_real_sessions():
    """ONNX Runtime's own output buffer is what the next model gets, by address."""
    addresses: list[tuple[str, int, int]] = []

    class Spied:
        def __init__(self, name: str) -> None:
            self._name, self._real = name, open_session(models.autoencoder(), "onnx")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            outputs = self._real.run(inputs)
            addresses.append((self._name, _address(inputs["input"]), _address(outputs["output"])))
            return outputs

    async def test(service: Service, _memory: Memory) -> None:
        addresses.clear()
        answer = await service.infer(InferRequest("line", {"a": np.ones((1, 64), np.float32)}))
        (one, _, made), (two, taken, last) = addresses
        assert (one, two, made) == ("one", "two", taken)
        assert last == _address(answer.outputs["c"])

    chain = (
        Step("one", inputs={"input": "a"}, outputs={"output": "b"}),
        Step("two", inputs={"input": "b"}, outputs={"output": "c"}),
    )
    run(test, spec(*chain), one=Spied("one"), two=Spied("two"))


def _address(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def test_steps_that_do_not_need_each_other_run_side_by_side():
    left, right = Watched(2, wait_s=0.002), Watched(3, wait_s=0.002)  # too long to run on the loop
    given = spec(step("left", "a", "l"), step("right", "a", "r"), outputs=("l", "r"))

    async def test(service: Service, _memory: Memory) -> None:
        left.wait_s = right.wait_s = 0.15
        began = time.monotonic()
        answer = await service.infer(InferRequest("line", ones()))
        assert time.monotonic() - began < 0.29  # they sleep, so a busy machine does not matter much
        assert (answer.outputs["l"][0, 0], answer.outputs["r"][0, 0]) == (2, 3)

    run(test, given, left=left, right=right)


def test_a_request_keeps_its_models_to_its_end():
    """Both steps are swapped while a request is in the first: it is answered by the old ones alone."""
    first, second = Watched(2, wait_s=0.002), Watched(3)

    async def test(service: Service, memory: Memory) -> None:
        first.wait_s = 0.3
        waits = asyncio.ensure_future(service.infer(InferRequest("line", ones())))
        await asyncio.sleep(0)
        for name in ("first", "second"):
            memory.put(candidate(name, Watched(10), "2"))
            await service.load(name)
        assert not waits.done()
        later = await service.infer(InferRequest("line", ones()))
        assert later.outputs["c"][0, 0] == 100
        assert (await waits).outputs["c"][0, 0] == 6
        end = time.monotonic() + 10
        while not (first.closed and second.closed):  # and is not kept any longer
            assert time.monotonic() < end
            await asyncio.sleep(0.005)

    run(test, spec(step("first", "a", "b"), step("second", "b", "c")), first=first, second=second)


def test_a_swap_that_does_not_fit_takes_the_pipeline_out_and_says_why():
    class Longer(Watched):
        def __init__(self) -> None:
            super().__init__(1)
            self.inputs = (TensorSpec("x", "FP32", (-1, 9)),)

    async def test(service: Service, memory: Memory) -> None:
        memory.put(candidate("second", Longer(), "2"))
        await service.load("second")
        assert not service.model_ready("line")
        with pytest.raises(PitheadError, match=r"serve.not_ready: .*step 2 \(second\): input 'x': shape"):
            await service.infer(InferRequest("line", ones()))
        memory.put(candidate("second", Watched(3), "3"))
        await service.load("second")
        assert (await service.infer(InferRequest("line", ones()))).outputs["c"][0, 0] == 6

    run(test, spec(step("first", "a", "b"), step("second", "b", "c")), first=Watched(2), second=Watched(3))


def test_a_step_that_fails_is_named_and_holds_nothing():
    class Fails(Watched):
        def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
            if inputs["x"][0, 0] == 7:
                raise PitheadError("inference.run_failed", "it cannot be seven")
            return super().run(inputs)

    async def test(service: Service, _memory: Memory) -> None:
        with pytest.raises(PitheadError, match=r"run_failed: step 1 \(first\): it cannot be seven"):
            await service.infer(InferRequest("line", {"a": np.full((1, 4), 7, np.float32)}))
        assert await service.catalogue.drain(5)
        stats = service.statistics("line")[0]["inference_stats"]
        assert (stats["fail"]["count"], stats["success"]["count"]) == (1, 0)

    run(test, spec(step("first", "a", "b"), step("second", "b", "c")), first=Fails(2), second=Watched(3))


@pytest.mark.skipif(not MOSQUITTO.exists(), reason="mosquitto is not installed (make system)")
def test_over_mqtt(tmp_path: Path):
    broker = Broker(tmp_path)
    asker = Asker(broker)

    async def test(service: Service, _memory: Memory) -> None:
        responder = Responder(ServeMqtt(port=broker.port), service, CLOCK)
        loop = asyncio.get_running_loop()
        try:
            end = time.monotonic() + 20
            while responder.state != "connected":
                assert time.monotonic() < end
                responder.tick(loop.time())
                await asyncio.sleep(0.02)
            body = json.dumps({"inputs": [tensor("a", "FP32", ones()["a"])]}).encode()
            asker.ask(body, topic="pithead/infer/line")
            answer = json.loads((await loop.run_in_executor(None, asker.answer)).payload)
            assert (answer["model_name"], answer["outputs"][0]["name"]) == ("line", "c")
            assert answer["outputs"][0]["data"] == [6.0] * 4
        finally:
            await responder.close()

    try:
        run(
            test, spec(step("first", "a", "b"), step("second", "b", "c")), first=Watched(2), second=Watched(3)
        )
    finally:
        asker.end()
        broker.end()


# ---- a real server

FILE = """
[pipelines.twice]
inputs = ["raw"]
outputs = ["scores", "middle"]

[[pipelines.twice.steps]]
model = "quantised"
inputs = { input = "middle" }
outputs = { output = "scores" }

[[pipelines.twice.steps]]
model = "autoencoder"
inputs = { input = "raw" }
outputs = { output = "middle" }
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("pipelines")
    (directory / "autoencoder.onnx").write_bytes(models.autoencoder())
    (directory / "quantised.tflite").write_bytes(models.quantised())
    (directory / "serve.toml").write_text(FILE)
    made = start(directory, tmp_path_factory.mktemp("log") / "serve.log", "--grpc-port", "0", cache=cache)
    try:
        until(made.ready, "the pipeline is ready")
        yield made
    finally:
        assert made.stop() == 0, made.log.read_text()
    assert "Traceback" not in made.log.read_text()


RAW = (np.arange(64, dtype=np.float32).reshape(1, 64) / 64).astype(np.float32)


def by_hand(served: Served) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """What a client gets that asks one model after the other."""
    middle = served.infer("autoencoder", {"inputs": [tensor("input", "FP32", RAW)]}).array()
    return served.infer("quantised", {"inputs": [tensor("input", "FP32", middle)]}).array(), middle


def test_over_rest(served: Served):
    scores, middle = by_hand(served)
    answer = served.infer("twice", {"id": "7", "inputs": [tensor("raw", "FP32", RAW)]})
    assert (answer.status, answer.json["model_name"], answer.json["id"]) == (200, "twice", "7")
    assert [o["name"] for o in answer.json["outputs"]] == ["scores", "middle"]
    assert np.array_equal(answer.array(0), scores)
    assert np.array_equal(answer.array(1), middle)
    body, length = binary([("raw", "FP32", RAW)], parameters={"binary_data_output": True})
    raw = served.infer("twice", body, Inference_Header_Content_Length=length)
    at = int(raw.headers["inference-header-content-length"])
    assert raw.body[at:] == scores.tobytes() + middle.tobytes()
    some = {"inputs": [tensor("raw", "FP32", RAW)], "outputs": [{"name": "middle"}]}
    assert [o["name"] for o in served.infer("twice", some).json["outputs"]] == ["middle"]
    best = {"inputs": [tensor("raw", "FP32", RAW)]}
    best["outputs"] = [{"name": "scores", "parameters": {"classification": 1}}]
    assert served.infer("twice", best).json["outputs"][0]["datatype"] == "BYTES"


def test_over_grpc(served: Served):
    scores, middle = by_hand(served)
    with client(served.grpc_port) as grpc:
        answer = grpc.infer(message(RAW, "twice", "raw"))
        assert np.array_equal(array(answer, 0), scores)
        assert np.array_equal(array(answer, 1), middle)
        assert grpc.ask("ModelReady", name="twice").ready
        assert grpc.ask("ModelMetadata", name="twice").platform == "ensemble"
        config = grpc.ask("ModelConfig", name="twice").config
        first = config.ensemble_scheduling.step[0]
        assert (first.model_name, first.model_version, dict(first.input_map)) == (
            "quantised",
            -1,
            {"input": "middle"},
        )


def test_what_it_says_of_itself(served: Served):
    said = served.get("/v2/models/twice").json
    assert (said["platform"], said["versions"]) == ("ensemble", ["1"])
    assert said["inputs"] == [{"name": "raw", "datatype": "FP32", "shape": [-1, 64]}]
    assert [(o["name"], o["datatype"]) for o in said["outputs"]] == [("scores", "FP32"), ("middle", "FP32")]
    assert served.get("/v2/models/twice/versions/1/ready").json["ready"]
    assert served.get("/v2/models/twice/versions/2/ready").status == 404
    assert served.get("/v2/models/twice/config").json["ensemble_scheduling"]["step"][1]["output_map"] == {
        "output": "middle"
    }
    index = {line["name"]: line["state"] for line in served.ask("POST", "/v2/repository/index").json}
    assert index["twice"] == "READY"


def test_the_pipeline_and_its_steps_count(served: Served):
    def counted() -> dict[str, int]:
        stats = served.get("/v2/models/stats").json["model_stats"]
        return {s["name"]: s["inference_stats"]["success"]["count"] for s in stats}

    before = counted()
    assert served.infer("twice", {"inputs": [tensor("raw", "FP32", RAW)]}).status == 200
    after = counted()
    assert {name: after[name] - before[name] for name in after} == {
        "twice": 1,
        "quantised": 1,
        "autoencoder": 1,
    }
    labels = 'model="twice",version="1",outcome="success"'
    assert served.metric(f"pithead_inference_requests_total{{{labels}}}") == after["twice"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([], "inputs: 'raw' is missing"),
        ([tensor("other", "FP32", RAW)], "inputs: 'other' is no input; the pipeline's are ['raw']"),
        ([tensor("raw", "FP32", RAW[:, :3])], "input 'raw': shape: [1, 3] does not fit"),
        ([tensor("raw", "INT64", RAW.astype(int))], "input 'raw': datatype: INT64, the pipeline takes FP32"),
    ],
)
def test_a_wrong_request_is_told_in_the_pipelines_words(served: Served, tensors: list[Any], words: str):
    answer = served.infer("twice", {"inputs": tensors})
    assert answer.status == 400
    assert words in answer.error


def test_it_is_unloaded_and_loaded_without_its_models(served: Served):
    assert served.ask("POST", "/v2/repository/models/twice/unload").status == 200
    assert served.infer("twice", {"inputs": [tensor("raw", "FP32", RAW)]}).status == 404
    assert served.get("/v2/models/twice").status == 404
    assert served.infer("autoencoder", {"inputs": [tensor("input", "FP32", RAW)]}).status == 200
    assert served.ask("POST", "/v2/repository/models/twice/load").status == 200
    assert served.infer("twice", {"inputs": [tensor("raw", "FP32", RAW)]}).status == 200


def test_without_one_of_its_models_it_is_not_ready(served: Served):
    assert served.ask("POST", "/v2/repository/models/quantised/unload").status == 200
    try:
        assert served.get("/v2/models/twice/ready").status == 503
        assert served.get("/v2/health/ready").status == 503
        answer = served.infer("twice", {"inputs": [tensor("raw", "FP32", RAW)]})
        assert answer.status == 503
        assert "step 1 (quantised): no model 'quantised' is served" in answer.error
    finally:
        assert served.ask("POST", "/v2/repository/models/quantised/load").status == 200
    assert served.get("/v2/models/twice/ready").status == 200
    assert served.get("/v2/health/ready").status == 200


def test_idle_steps_are_loaded_by_the_first_request(served: Served, starts: Callable[..., Served]):
    lazy = starts(served.directory, "--lazy")
    assert until(lazy.ready, "the directory is read")
    answer = lazy.infer("twice", {"inputs": [tensor("raw", "FP32", RAW)]})
    assert answer.status == 200, answer.body
    assert lazy.metric("pithead_model_loads_total") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[pipelines.p]", "serve.toml: Object missing required field `inputs` - at `$.pipelines[...]`"),
        ("[pipelins.p]", "serve.toml: Object contains unknown field `pipelins`"),
        ("[", "serve.toml: "),
    ],
)
def test_a_file_that_cannot_be_read_ends_the_start(tmp_path: Path, text: str, words: str):
    (tmp_path / "serve.toml").write_text(text)
    with pytest.raises(PitheadError, match=re.escape(words)) as caught:
        read(tmp_path)
    assert caught.value.code == "config.invalid"
