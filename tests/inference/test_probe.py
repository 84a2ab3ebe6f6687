"""The probe on real runtimes: what passes, and how each way of failing is named."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from contract.errors import PitheadError
from contract.manifest import Budget, Channel, Manifest, Pipeline, Score, TensorSpec, Tolerance, Variant
from inference import measuring, probing
from inference.probing import Limits, choose, probe
from models.dense import Network
from models.package import reference_to
from models.record import recorded

Package = tuple[Manifest, dict[str, Path]]
Make = Callable[..., Package]
X = np.ones((1, 2), np.float32)


def changed(manifest: Manifest, **fields: object) -> Manifest:
    """Return a manifest whose first variant has other fields."""
    first = msgspec.structs.replace(manifest.variants[0], **fields)
    return msgspec.structs.replace(manifest, variants=(first, *manifest.variants[1:]))


def model(nodes: list, initialisers: list | None = None) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        initialisers or [],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    ).SerializeToString()


def like(content_format: str = "onnx") -> Variant:
    """Tensors of the models that must not be opened here."""
    spec = {"datatype": "FP32", "shape": (1, 2)}
    return Variant(
        name="only",
        file=reference_to("m", b""),
        format=content_format,  # type: ignore[arg-type]
        quantisation="float32",
        inputs=(TensorSpec("x", **spec),),  # type: ignore[arg-type]
        outputs=(TensorSpec("y", **spec),),  # type: ignore[arg-type]
        golden=None,  # type: ignore[arg-type]
    )


def only(reports: list[probing.ProbeReport]) -> probing.ProbeReport:
    assert len(reports) == 1
    return reports[0]


def lane(method: str, width: int = 2) -> dict[str, Any]:
    """A pipeline of one sample of ``width`` channels, and a score."""
    channels = tuple(Channel(f"c{i}") for i in range(width))
    pipeline = Pipeline(channels, 1, 1, (0.0,) * width, (1.0,) * width)
    return {"pipeline": pipeline, "score": Score(method, 1.0)}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "width", "words"),
    [
        ("reconstruction_mse", 2, ""),
        ("output", 2, "one value per window"),
        ("reconstruction_mse", 3, "a window has 3 values"),
    ],
)
def test_a_lane_is_tried_as_the_device_will_run_it(single: Make, method: str, width: int, words: str):
    """What the manifest says of tensors may be open; then only a run can tell."""
    manifest, files = single(model([helper.make_node("Identity", ["x"], ["y"])]), "onnx", {"x": X})
    report = only(probe(msgspec.structs.replace(manifest, **lane(method, width)), files))
    assert report.code == ("package.manifest_invalid" if words else None), report
    assert words in report.detail


# --- what passes


def test_every_variant_passes_on_every_accelerator(good: Package):
    manifest, files = good
    reports = probe(manifest, files)
    assert [(r.variant, r.accelerator) for r in reports] == [
        ("int8-tflite", "xnnpack"),
        ("int8-tflite", "cpu"),
        ("int8-onnx", "cpu"),
        ("float32-tflite", "xnnpack"),
        ("float32-tflite", "cpu"),
    ]
    for report in reports:
        assert report.passed, report
        assert report.accelerator_used == report.accelerator
        assert report.vectors == 8
        assert 0 < report.latency_p50_us <= report.latency_p99_us
        assert report.peak_rss_mb > report.memory_mb >= 0
        assert report.sandbox is not None
    # Recorded on these kernels, so not a single step away.
    assert reports[0].worst == {"output": 0.0}
    assert choose(reports, manifest).variant == "int8-tflite"


def test_first_only_stops_at_the_first_that_passes(good: Package):
    manifest, files = good
    reports = probe(manifest, files, first_only=True)
    assert [(r.variant, r.accelerator, r.passed) for r in reports] == [("int8-tflite", "xnnpack", True)]


def test_first_only_goes_on_after_a_failure(good: Package, tmp_path: Path):
    manifest, files = good
    broken = tmp_path / "broken"
    broken.write_bytes(b"x" * manifest.variants[0].file.length)
    files[manifest.variants[0].file.path] = broken
    reports = probe(manifest, files, first_only=True)
    assert [r.code for r in reports] == ["package.file_mismatch", "package.file_mismatch", None]
    assert choose(reports, manifest).variant == "int8-onnx"


def test_variants_and_accelerators_can_be_asked_for(good: Package):
    manifest, files = good
    assert [r.variant for r in probe(manifest, files, variants=["int8-onnx"])] == ["int8-onnx"]
    assert {r.accelerator for r in probe(manifest, files, accelerators=["cpu"])} == {"cpu"}
    assert probe(manifest, files, accelerators=["edgetpu"]) == []


def test_another_architecture_is_no_candidate(good: Package):
    manifest, files = good
    foreign = msgspec.structs.replace(
        manifest, variants=tuple(msgspec.structs.replace(v, arch=("z80",)) for v in manifest.variants)
    )
    assert probe(foreign, files) == []
    with pytest.raises(PitheadError, match=r"probe\.no_variant"):
        choose([], foreign)
    assert len(probe(foreign, files, variants=["int8-onnx"], any_arch=True)) == 1


# --- what fails


def test_a_flipped_bit_is_a_hash_mismatch(good: Package):
    manifest, files = good
    path = files["int8.tflite"]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    report = probe(manifest, files, variants=["int8-tflite"])[0]
    assert report.code == "package.file_mismatch"
    assert "int8.tflite" in report.detail


def test_a_missing_file_is_named(good: Package):
    manifest, files = good
    files["int8.tflite"].unlink()
    assert probe(manifest, files, variants=["int8-tflite"])[0].code == "package.file_missing"
    del files["int8.tflite"]
    assert probe(manifest, files, variants=["int8-tflite"])[0].code == "package.file_missing"


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_model_does_not_load(good: Package, share: float):
    """Signed as it is, so that only the runtime can notice."""
    manifest, files = good
    for name in ("int8-tflite", "int8-onnx"):
        variant = next(v for v in manifest.variants if v.name == name)
        path = files[variant.file.path]
        content = path.read_bytes()[: int(variant.file.length * share)]
        path.write_bytes(content)
        cut = msgspec.structs.replace(variant, file=reference_to(variant.file.path, content))
        alone = msgspec.structs.replace(manifest, variants=(cut,))
        assert probe(alone, files, accelerators=["cpu"])[0].code == "inference.load_failed"


def test_changed_weights_are_a_golden_mismatch(good: Package, network: Network):
    """A bit that was flipped before the release was signed."""
    manifest, files = good
    path = files["float32.tflite"]
    content = bytearray(path.read_bytes())
    at = content.find(network.layers[-1].bias.astype(np.float32).tobytes())
    assert at > 0
    content[at + 3] ^= 0x40
    path.write_bytes(content)
    variant = next(v for v in manifest.variants if v.name == "float32-tflite")
    signed = msgspec.structs.replace(variant, file=reference_to("float32.tflite", bytes(content)))
    alone = msgspec.structs.replace(manifest, variants=(signed,))
    report = only(probe(alone, files, accelerators=["cpu"]))
    assert report.code == "probe.golden_mismatch"
    assert "wanted" in report.detail


def test_a_model_that_answers_otherwise_is_a_golden_mismatch(single: Make):
    content = model([helper.make_node("Relu", ["x"], ["y"])])
    report = only(probe(*single(content, "onnx", {"x": X}, {"y": X + 0.5}, like())))
    assert report.code == "probe.golden_mismatch"
    assert "'y'" in report.detail


def test_the_tolerance_counts(single: Make):
    content = model([helper.make_node("Relu", ["x"], ["y"])])
    manifest, files = single(content, "onnx", {"x": X}, {"y": X + 0.5}, like())
    golden = msgspec.structs.replace(manifest.variants[0].golden, tolerance={"y": Tolerance(atol=0.51)})
    assert only(probe(changed(manifest, golden=golden), files)).passed
    golden = msgspec.structs.replace(manifest.variants[0].golden, tolerance={"y": Tolerance(rtol=0.34)})
    assert only(probe(changed(manifest, golden=golden), files)).passed


def test_nan_is_never_within_tolerance(single: Make):
    nan = numpy_helper.from_array(np.full((1, 2), np.nan, np.float32), "n")
    content = model([helper.make_node("Add", ["x", "n"], ["y"])], [nan])
    for wanted in (X, np.full((1, 2), np.nan, np.float32)):
        manifest, files = single(content, "onnx", {"x": X}, {"y": wanted}, like())
        loose = msgspec.structs.replace(manifest.variants[0].golden, tolerance={"y": Tolerance(atol=1e6)})
        assert only(probe(changed(manifest, golden=loose), files)).code == "inference.not_finite"


def test_a_finite_answer_is_no_nan(single: Make):
    content = model([helper.make_node("Relu", ["x"], ["y"])])
    wanted = np.full((1, 2), np.nan, np.float32)
    assert (
        only(probe(*single(content, "onnx", {"x": X}, {"y": wanted}, like()))).code == "probe.golden_mismatch"
    )


def test_an_infinity_that_is_golden_is_right(single: Make):
    content = model([helper.make_node("Log", ["x"], ["y"])])
    assert only(probe(*single(content, "onnx", {"x": np.zeros((1, 2), np.float32)}))).passed


def endless_loop() -> bytes:
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["v"], ["w"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [1, 2]),
        ],
        [
            helper.make_tensor_value_info("d", TensorProto.BOOL, []),
            helper.make_tensor_value_info("w", TensorProto.FLOAT, [1, 2]),
        ],
    )
    condition = numpy_helper.from_array(np.array(True), "true")
    return model([helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)], [condition])


def test_an_endless_loop_is_a_timeout(single: Make):
    manifest, files = single(endless_loop(), "onnx", {"x": X}, {"y": X}, like())
    start = time.monotonic()
    report = only(probe(manifest, files, limits=Limits(wall_s=1.5)))
    assert report.code == "probe.timeout"
    assert time.monotonic() - start < 5


def test_wrapping_a_model_that_never_answers_ends(tmp_path: Path):
    """`models wrap` meets files that nobody knows, and opens them nowhere but in such a child."""
    file = tmp_path / "endless.onnx"
    file.write_bytes(endless_loop())
    with pytest.raises(PitheadError, match=r"probe\.timeout"):
        recorded(file, reference_to(file.name, file.read_bytes()), "onnx", limits=Limits(wall_s=3.0))


def test_an_answer_that_nobody_can_read_is_a_crash(good: Package, monkeypatch: pytest.MonkeyPatch):
    """A model that owns its process may answer as it likes."""
    manifest, files = good
    for answer in (b"", b"[" * 100_000, b'{"x":' * 50_000, b"\xff"):
        monkeypatch.setattr(probing, "_converse", lambda *_, said=answer: (said, "", 0))
        report = probe(manifest, files, variants=["int8-onnx"])[0]
        assert report.code == "probe.crashed"


def test_an_endless_loop_runs_out_of_cpu_time(single: Make):
    manifest, files = single(endless_loop(), "onnx", {"x": X}, {"y": X}, like())
    report = only(probe(manifest, files, limits=Limits(wall_s=30, cpu_s=1)))
    assert report.code == "probe.timeout"
    assert "CPU" in report.detail


def test_a_memory_hog_is_over_budget(single: Make):
    """ConstantOfShape asks for 16 GB; nothing of it shows in the file's size."""
    shape = numpy_helper.from_array(np.array([2**31, 2], np.int64), "s")
    content = model(
        [
            helper.make_node("ConstantOfShape", ["s"], ["big"]),
            helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
            helper.make_node("Add", ["x", "sum"], ["y"]),
        ],
        [shape],
    )
    report = only(probe(*single(content, "onnx", {"x": X}, {"y": X}, like()), limits=Limits(memory_mb=256)))
    assert report.code in {"probe.over_budget", "inference.out_of_memory"}
    assert not report.passed


