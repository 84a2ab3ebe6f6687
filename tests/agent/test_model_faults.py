"""Models that do what models should not, in a real engine under a real supervisor's parts.

Each on trial after one that is good: the agent goes on, the good one serves again, and the reason has a code.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from agent.core import health, memory, plan
from agent.core.slots import Serving, Slots
from agent.service import intake
from agent.service.engine_process import EngineKeeper
from contract.messages import Desired
from inference.accelerators import Custom
from tests.agent.conftest import Assign
from tests.agent.test_engine_lost import LINE, Rig, Wait, bench, installed, order
from tests.agent.test_service import Bench
from tests.engine.conftest import CHANNELS, make_package, nan_network
from tests.inference.native.build import build

__all__ = ["bench"]
MB = 1024 * 1024
LIMIT = 100 * MB


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"))


def greedy(gigabytes: int) -> bytes:
    """An autoencoder that makes itself a table of so many GB in each run of more than zeros."""
    value = helper.make_tensor_value_info
    kind, width = TensorProto.FLOAT, len(CHANNELS)
    nodes = [
        helper.make_node("Sign", ["x"], ["signs"]),
        helper.make_node("Abs", ["signs"], ["ones"]),
        helper.make_node("ReduceMax", ["ones"], ["any"], keepdims=1),
        helper.make_node("Cast", ["any"], ["some"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["some", "flat"], ["yes"]),
        helper.make_node("Mul", ["yes", "many"], ["size"]),
        helper.make_node("Expand", ["one", "size"], ["table"]),
        helper.make_node("ReduceMax", ["table"], ["most"], keepdims=0),
        helper.make_node("Mul", ["x", "most"], ["y"]),
    ]
    constants = {
        "flat": np.array([1], np.int64),
        "many": np.array([gigabytes * 2**28], np.int64),
        "one": np.ones(1, np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "greedy",
        [value("x", kind, [1, width])],
        [value("y", kind, [1, width])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    return bytes(
        helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
        ).SerializeToString()
    )


FAULTS: dict[str, tuple[dict[str, int], dict[str, Any], str, str]] = {
    "segfaults": ({"fault": 8}, {}, "trial.crashed", "died of SIGSEGV"),
    "hangs": ({"hang": 8}, {}, "trial.crashed", "said nothing"),
    "leaks": ({"leak_kb": 4096}, {}, "trial.over_memory", r"held \d+ MB of memory, and may hold 100 MB"),
    "allocates": ({}, {"content": greedy(8), "kind": "float32.onnx"}, "trial.unhealthy", "out_of_memory"),
    "is no number": ({}, {"net": nan_network(3), "kind": "float32.onnx"}, "trial.unhealthy", "not_finite"),
}
"""What the driver is told, what the package is made of; the code and what is told with it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_on_trial_that_fails_gives_way_and_the_reason_is_told(
    fault: str,
    bench: Bench,
    library: Path,
    assign: Assign,
    desire: Callable[..., Desired],
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "SILENT_S", 1.5)
    monkeypatch.setattr(memory, "OUTGROWN_S", 0.1)
    monkeypatch.setattr(intake, "WEIGH_S", 0.1)
    driver, made, code, told = FAULTS[fault]
    bench.engine = EngineKeeper(bench.layout, bench.box.put, fraction=lambda: 0.0, memory_bytes=LIMIT)
    made = {"kind": "float32.tflite", **made}
    good = make_package(bench.layout.objects)
    bad = make_package(bench.layout.objects, version="2.0.0", accelerators=("driver",), **made)
    trial = Serving(installed(bad, "driver" if driver else "cpu"))
    bench.world.slots.save(Slots("pump", active=Serving(installed(good)), trial=trial))
    accelerators = {"driver": Custom("tflite", str(library), options=dict(driver))}
    rig = Rig(bench, (LINE,), desire(order(assign, "pump", bad)), accelerators)
    bench.engine.start()
    wait_until(lambda: rig.turn() or rig.executed, "a verdict")
    (step,) = rig.executed
    assert isinstance(step, plan.Rollback)
    assert (step.code, bool(re.search(told, step.detail))) == (code, True), step
    wait_until(lambda: rig.serves("line", good.digest), "the good one to serve")
    (rejected,) = rig.world.slots.get("pump").rejected
    assert (rejected.digest, rejected.code) == (bad.digest, code)


def test_a_confirmed_version_that_leaks_is_started_anew_and_given_up_in_the_end(
    bench: Bench,
    library: Path,
    assign: Assign,
    desire: Callable[..., Desired],
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long its engines live; the other model on the device is not charged."""
    monkeypatch.setattr(memory, "OUTGROWN_S", 0.1)
    monkeypatch.setattr(intake, "WEIGH_S", 0.1)
    monkeypatch.setattr(intake, "SOON_S", 0.0)
    monkeypatch.setattr(health, "MAX_DEATHS", 2)
    bench.engine = EngineKeeper(bench.layout, bench.box.put, fraction=lambda: 0.0, memory_bytes=LIMIT)
    good = make_package(bench.layout.objects)
    leaks = make_package(
        bench.layout.objects, kind="float32.tflite", version="2.0.0", accelerators=("driver",)
    )
    active = Serving(installed(leaks, "driver"))
    bench.world.slots.save(Slots("pump", active=active, last_good=installed(good)))
    accelerators = {"driver": Custom("tflite", str(library), options={"leak_kb": 4096})}
    rig = Rig(bench, (LINE,), desire(order(assign, "pump", leaks)), accelerators)
    bench.engine.start()
    wait_until(lambda: rig.turn() or rig.executed, "a verdict")
    (step,) = rig.executed
    assert isinstance(step, plan.Fallback)
    assert step.code == "trial.over_memory"
    assert "2 engines died of it; the last one: the engine was ended: it held" in step.detail
    wait_until(lambda: rig.serves("line", good.digest), "the version before to serve")
