"""Versions side by side: shares by weight and by key, and a shadow that is compared and costs little."""

import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.engine.serve.compare import Tolerance, compare
from agent.engine.serve.configuration import parse
from agent.engine.serve.shadow import Budget
from agent.engine.serve.split import choose, usable
from contract.errors import PitheadError
from tests.serve import models
from tests.serve.conftest import Served, start, tensor, until
from tests.serve.grpc_client import client, message

RAW = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)


# ---- pure


def test_shares_are_the_weights():
    source = random.Random(7)  # noqa: S311 - seeded
    got = Counter(choose([("1", 90), ("2", 10)], "", source.random) for _ in range(20_000))
    assert abs(got["2"] / 20_000 - 0.1) < 0.01


def test_keys_are_shared_out_by_weight_and_stay():
    weights = [("1", 3.0), ("2", 1.0)]
    first = {f"k{i}": choose(weights, f"k{i}", random.random) for i in range(8_000)}
    assert abs(Counter(first.values())["2"] / 8_000 - 0.25) < 0.02
    assert first == {key: choose(weights, key, random.random) for key in first}


def test_a_changed_weight_or_version_moves_no_more_keys_than_it_must():
    keys = [f"k{i}" for i in range(4_000)]
    before = {k: choose([("1", 3), ("2", 1)], k, random.random) for k in keys}
    more = {k: choose([("1", 3), ("2", 2)], k, random.random) for k in keys}
    assert {before[k] for k in keys if before[k] != more[k]} == {"1"}  # only from 1 to 2
    third = {k: choose([("1", 3), ("2", 1), ("3", 1)], k, random.random) for k in keys}
    assert {third[k] for k in keys if before[k] != third[k]} == {"3"}


def test_what_is_not_there_gets_nothing():
    assert usable({"1": 0, "2": 1, "3": 5}, lambda v: v != "3") == [("2", 1)]


def test_answers_are_compared():
    a = np.array([[0.0, 1.0, 0.5], [0.2, 0.1, 0.0]], np.float32)
    b = a + np.array([[0, -0.75, 0], [0.001, 0, 0]], np.float32)
    found = compare({"y": a}, {"y": b}, Tolerance(atol=0.01, rtol=0))
    assert found is not None
    assert (found.agrees, found.flips, found.rows, found.values) == (False, 1, 2, 6)
    assert found.largest == pytest.approx(0.75)
    assert found.total == pytest.approx(0.751)
    assert compare({"y": a}, {"y": b}, Tolerance(atol=1, rtol=0)).agrees  # type: ignore[union-attr]
    assert compare({"y": a}, {"y": a[:1]}, Tolerance()) is None
    assert compare({"y": a}, {"z": a}, Tolerance()) is None


def test_a_number_for_no_number_is_infinitely_far():
    nan = np.array([np.nan, 1.0, np.inf], np.float32)
    same = compare({"y": nan}, {"y": nan.copy()}, Tolerance())
    assert same is not None
    assert (same.agrees, same.largest) == (True, 0.0)
    other = compare({"y": nan}, {"y": np.array([0.0, 1.0, 1.0], np.float32)}, Tolerance())
    assert other is not None
    assert (other.agrees, other.largest, other.total) == (False, float("inf"), 0.0)


def test_a_budget_is_kept_on_average_and_not_saved_up():
    budget = Budget(0.1, 0.0)
    spent, now = 0.0, 0.0
    while now < 100:
        now += 0.001
        if budget.allows(now):
            budget.charge(0.02)
            spent += 0.02
    assert spent == pytest.approx(10, abs=0.2)
    assert budget.allows(10_000)
    budget.charge(0.11)  # one burst is a tenth of a second
    assert not budget.allows(10_000)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[models.m.split]\nweights = { "1" = 0 }', "models.m.split.weights: all are 0"),
        ('[models.m.split]\nweights = { "1" = -1 }', ">= 0.0"),
        ('[models.m.split]\nweights = { "1" = 1 }\n[models.m.bandit]', "split and bandit cannot both choose"),
        ('[models.m.shadow]\nversion = "2"\nshare = 1', "unknown field `share`"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, words: str):
    with pytest.raises(PitheadError) as caught:
        parse(text.encode())
    assert (caught.value.code, words in caught.value.detail) == ("config.invalid", True), caught.value.detail