def test_a_model_over_its_own_budget_fails(single: Make):
    content = model([helper.make_node("Relu", ["x"], ["y"])])
    manifest, files = single(content, "onnx", {"x": X}, budget=Budget(latency_ms=1e-6))
    assert only(probe(manifest, files)).code == "probe.over_budget"
    manifest, files = single(content, "onnx", {"x": X}, budget=Budget(memory_mb=0.001))
    assert only(probe(manifest, files)).code == "probe.over_budget"


def test_unsafe_models_keep_their_code(single: Make):
    content = model([helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")])
    report = only(probe(*single(content, "onnx", {"x": X}, {"y": X}, like())))
    assert report.code == "package.unsafe_model"


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("name", "other", "inputs[0].name"),
        ("datatype", "INT16", "inputs[0].datatype"),
        ("shape", (1, 5), "inputs[0].shape"),
        ("scale", 0.5, "inputs[0].scale"),
        ("zero_point", 99, "inputs[0].zero_point"),
    ],
)
def test_a_manifest_that_misdescribes_its_model_is_named(good: Package, field: str, value: object, path: str):
    manifest, files = good
    tensor = msgspec.structs.replace(manifest.variants[0].inputs[0], **{field: value})
    wrong = changed(manifest, inputs=(tensor,))
    report = probe(wrong, files, variants=["int8-tflite"], accelerators=["cpu"])[0]
    assert report.code == "package.manifest_invalid"
    assert report.detail.startswith(path)


