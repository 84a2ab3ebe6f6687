"""The choice among what was measured, and the energy counter, both on made-up figures."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from contract.errors import PitheadError
from contract.manifest import Budget, Manifest
from inference import measuring
from inference.accelerators import ONNX, TABLES, TFLITE, Custom, Resources, find, for_format, here
from inference.choosing import NEGLIGIBLE_US, best, choose, over_budget, settled
from inference.measuring import Energy, measure
from inference.reports import Limits, Placement, ProbeReport, SandboxReport

Package = tuple[Manifest, dict[str, Path]]


def report(p50: float, variant: str = "int8-tflite", accelerator: str = "cpu", **more: Any) -> ProbeReport:
    return ProbeReport(variant, accelerator, latency_p50_us=p50, latency_p99_us=2 * p50, **more)


def test_the_cheapest_by_a_margin_wins_in_the_order_of_expectation(good: Package):
    manifest, _ = good
    measured = [
        report(400.0, "float32-tflite", "cpu"),
        report(300.0, "int8-onnx", "cpu"),
        report(900.0, "int8-tflite", "xnnpack"),
        report(850.0, "int8-tflite", "cpu"),
    ]
    choice = choose(measured, manifest)
    assert (choice.variant, choice.accelerator) == ("int8-onnx", "cpu")
    assert choice.why.startswith("the cheapest: 300")
    little = [report(290.0, "int8-onnx"), report(300.0, "int8-tflite", "xnnpack")]
    choice = choose(little, manifest)
    assert choice.variant == "int8-tflite"
    assert "by less than the margin" in choice.why


def test_the_same_is_chosen_whether_or_not_the_rest_was_measured(good: Package):
    """An agent stops where nothing better is possible, `probe` measures all: both must say the same."""
    manifest, _ = good
    order = [
        ("int8-tflite", "xnnpack"),
        ("int8-tflite", "cpu"),
        ("int8-onnx", "cpu"),
        ("float32-tflite", "cpu"),
    ]
    for figures in ((40, 5, 5, 5), (100, 45, 3, 1), (100, 90, 40, 2), (500, 400, 300, 200)):
        every = [report(float(p50), *pair) for p50, pair in zip(figures, order, strict=True)]
        some: list[ProbeReport] = []
        for found in every:
            some.append(found)
            if settled(found):
                break
        assert choose(some, manifest).report == choose(every, manifest).report


def test_energy_counts_where_all_have_it():
    cheap = report(900.0, accelerator="npu", energy_uj=50.0)
    fast = report(300.0, energy_uj=400.0)
    assert best([fast, cheap]).accelerator == "npu"
    assert "uJ" in best([fast, cheap]).why
    assert best([fast, msgspec.structs.replace(cheap, energy_uj=None)]).accelerator == "cpu"


def test_what_is_over_a_budget_is_named():
    found = report(1000.0, memory_mb=20.0)
    assert over_budget(found, Budget(latency_ms=1.0), Resources()).startswith("p99 2.000 ms")
    assert "the budget is 10" in over_budget(found, Budget(memory_mb=10), Resources())
    assert "the device gives 15" in over_budget(found, Budget(), Resources(memory_mb=15))
    assert not over_budget(found, Budget(latency_ms=2.0, memory_mb=20), Resources(memory_mb=20))


def test_settled_means_that_nobody_notices_a_gain():
    assert settled(report(NEGLIGIBLE_US))
    assert not settled(report(NEGLIGIBLE_US + 1))
    assert not settled(report(1.0, code="probe.golden_mismatch"))


def test_a_placement_adds_up():
    placed = Placement({"npu": {"Conv": 3, "Relu": 1}, "cpu": {"Softmax": 1}})
    assert (placed.nodes_on("npu"), placed.nodes_on("gpu"), placed.total) == (4, 0, 5)


@pytest.mark.parametrize(
    ("opened", "abi", "level"),
    [((), 6, "full"), (("/dev/npu0",), 6, "partial"), (("/dev/npu0",), 0, "partial"), ((), 0, "partial")],
)
def test_an_open_device_is_not_a_full_sandbox(opened: tuple[str, ...], abi: int, level: str):
    assert SandboxReport(True, True, abi, True, opened).level == level


# --- the tables


def test_the_tables_name_each_accelerator_once_and_end_with_the_cpu():
    for table in TABLES.values():
        names = [a.name for a in table]
        assert len(set(names)) == len(names)
        assert names[-1] == "cpu"
    assert {a.name for a in TFLITE} >= {
        "xnnpack", "gpu", "nnapi", "edgetpu", "hexagon", "armnn", "ethosu", "vx", "cpu",
    }  # fmt: skip
    assert {a.name for a in ONNX} >= {
        "cpu", "xnnpack", "cuda", "tensorrt", "openvino", "qnn", "coreml", "directml", "acl", "nnapi",
        "webgpu",
    }  # fmt: skip
    assert all(a.provider.endswith("ExecutionProvider") for a in ONNX)
    assert all(a.library or a.name in {"xnnpack", "cpu"} for a in TFLITE)


def test_no_hint_is_a_path():
    """A manifest comes from elsewhere: nothing that it may set can name a file."""
    hints = {hint for table in TABLES.values() for a in table for hint in a.hints}
    assert not [h for h in hints if any(word in h.lower() for word in ("path", "dir", "file", "library"))]


def test_settings_change_what_is_known_and_add_what_is_not():
    armnn = find("tflite", "armnn", {"armnn": Custom("tflite", options={"backends": "CpuAcc"})})
    assert armnn.library == "libarmnnDelegate.so"
    assert armnn.options == {"backends": "CpuAcc"}
    own = {"npu": Custom("tflite", "/opt/libnpu.so", options={"fast": True, "cores": 2})}
    assert find("tflite", "npu", own).options == {"fast": "true", "cores": "2"}
    assert for_format("tflite", "ai-edge-litert", own)[0] == "npu"
    assert for_format("tflite", "ai-edge-litert", own)[-1] == "cpu"
    assert "npu" not in for_format("onnx", "onnxruntime", own)
    with pytest.raises(PitheadError, match=r"inference\.accelerator_missing"):
        find("onnx", "npu", own)


def test_what_another_build_of_the_runtime_has_is_not_here():
    openvino = next(a for a in ONNX if a.name == "openvino")
    assert here(openvino, "onnxruntime-openvino")
    assert not here(openvino, "onnxruntime")
    assert not here(next(a for a in ONNX if a.name == "coreml"), "onnxruntime")


def test_a_provider_library_that_is_none_has_a_code(tmp_path: Path, good: Package):
    from inference.registry import open_session  # noqa: PLC0415 - a runtime, which the rest does not need

    _, files = good
    own = {"plugin": Custom("onnx", str(tmp_path / "libep.so"), "PluginExecutionProvider")}
    with pytest.raises(PitheadError, match=r"inference\.accelerator_missing.*libep\.so"):
        open_session(files["int8.onnx"], "onnx", find("onnx", "plugin", own))
    with pytest.raises(PitheadError, match="names no execution provider"):
        open_session(files["int8.onnx"], "onnx", find("onnx", "plugin", {"plugin": Custom("onnx")}))


# --- energy


def zone(root: Path, name: str, used: int, span: int = 1000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    (folder / "energy_uj").write_text(f"{used}\n")
    return folder / "energy_uj"


def test_energy_is_counted_over_packages_and_past_the_counters_end(tmp_path: Path):
    one, other = zone(tmp_path, "intel-rapl:0", 100), zone(tmp_path, "intel-rapl:1", 990)
    zone(tmp_path, "intel-rapl:0:0", 50)  # a part of the first
    energy = Energy(tmp_path)
    before = energy.read()
    assert before == (100, 990)
    one.write_text("130\n")
    other.write_text("10\n")
    assert energy.since(before) == 30 + 20


def test_energy_is_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counter, runs = zone(tmp_path, "intel-rapl:0", 0, 10**9), 0

    class Hungry:
        def run(self, _: object) -> None:
            nonlocal runs
            runs += 1
            counter.write_text(f"{runs * 7}\n")

    timing = measure(Hungry(), {}, Limits(), Energy(tmp_path))  # type: ignore[arg-type]
    assert timing.energy_uj == pytest.approx(7.0)
    assert timing.runs >= measuring.MIN_RUNS


def test_a_host_without_a_counter_says_so(tmp_path: Path):
    for root in (tmp_path / "none", tmp_path):
        energy = Energy(root)
        assert energy.since(energy.read()) is None
