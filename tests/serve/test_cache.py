"""Answers that are kept: the same bytes as without, within their budget, and never another session's."""

import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.engine.serve import cache as caching
from agent.engine.serve.cache import Cache, question_of
from agent.engine.serve.offers import Record
from contract.messages import ModelSummary
from inference.registry import open_session
from tests.inference.test_session_kinds import with_variable
from tests.serve import models
from tests.serve.conftest import Served, binary, start, tensor, until
from tests.serve.grpc_client import ONE, client, message

FILE = """
[models.autoencoder]
cache_mb = 1
[models.quantised]
cache_mb = 1
[models.texts]
cache_mb = 1
[models.add_sub]
cache_mb = 1
[models.gather]
cache_mb = 1
[models.memory]
cache_mb = 1
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    directory = models.write(tmp_path_factory.mktemp("cached"))
    (directory / "memory.tflite").write_bytes(with_variable())
    (directory / "serve.toml").write_text(FILE)
    served = start(directory, directory / "serve.log", "--grpc-port", "0", cache=cache)
    try:
        until(served.ready, "all models are loaded")
        yield served
    finally:
        assert served.stop() == 0
    assert "Traceback" not in served.log.read_text()


def stats(served: Served, model: str) -> dict[str, Any]:
    found: dict[str, Any] = served.get(f"/v2/models/{model}/stats").json["model_stats"][0]
    return found


def hits(served: Served, model: str) -> tuple[int, int]:
    of = stats(served, model)["inference_stats"]
    return of["cache_hit"]["count"], of["cache_miss"]["count"]


def asked(name: str, seed: int, rows: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, *name.encode())).normal(size=(rows, 64)).astype(np.float32)


# ---- over the wire


@pytest.mark.parametrize("model", ["autoencoder", "quantised"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_kept_answer_is_the_uncached_one_byte_for_byte(
    served: Served, shared: Served, model: str, rows: int
):
    x = asked(model, rows, rows)
    name = served.get(f"/v2/models/{model}").json["inputs"][0]["name"]
    json_body = {"id": "7", "inputs": [tensor(name, "FP32", x)]}
    body, length = binary([(name, "FP32", x)], parameters={"binary_data_output": True})
    said = message(x, model, name, id="7").SerializeToString()

    def all_three(one: Served) -> tuple[bytes, bytes]:
        raw = one.infer(model, body, inference_header_content_length=length)
        assert raw.headers["content-type"] == "application/octet-stream"
        return one.infer(model, json_body).body, raw.body

    before = hits(served, model)
    plain = all_three(shared)  # no serve.toml there
    assert plain == all_three(served) == all_three(served)
    with client(served.grpc_port) as one:
        got = {one.call("ModelInfer", said).SerializeToString() for _ in range(2)}
        reply = one.call("ModelInfer", message(x, model, name, id="8"))
    assert len(got) == 1
    assert reply.id == "8"
    assert reply.raw_output_contents[0] in plain[1]
    assert hits(served, model) == (before[0] + 6, before[1] + 1)


def test_hits_and_misses_are_counted_as_triton_does(served: Served):
    before, page = (
        stats(served, "add_sub"),
        'pithead_cache_requests_total{model="add_sub",version="3",outcome=',
    )
    x = np.arange(16, dtype=np.int32).reshape(1, 16)
    body = {"inputs": [tensor("INPUT0", "INT32", x), tensor("INPUT1", "INT32", x + 1)]}
    for _ in range(5):
        assert served.infer("add_sub", body).json["outputs"][0]["data"] == (x + x + 1)[0].tolist()
    after, of = stats(served, "add_sub"), stats(served, "add_sub")["inference_stats"]
    assert before["inference_stats"]["success"]["count"] == 0
    assert (of["success"]["count"], of["queue"]["count"], of["compute_infer"]["count"]) == (5, 5, 1)
    assert (of["cache_hit"]["count"], of["cache_miss"]["count"]) == (4, 1)
    assert of["cache_hit"]["ns"] > 0 < of["cache_miss"]["ns"]
    assert (after["inference_count"], after["execution_count"]) == (1, 1)
    assert (served.metric(f'{page}"hit"}}'), served.metric(f'{page}"miss"}}')) == (4, 1)
    assert served.metric('pithead_cache_entries{model="add_sub",version="3"}') == 1
    assert served.metric('pithead_cache_bytes{model="add_sub",version="3"}') > 4 * 64
    assert served.metric('pithead_inference_duration_seconds_count{model="add_sub",version="3"}') == 5
    assert served.get("/v2/models/add_sub/config").json["response_cache"] == {"enable": True}
    with client(served.grpc_port) as one:
        assert one.ask("ModelConfig", name="add_sub").config.response_cache.enable
        (line,) = one.ask("ModelStatistics", name="add_sub").model_stats
        assert (line.inference_stats.cache_hit.count, line.inference_stats.cache_miss.count) == (4, 1)


def test_another_output_another_order_and_another_shape_are_other_questions(served: Served):
    x, y = np.ones((1, 16), np.int32), np.full((1, 16), 5, np.int32)
    one, two = tensor("INPUT0", "INT32", x), tensor("INPUT1", "INT32", y)
    swapped = [tensor("INPUT0", "INT32", y), tensor("INPUT1", "INT32", x)]
    before = hits(served, "add_sub")

    def got(inputs: Any, **more: Any) -> list[tuple[str, int]]:
        outputs = served.infer("add_sub", {"inputs": inputs, **more}).json["outputs"]
        return [(o["name"], o["data"][0]) for o in outputs]

    for _ in range(2):
        assert got([one, two]) == got([two, one]) == [("OUTPUT0", 6), ("OUTPUT1", -4)]
        assert got(swapped) == [("OUTPUT0", 6), ("OUTPUT1", 4)]
        assert got([one, two], outputs=[{"name": "OUTPUT1"}]) == [("OUTPUT1", -4)]
        both = [{"name": "OUTPUT1"}, {"name": "OUTPUT0"}]
        assert got([one, two], outputs=both) == [("OUTPUT1", -4), ("OUTPUT0", 6)]
    assert hits(served, "add_sub") == (before[0] + 6, before[1] + 4)
    for shape in ((2, 32), (1, 64)):
        flat = np.zeros(shape, np.float32)
        status = served.infer("autoencoder", {"inputs": [tensor("input", "FP32", flat)]}).status
        assert status == (200 if shape[1] == 64 else 400)


def test_classes_are_made_of_what_is_kept(served: Served):
    x = np.arange(16, dtype=np.int32).reshape(1, 16) * 3
    inputs = [tensor("INPUT0", "INT32", x), tensor("INPUT1", "INT32", x)]
    best = {"outputs": [{"name": "OUTPUT0", "parameters": {"classification": 2}}]}
    plain = {"outputs": [{"name": "OUTPUT0"}]}
    first = [served.infer("add_sub", {"inputs": inputs, **wish}).json for wish in (best, plain)]
    again = [served.infer("add_sub", {"inputs": inputs, **wish}).json for wish in (best, plain)]
    assert first == again
    assert first[0]["outputs"][0]["data"] == ["90:15", "84:14"]
    assert first[1]["outputs"][0]["data"][-1] == 90


def test_texts_are_kept_too(served: Served):
    for words in (["a", "bc"], ["ab", "c"], ["a", "bc"]):
        body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": words}]}
        assert served.infer("texts", body).json["outputs"][0]["data"] == words
    assert hits(served, "texts") == (1, 2)


def test_what_failed_is_asked_again(served: Served):
    bad = {"inputs": [tensor("i", "INT64", np.array([7]))]}
    assert [served.infer("gather", bad).status for _ in range(3)] == [400, 400, 400]
    assert hits(served, "gather") == (0, 0)
    assert stats(served, "gather")["inference_stats"]["fail"]["count"] == 3


def test_a_model_with_a_memory_and_a_sequence_are_never_answered_from_it(served: Served):
    body = {"inputs": [tensor("x", "FP32", np.array([[1.0, 2.0]]))]}
    sums = [served.infer("memory", body).array()[0, 0] for _ in range(3)]
    assert sums[0] != sums[1]
    assert hits(served, "memory") == (0, 0)
    assert "model.answers_not_kept model=memory why=SVDF may remember earlier runs" in served.log.read_text()

    before = hits(served, "autoencoder")
    body = {"inputs": [tensor("input", "FP32", ONE)], "parameters": {"sequence_id": 4}}
    assert [served.infer("autoencoder", body).status for _ in range(2)] == [200, 200]
    assert hits(served, "autoencoder") == before


def test_without_the_setting_nothing_is_kept(shared: Served):
    body = {"inputs": [tensor("input", "FP32", asked("off", 0))]}
    for _ in range(2):
        shared.infer("autoencoder", body)
    assert hits(shared, "autoencoder") == (0, 0)
    assert "response_cache" not in shared.get("/v2/models/autoencoder/config").json


def test_a_swap_takes_the_old_answers_with_it(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "a.onnx").write_bytes(models.autoencoder(seed=0))
    (directory / "serve.toml").write_text("[models.a]\ncache_mb = 1\n")
    served = starts(directory)
    until(served.ready, "it is loaded")
    body = {"inputs": [tensor("input", "FP32", ONE)]}
    first = [served.infer("a", body).body for _ in range(2)]
    assert served.metric('pithead_cache_entries{model="a",version="1"}') == 1

    new = tmp_path / "new.onnx"
    new.write_bytes(models.autoencoder(seed=1))
    new.rename(directory / "a.onnx")
    assert served.ask("POST", "/v2/repository/models/a/load").status == 200
    assert served.metric('pithead_cache_entries{model="a",version="1"}') == 0
    second = [served.infer("a", body).body for _ in range(2)]
    assert (first[0], second[0]) == (first[1], second[1])
    assert first[0] != second[0]
    assert hits(served, "a") == (2, 2)


# ---- the cache alone


def put(held: Cache, i: int, answer: np.ndarray[Any, Any]) -> Any:
    inputs = {"x": np.full(16, i, np.float32)}
    question = question_of(["x"], inputs, None, real=False)
    held.put(question, inputs, {"y": answer})
    return question


def test_the_least_recently_used_leaves_first_and_the_budget_holds():
    answer = np.zeros(256, np.float32)
    held = Cache(10 * (caching.ENTRY_BYTES + 2 * caching.TENSOR_BYTES + 64 + 1024))
    questions = [put(held, i, answer) for i in range(10)]
    assert held.get(questions[0]) is not None
    questions.append(put(held, 10, answer))
    assert [held.get(q) is None for q in questions] == [False, True] + [False] * 9
    put(held, 11, np.zeros(100_000, np.float32))  # larger than all of it: nobody leaves for that
    assert len(held) == 10
    held.clear()
    assert (held.get(questions[0]), held.bytes) == (None, 0)
    put(held, 12, answer)
    assert len(held) == 0


@pytest.mark.parametrize("width", [1, 16, 1000])
def test_what_is_counted_is_what_it_takes(width: int):
    held = Cache(500_000)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for i in range(1000):
        inputs = {"x": np.full(width, i, np.float32), "t": np.array([b"%d" % i], object)}
        outputs = {"y": inputs["x"] + 1, "t": np.array([b"%d" % (i * 2**k) for k in range(3)], object)}
        held.put(question_of(["x", "t"], inputs, None, real=False), inputs, outputs)
    del inputs, outputs
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 50 < len(held) < 1000
    assert 0.5 * held.bytes < taken < 1.05 * held.bytes


def test_nan_and_infinity_are_not_kept_and_answers_cannot_be_changed():
    held = Cache(1_000_000)
    for i, value in enumerate((np.nan, np.inf)):
        assert held.get(put(held, i, np.array([value, 1], np.float32))) is None
    batch = np.arange(8, dtype=np.float32)
    question = put(held, 9, batch[2:4])
    batch[:] = 0
    found = held.get(question)
    assert found is not None
    assert found["y"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="read-only"):
        found["y"][0] = 1


def test_models_that_remember_or_roll_dice_are_found_out():
    from onnx import TensorProto, helper  # noqa: PLC0415 - only here

    dice = helper.make_graph(
        [
            helper.make_node("RandomNormalLike", ["x"], ["r"]),
            helper.make_node("Add", ["x", "r"], ["y"]),
        ],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    model = helper.make_model(dice, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    for content, kind, why in (
        (model.SerializeToString(), "onnx", "RandomNormalLike is random"),
        (with_variable(), "tflite", "SVDF may remember earlier runs"),
        (models.autoencoder(), "onnx", ""),
        (models.quantised(), "tflite", ""),
    ):
        session = open_session(content, kind)
        assert caching.why_not(session, session.inputs) == why
        session.close()


def test_what_no_name_tells_two_runs_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caching, "KEEPS_STATE", frozenset())
    session = open_session(with_variable(), "tflite")
    assert "another answer" in caching.why_not(session, session.inputs)


# ---- on a device of the fleet


def test_hits_count_as_answers_and_not_as_latencies():
    record = Record()
    head = ModelSummary(model_name="m", version="1", bucket_start=0, bucket_s=60.0, count=0)
    record.succeeded(1, 0, 1_000, 900_000, 1_000)
    for _ in range(9):
        record.hit(2_000)
    said = record.take(head, 0)
    assert (said.count, said.errors) == (10, 0)
    assert said.latency_us is not None
    assert (said.latency_us.count, round(said.latency_us.minimum)) == (1, 902)
    record.hit(2_000)
    said = record.take(head, 0)
    assert (said.count, said.latency_us) == (1, None)
    assert (record.answered, record.anything) == (11, False)