def test_a_golden_file_that_is_none_is_named(good: Package):
    manifest, files = good
    pickled = BytesIO()
    np.savez(pickled, allow_pickle=True, **{"in:input": np.array([{"a": 1}] * 8, object)})
    for content in (b"nonsense", pickled.getvalue(), b""):
        path = manifest.variants[0].golden.file.path
        files[path].write_bytes(content)
        golden = msgspec.structs.replace(manifest.variants[0].golden, file=reference_to(path, content))
        report = probe(changed(manifest, golden=golden), files, variants=["int8-tflite"])[0]
        assert report.code == "package.manifest_invalid"
        assert "golden" in report.detail


def test_a_crash_is_named_by_its_signal(good: Package, monkeypatch: pytest.MonkeyPatch):
    """The child is replaced by one that dies as a broken runtime does."""
    manifest, files = good
    real = probing._converse

    def crashing(command: list[str], *others: Any) -> tuple[bytes, str, int | None]:
        program = "import os, sys; sys.stdin.read(); os.kill(os.getpid(), 11)"
        return real([command[0], "-I", "-c", program], *others)

    monkeypatch.setattr(probing, "_converse", crashing)
    report = probe(manifest, files, variants=["int8-onnx"])[0]
    assert report.code == "probe.crashed"
    assert "SIGSEGV" in report.detail


