"""Which versions of a model are served, its own settings, and a configuration that changes meanwhile."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.core.settings import Serve
from agent.engine.serve import policies
from agent.engine.serve.configuration import Configuration, Model, of_device, parse
from agent.engine.serve.runner import Policy
from contract.errors import PitheadError
from tests.serve import models
from tests.serve.conftest import Served, tensor, until
from tests.serve.grpc_client import client

BODY = {"inputs": [tensor("input", "FP32", np.ones((1, models.WIDTH), np.float32))]}


def numbered(directory: Path, name: str, *versions: str) -> None:
    for version in versions:
        (directory / name / version).mkdir(parents=True)
        (directory / name / version / "model.onnx").write_bytes(models.autoencoder(seed=int(version)))


def write(directory: Path, text: str) -> None:
    """Replace the file at once, as an editor does."""
    new = directory / ".serve.toml.new"
    new.write_text(text)
    new.rename(directory / "serve.toml")


def answers(served: Served, name: str, *versions: str) -> list[int]:
    return [served.infer(f"{name}/versions/{version}", BODY).status for version in versions]


def test_latest_all_and_specific_versions(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "m"
    for name in ("plain", "two", "every", "some", "none"):
        numbered(directory, name, "1", "2", "3", "10")
    write(
        directory,
        '[models.two]\nversions = 2\n[models.every]\nversions = "all"\n'
        '[models.some]\nversions = [1, "3", 7]\n[models.none]\nversions = ["8"]\n',
    )
    served = starts(directory, "--grpc-port", "0")
    until(served.ready, "all are loaded")
    wanted = {
        "plain": ([404, 404, 404, 200], "10", {"latest": {"num_versions": 1}}),
        "two": ([404, 404, 200, 200], "10", {"latest": {"num_versions": 2}}),
        "every": ([200, 200, 200, 200], "10", {"all": {}}),
        "some": ([200, 404, 200, 404], "3", {"specific": {"versions": [1, 3, 7]}}),
    }
    for name, (statuses, default, policy) in wanted.items():
        assert answers(served, name, "1", "2", "3", "10") == statuses, name
        assert served.infer(name, BODY).json["model_version"] == default
        assert served.get(f"/v2/models/{name}/config").json["version_policy"] == policy
    assert served.get("/v2/models/some").json["versions"] == ["3", "1"]
    reply = served.infer("none", BODY)
    assert (reply.status, "no version of model 'none' is served" in reply.error) == (404, True)
    assert "model.versions_missing model=some versions=7" in served.log.read_text()
    with client(served.grpc_port) as one:
        policy = one.ask("ModelConfig", name="some").config.version_policy
        assert list(policy.specific.versions) == [1, 3, 7]
        assert one.ask("ModelConfig", name="every").config.version_policy.HasField("all")


def test_all_for_all_models(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "m"
    numbered(directory, "a", "1", "2")
    served = starts(directory, "--versions", "all")
    until(served.ready, "all are loaded")
    assert answers(served, "a", "1", "2") == [200, 200]
    assert served.get("/v2/models/a/config").json["version_policy"] == {"all": {}}


def test_a_model_has_its_own_batching_and_queue(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "m"
    numbered(directory, "own", "1")
    numbered(directory, "other", "1")
    write(
        directory,
        "[models.own]\nmax_batch = 4\npreferred_batches = [2]\nmax_delay_ms = 1.5\n"
        "max_queue = 7\ntimeout_s = 2\n",
    )
    served = starts(directory)
    until(served.ready, "all are loaded")
    own, other = (served.get(f"/v2/models/{n}/config").json for n in ("own", "other"))
    assert (own["max_batch_size"], other["max_batch_size"]) == (4, 64)
    said = own["dynamic_batching"]
    assert (said["preferred_batch_size"], said["max_queue_delay_microseconds"]) == ([2], 1500)
    queue = said["default_queue_policy"]
    assert (queue["max_queue_size"], queue["default_timeout_microseconds"]) == (7, 2_000_000)


def test_a_changed_file_holds_without_a_failed_request(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "m"
    numbered(directory, "a", "1", "2", "3")
    write(directory, "")
    served = starts(directory)
    until(served.ready, "it is loaded")
    stop, statuses = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            statuses.append(served.infer("a", BODY).status)

    asking = threading.Thread(target=load)
    asking.start()
    try:
        write(directory, "[models.a]\nversions = [1, 2]\ncache_mb = 1\n")
        until(lambda: answers(served, "a", "1", "2", "3") == [200, 200, 404], "1 and 2 serve")
        assert served.infer("a", BODY).json["model_version"] == "2"
        until(lambda: served.metric('pithead_cache_entries{model="a",version="2"}') == 1, "answers are kept")
        write(directory, "[models.a]\nversions = 1\n")
        until(lambda: answers(served, "a", "1", "2", "3") == [404, 404, 200], "3 serves")
        assert served.metric('pithead_cache_entries{model="a",version="3"}') == 0
    finally:
        stop.set()
        asking.join()
    assert set(statuses) == {200}

    loads = served.metric("pithead_model_loads_total")
    write(directory, '[models.a]\nversions = 1\n[clients."*"]\nrate = 0.001\n')
    until(lambda: served.infer("a", BODY).status == 429, "the rate holds")
    (directory / "serve.toml").unlink()
    until(lambda: served.infer("a", BODY).status == 200, "there is no limit any more")
    assert served.metric("pithead_model_loads_total") == loads


def test_a_wrong_file_changes_nothing_and_is_named(starts: Callable[..., Served], tmp_path: Path):
    directory = tmp_path / "m"
    numbered(directory, "a", "1", "2")
    write(directory, "[models.a]\nversions = [1]\n")
    served = starts(directory)
    until(served.ready, "it is loaded")
    write(directory, "[models.a]\nversoins = [2]\n")
    until(lambda: "serving.configuration_kept" in served.log.read_text(), "it is said")
    assert "serve.toml: Object contains unknown field `versoins`" in served.log.read_text()
    assert answers(served, "a", "1", "2") == [200, 404]
    write(directory, '[models.a]\nversions = [2]\n[models.a.split.weights]\n"2" = 1\n')
    until(lambda: answers(served, "a", "1", "2") == [404, 200], "the next one holds")
    assert "serving.needs_a_restart tables=models.a.split" in served.log.read_text()


# ---- pure


@pytest.mark.parametrize(
    ("said", "most", "served"),
    [
        (Model(), 1, ["10"]),
        (Model(), 0, ["10", "2", "1"]),
        (Model(versions=2), 1, ["10", "2"]),
        (Model(versions="all"), 1, ["10", "2", "1"]),
        (Model(versions=(1, "10", 5)), 1, ["10", "1"]),
        (Model(versions=()), 1, []),
    ],
)
def test_the_policy_chooses(said: Model, most: int, served: list[str]):
    assert policies.served(said, most, ["2", "10", "1"]) == served


def test_what_is_not_said_is_as_for_all():
    base = Policy(max_batch=8, objective_s=0.3, max_queue=5)
    assert policies.runs(Model(), base) is base
    found = policies.runs(Model(objective_ms=20, max_wait_ms=0, max_batch=1), base)
    assert found == Policy(max_batch=1, objective_s=0.02, max_queue=5, max_wait_s=0.0)


def test_what_a_server_has_from_its_start_stays():
    old = parse(b'[models.a]\ncache_mb = 1\n[models.a.split.weights]\n"1" = 1\n')
    new = parse(b'[models.a]\ncache_mb = 2\n[models.b.shadow]\nversion = "2"\n')
    kept, late = policies.carried(old, new)
    assert late == ["models.a.split", "models.b.shadow"]
    assert kept.models["a"] == Model(cache_mb=2, split=old.models["a"].split)
    assert policies.carried(old, old) == (old, [])
    assert policies.anew(Model(rate=1), Model(rate=2, burst=1)) is False
    assert policies.anew(Model(), Model(cache_mb=2)) is True


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[models.a]\nversions = 0", "versions"),
        ('[models.a]\nversions = "newest"', "versions"),
        ("[models.a]\ncache_mb = -1", "cache_mb"),
        ("[models.a]\nburst = 2", "burst is given without rate"),
        ("[clients.a]\nrates = 2", "rates"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str):
    with pytest.raises(PitheadError, match=named) as caught:
        parse(text.encode())
    assert caught.value.code == "config.invalid"


def test_a_device_says_the_same_of_its_models():
    found: Any = of_device(Serve())
    assert found == Configuration()