def test_the_pages_examples_are_taken_as_they_stand():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    page = page[page.index("## Pipelines") : page.index("## gRPC")]
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    found = parse("\n".join(blocks).encode())
    assert set(found.pipelines) == {"inspect"}
    assert {name: model.named for name, model in found.models.items()} == {
        "pump": {"1", "2", "3"},
        "grader": {"1", "2"},
    }


# ---- a real server

FILE = """
[models.shared.split]
weights = { "1" = 3, "2" = 1 }

[models.shadowed.shadow]
version = "2"
sample = 1.0
cpu = 1.0
tolerance = { atol = 1e-4, rtol = 0 }

[models.same.shadow]
version = "2"
sample = 1.0
cpu = 1.0

[models.both.split]
weights = { "1" = 1 }
[models.both.shadow]
version = "2"
sample = 1.0
cpu = 1e-6

[pipelines.line]
inputs = ["raw"]
outputs = ["out"]
[[pipelines.line.steps]]
model = "shadowed"
inputs = { input = "raw" }
outputs = { output = "middle" }
[[pipelines.line.steps]]
model = "shared"
inputs = { input = "middle" }
outputs = { output = "out" }
"""


def versions(directory: Path, name: str, *seeds: int) -> None:
    for version, seed in enumerate(seeds, 1):
        (directory / name / str(version)).mkdir(parents=True)
        (directory / name / str(version) / "model.onnx").write_bytes(models.autoencoder(seed))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("split")
    versions(directory, "shared", 0, 1)
    versions(directory, "shadowed", 0, 1)
    versions(directory, "same", 0, 0)
    versions(directory, "both", 0, 1)
    (directory / "serve.toml").write_text(FILE)
    made = start(directory, tmp_path_factory.mktemp("log") / "serve.log", "--grpc-port", "0", cache=cache)
    try:
        until(made.ready, "all versions are loaded")
        yield made
    finally:
        assert made.stop() == 0, made.log.read_text()
    assert "Traceback" not in made.log.read_text()


def ask(served: Served, model: str, **more: Any) -> Any:
    answer = served.infer(model, {"inputs": [tensor("input", "FP32", RAW)], **more})
    assert answer.status == 200, answer.body
    return answer


def told(served: Served, model: str) -> Any:
    return served.get(f"/v2/models/{model}/steering").json


def test_requests_go_to_versions_by_weight(served: Served):
    got = Counter(ask(served, "shared").json["model_version"] for _ in range(200))
    assert set(got) == {"1", "2"}
    assert 20 <= got["2"] <= 85  # of 200 with 50 expected: five standard deviations
    said = told(served, "shared")
    assert said["split"] == {"1": 0.75, "2": 0.25}
    labels = 'model="shared",version="2"'
    assert served.metric(f"pithead_steered_requests_total{{{labels}}}") == said["requests"]["2"]


def test_a_key_stays_with_its_version(served: Served):
    by_key: dict[str, set[str]] = {}
    for i in range(60):
        key = f"machine-{i % 12}"
        answer = ask(served, "shared", parameters={"split_key": key})
        by_key.setdefault(key, set()).add(answer.json["model_version"])
    assert all(len(found) == 1 for found in by_key.values())
    assert set.union(*by_key.values()) == {"1", "2"}
    ids = {ask(served, "shared", id="the same").json["model_version"] for _ in range(10)}
    assert len(ids) == 1
    with client(served.grpc_port) as grpc:
        said = message(RAW, "shared", id="the same")
        assert {grpc.infer(said).model_version for _ in range(3)} == ids


def test_who_names_a_version_gets_it(served: Served):
    for version in ("1", "2"):
        answer = served.ask(
            "POST",
            f"/v2/models/shared/versions/{version}/infer",
            {"inputs": [tensor("input", "FP32", RAW)]},
        )
        assert answer.json["model_version"] == version