def test_a_child_that_talks_without_end_is_bounded():
    program = "import os\nwhile True: os.write(2, b'x' * 65536); os.write(1, b'y' * 65536)"
    start = time.monotonic()
    out, err, status = probing._converse([sys.executable, "-I", "-c", program], b"", 1.0, 1000)
    assert status is None
    assert len(out) <= 1000
    assert len(err) <= probing.MAX_STDERR
    assert time.monotonic() - start < 5


def test_the_parent_stays_light():
    """The supervisor imports this: no numpy, no runtime, no asyncio."""
    program = (
        "import sys, inference.probing\n"
        "heavy = {'numpy', 'onnxruntime', 'ai_edge_litert', 'asyncio', 'pyseccomp', 'ctypes'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_probe_of_a_small_model_is_cheap(good: Package):
    """Twenty agents on two cores probe each new version: half a second of CPU each is the bound."""
    manifest, files = good
    before = os.times()
    report = only(probe(manifest, files, first_only=True))
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert report.passed
    assert used < 1.0, f"{used} s"


def test_what_others_take_is_not_the_models_cost():
    """The process is stopped for 20 ms in one run of fifty, as on a machine that is busy elsewhere."""
    calls = 0

    class Busy:
        def run(self, _: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 50:
                time.sleep(0.02)

    timing = measuring.measure(Busy(), {}, Limits())
    assert calls >= 50
    assert timing.p50_us <= timing.p99_us < 5_000


def test_a_slow_model_is_measured_by_few_runs(monkeypatch: pytest.MonkeyPatch):
    """One and a half seconds a run: healthy, and the probe's own limits must not forbid it."""
    calls, now = 0, 0.0

    class Slow:
        def run(self, _: object) -> None:
            nonlocal calls, now
            calls += 1
            now += 1.5

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)
    assert (timing := measuring.measure(Slow(), {}, Limits())).p50_us == timing.p99_us == 1.5e6
    assert calls <= 3