def compared(served: Served, model: str, count: int) -> Any:
    """Ask until so many were compared, and return what is told then."""

    def enough() -> Any:
        assert ask(served, model).json["model_version"] == "1"
        said = told(served, model)["shadow"]
        return said if said["compared"] >= count else None

    return until(enough, f"{count} comparisons of {model}")


def test_a_shadow_that_differs_is_seen_and_never_answers(served: Served):
    said = compared(served, "shadowed", 10)
    assert said["version"] == "2"
    assert said["agreed"] == 0
    assert said["class_flips"] == said["classified_rows"] == said["compared"]
    by_hand = [
        served.ask(
            "POST", f"/v2/models/shadowed/versions/{v}/infer", {"inputs": [tensor("input", "FP32", RAW)]}
        ).array()
        for v in ("1", "2")
    ]
    apart = np.abs(by_hand[0].astype(float) - by_hand[1])
    assert said["max_difference"] == pytest.approx(apart.max(), rel=1e-4)
    assert said["mean_difference"] == pytest.approx(apart.mean(), rel=1e-4)
    assert said["latency_us"]["primary"]["mean"] > 0
    assert said["latency_us"]["shadow"]["mean"] > 0
    assert said["cpu_s"] > 0
    assert served.metric('pithead_shadow_requests_total{model="shadowed",outcome="differed"}') >= 10
    assert served.metric('pithead_shadow_difference_max{model="shadowed"}') == pytest.approx(
        said["max_difference"], rel=1e-4
    )


def test_a_shadow_that_is_the_same_agrees(served: Served):
    said = compared(served, "same", 10)
    assert (said["agreement"], said["max_difference"], said["class_flips"]) == (1.0, 0.0, 0)
    outcomes = said["compared"] + sum(said["dropped"].values()) + said["failed"]
    assert outcomes <= said["sampled"] <= outcomes + 1  # one may be under way


def test_without_a_budget_the_shadow_is_dropped(served: Served):
    before = told(served, "both")["shadow"]
    for _ in range(30):
        assert ask(served, "both").json["model_version"] == "1"
    after = told(served, "both")["shadow"]
    assert after["sampled"] - before["sampled"] == 30
    assert after["compared"] <= 3  # a run costs far more than a microsecond of a second
    assert after["dropped"]["budget"] > 20


def test_steps_of_a_pipeline_are_steered_too(served: Served):
    before = sum(told(served, "shared")["requests"].values()), told(served, "shadowed")["shadow"]["sampled"]
    answer = served.infer("line", {"inputs": [tensor("raw", "FP32", RAW)]})
    assert answer.status == 200, answer.body
    after = sum(told(served, "shared")["requests"].values()), told(served, "shadowed")["shadow"]["sampled"]
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


def test_what_is_not_steered_says_so(served: Served):
    assert served.get("/v2/models/line/steering").status == 404
    assert served.get("/v2/models/nobody/steering").status == 404


@pytest.mark.alone
def test_under_load_the_shadow_goes_first(starts: Callable[..., Served], tmp_path: Path):
    """A model of some milliseconds, asked by four at once: requests wait, so no shadow run is begun."""
    directory = tmp_path / "models"
    for version in ("1", "2"):
        (directory / "slow" / version).mkdir(parents=True)
        (directory / "slow" / version / "model.onnx").write_bytes(models.slow(width=256, layers=12))
    (directory / "serve.toml").write_text('[models.slow.shadow]\nversion = "2"\nsample = 1.0\ncpu = 1.0\n')
    served = starts(directory, "--max-batch", "1")
    until(served.ready, "both versions are loaded")
    body = {"inputs": [tensor("x", "FP32", np.ones((1, 4), np.float32))]}
    end = time.monotonic() + 1.5

    def flood() -> None:
        while time.monotonic() < end:
            assert served.infer("slow", body).status == 200

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = told(served, "slow")["shadow"]
    dropped = said["dropped"]["load"] + said["dropped"]["busy"]
    assert dropped > 0.8 * said["sampled"], said
    until(
        lambda: served.infer("slow", body) and told(served, "slow")["shadow"]["compared"] > said["compared"],
        "calm",
    )
