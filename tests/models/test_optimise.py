"""`pithead models optimise`: variants of real models, judged, measured, written or refused."""

import csv
import json
import logging
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from contract.errors import PitheadError
from contract.manifest import Channel, Manifest, Pipeline, Score, TensorSpec
from inference import registry
from models import dense, onnx_builder, package, record
from models.cli import app
from models.optimise import data, judge, onnx_passes, techniques, tflite_passes, worker
from models.optimise.pruning import pruned
from models.shuttle import dataset

Built = Callable[[str, str], tuple[Path, Manifest]]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "models"
FOUR = Pipeline(tuple(Channel(f"c{i}", minimum=-50) for i in range(2)), 3, 2, (1.0, 0.0), (2.0, 1.0))
INPUT = (TensorSpec("x", "FP32", (-1, 6)),)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Change and ask models in this process: other tests show that children do it, and what they may not."""
    answering = {worker: worker._answer, record: record._record}
    for module, answer in answering.items():
        monkeypatch.setattr(module, "confine", lambda **_: None)
        monkeypatch.setattr(module, "converse", lambda _, request, *__, answer=answer: answer(request))
    yield
    logging.disable(logging.NOTSET)  # a child has no other use for it


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="session")
def shuttle_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return held-out rows of Shuttle, with their labels."""
    x, wrong = dataset.load()
    held = dataset.divide(len(x)).held_out[:2000]
    path = tmp_path_factory.mktemp("optimise") / "shuttle.csv"
    with path.open("w", newline="", encoding="ascii") as file:
        lines = csv.writer(file)
        lines.writerow([*dataset.FEATURES, "anomaly"])
        lines.writerows([*row, int(label)] for row, label in zip(x[held], wrong[held], strict=True))
    return path


@pytest.fixture(scope="session")
def dense_onnx(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a float autoencoder of 32 values as ONNX, and rows that it was trained on."""
    random = np.random.default_rng(4)
    rows = (random.standard_normal((600, 4)) @ random.standard_normal((4, 32))) / 2
    network = dense.train_autoencoder(rows, dense.Training(hidden=(96, 4, 96), epochs=12, batch=32))
    folder = tmp_path_factory.mktemp("dense")
    (folder / "dense.onnx").write_bytes(onnx_builder.build_float(network, "dense"))
    np.save(folder / "rows.npy", rows.astype(np.float32))
    return folder / "dense.onnx", folder / "rows.npy"


@pytest.mark.usefixtures("in_process")
def test_a_package_becomes_its_next_version(built: Built, shuttle_rows: Path, tmp_path: Path):
    """Kept variants can be published beside those of before, and state what they were judged by."""
    directory, before = built("shuttle", "baseline")
    plot = tmp_path / "plot.svg"
    status, out, err = call(
        *("optimise", str(directory), "--data", str(shuttle_rows), "--label", "anomaly", "--rounds", "1"),
        *(
            "--techniques",
            "int8,fp16",
            "--tolerance",
            "mean=0.05,flips=0.01",
            "--out",
            str(tmp_path),
            "--plot",
            str(plot),
            "--json",
        ),
    )
    assert status == 0, err
    report = json.loads(out.splitlines()[-1])  # here, not in a child, the quantiser's own words are before it
    written = Path(report["directory"])
    assert written == tmp_path / "shuttle" / "1.1.0"
    assert "no row is in both" in report["data"]
    names = [v["name"] for v in report["variants"]]
    assert names == ["float32-tflite", "int8-tflite-2", "fp16-tflite"]
    for variant in report["variants"]:
        assert variant["latency_p99_us"] >= variant["latency_p50_us"] > 0
        assert variant["zstd_bytes"] > 0
    # Anomalies are few: averaged ranges would cut them off, and flip one decision of forty.
    int8, fp16 = (v["loss"] for v in report["variants"][1:])
    assert fp16["of"] == "scores"
    assert fp16["mean"] < int8["mean"] < 0.03
    assert 0.99 < int8["auc"] <= 1
    assert abs(int8["auc"] - int8["auc_original"]) < 0.005
    result = package.validate(written)
    assert result.valid, result.detail
    after = package.read_manifest(written)
    assert after.release_counter == before.release_counter + 1
    assert after.variants[: len(before.variants)] == before.variants
    assert [v.quantisation for v in after.variants[3:]] == ["int8", "float16"]
    assert after.provenance.parameters["tolerance.mean"] == 0.05
    assert after.provenance.metrics["fp16-tflite.mean"] == pytest.approx(fp16["mean"], rel=1e-4)
    drawn = ET.fromstring(plot.read_text())  # noqa: S314 - written here
    shapes = [e.tag.rpartition("}")[2] for e in drawn.iter()]
    assert shapes.count("circle") == 3


@pytest.mark.usefixtures("in_process")
def test_what_loses_too_much_is_not_written(built: Built, shuttle_rows: Path, tmp_path: Path):
    directory, _ = built("shuttle", "baseline")
    arguments = [
        *("optimise", str(directory), "--data", str(shuttle_rows), "--out", str(tmp_path)),
        "--rounds",
        "1",
    ]
    status, out, err = call(*arguments, "--techniques", "fp16,prune=0.9", "--version", "7.0.0")
    assert status == 1
    assert "optimise.over_tolerance prune90-tflite: mean" in err
    assert "refused" in out
    kept = package.read_manifest(tmp_path / "shuttle" / "7.0.0")
    assert kept.version == "7.0.0"
    assert [v.name for v in kept.variants[3:]] == ["fp16-tflite"]


@pytest.mark.usefixtures("in_process")
def test_the_tolerance_is_the_manifests_where_it_states_one(built: Built, shuttle_rows: Path, tmp_path: Path):
    """Here one that nothing can meet; and nothing is written where no variant is kept."""
    directory, manifest = built("shuttle", "baseline")
    provenance = msgspec.structs.replace(
        manifest.provenance, parameters={**manifest.provenance.parameters, "tolerance.mean": 1e-9}
    )
    contents = {ref.path: (directory / ref.path).read_bytes() for ref in manifest.files()}
    strict = tmp_path / "strict"
    package.write(strict, msgspec.structs.replace(manifest, provenance=provenance), contents)
    status, out, err = call(
        *("optimise", str(strict), "--data", str(shuttle_rows), "--techniques", "fp16"),
        *("--out", str(tmp_path), "--rounds", "1"),
    )
    assert status == 1
    assert "is more than 1e-09 (manifest)" in err
    assert "mean 1e-09 (manifest), flips 0.01 (default)" in out
    assert "nothing was written" in err
    assert not (tmp_path / "shuttle").exists()


def optimised(model: Path, data: Path, out: Path, *arguments: str) -> tuple[int, str, str]:
    return call(
        *("optimise", str(model), "--data", str(data), "--out", str(out), "--rounds", "1"),
        *("--name", "dense", "--version", "1.0.0", "--licence", "MIT", *arguments),
    )


@pytest.mark.usefixtures("in_process")
def test_an_onnx_file_gets_every_technique(dense_onnx: tuple[Path, Path], tmp_path: Path):
    model, rows = dense_onnx
    status, out, _ = call(
        *("optimise", str(model), "--data", str(rows), "--out", str(tmp_path), "--rounds", "1", "--json"),
        *("--techniques", "int8,fp16,prune,fuse", "--tolerance", "mean=50,flips=1"),
        *("--score", "reconstruction_mse", "--threshold", "0.5"),
        *("--name", "dense", "--version", "1.0.0", "--licence", "MIT"),
    )
    assert status == 0, out
    report = json.loads(out)
    original, int8, fp16, sparse, fused = report["variants"]
    assert fused["loss"]["max_abs"] < 1e-5
    assert int8["bytes"] < 0.75 * original["bytes"]
    assert fp16["bytes"] < 0.75 * original["bytes"]
    assert sparse["zstd_bytes"] < 0.8 * original["zstd_bytes"]
    assert sparse["bytes"] <= original["bytes"] + 100
    assert fp16["loss"]["mean"] < 0.01
    assert int8["loss"]["mean"] < sparse["loss"]["mean"]
    written = Path(report["directory"])
    assert package.validate(written).valid
    manifest = package.read_manifest(written)
    graph = onnx.load_model(written / "int8-onnx.onnx").graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    tolerance = next(v for v in manifest.variants if v.name == "int8-onnx").golden.tolerance
    assert tolerance["output"].atol > 1e-3  # a step of the last layer
    zeros = onnx.numpy_helper.to_array(onnx.load_model(written / "prune50-onnx.onnx").graph.initializer[0])
    assert (zeros == 0).mean() == pytest.approx(0.5, abs=0.01)


def test_private_operators_of_the_runtime_are_refused(
    dense_onnx: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Extended fusion makes them; a device's screen lets none through. Models are opened in children only."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a runtime was loaded")

    monkeypatch.setattr(registry, "load_runtime", opened)
    model, rows = dense_onnx
    status, _, err = call(
        *("optimise", str(model), "--data", str(rows), "--out", str(tmp_path), "--rounds", "1"),
        *("--techniques", "fuse=extended", "--name", "dense", "--version", "1.0.0", "--licence", "MIT"),
    )
    assert status == 1
    assert "package.unsafe_model fuse-extended-onnx" in err
    assert "com.microsoft" in err


@pytest.mark.skipif(not SHARED.is_dir(), reason="the third-party models of ../shared/data are not here")
def test_a_third_party_model(tmp_path: Path):
    """MLPerf Tiny's anomaly detector, an older .tflite that names operators in one field only."""
    rows = np.random.default_rng(0).standard_normal((100, 640)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    status, out, err = call(
        *(
            "optimise",
            str(SHARED / "mlperf-tiny-ad01" / "ad01_fp32.tflite"),
            "--data",
            str(tmp_path / "rows.npy"),
        ),
        *("--techniques", "int8", "--rounds", "1", "--json", "--out", str(tmp_path)),
        *("--tolerance", "mean=0.2", "--name", "ad01", "--version", "1.0.0", "--licence", "Apache-2.0"),
    )
    assert status == 0, err
    original, int8 = json.loads(out)["variants"]
    assert int8["bytes"] < 0.35 * original["bytes"]
    assert int8["loss"]["mean"] < 0.2
    assert package.validate(tmp_path / "ad01" / "1.0.0").valid


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--techniques", "int4"], "there are int8, fp16, prune, fuse"),
        (["--techniques", "prune=2"], "between 0 and 1"),
        (["--techniques", "int8+prune"], "must be the last step"),
        (["--tolerance", "flops=0.1"], "mean|max|flips|auc"),
        (["--score", "output"], "--threshold"),
        (["--data", "nowhere.csv"], "source.failed"),
        (["--version", ""], "package.manifest_invalid"),
        (["--plot", "nowhere/plot.svg"], "nowhere is no directory"),
    ],
)
def test_mistakes_are_answered_in_words(
    arguments: list[str], words: str, dense_onnx: tuple[Path, Path], tmp_path: Path
):
    status, _, err = optimised(*dense_onnx, tmp_path, *arguments)
    assert status == 1
    assert words in err


def test_a_quantised_model_is_no_original(built: Built, tmp_path: Path):
    directory, _ = built("shuttle", "baseline")
    np.save(tmp_path / "rows.npy", np.zeros((10, 9), np.float32))
    given = ["--data", str(tmp_path / "rows.npy"), "--out", str(tmp_path)]
    status, _, err = call("optimise", str(directory), *given, "--variant", "int8-tflite")
    assert status == 1
    assert "float32-tflite" in err
    naming = ["--name", "x", "--version", "1.0.0", "--licence", "MIT"]
    status, _, err = call("optimise", str(directory / "int8.tflite"), *given, *naming)
    assert status == 1
    assert "not a float model" in err


def node(op: str, inputs: list[str], output: str) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output])


def onnx_file(path: Path, nodes: list[onnx.NodeProto], *, opset: int = 17, half: bool = False) -> Path:
    """Write a model of ``x`` (n, open, 8), ``y`` and weights ``w``; quantisation by ``s`` and ``z``."""
    kind = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float16 if half else np.float32)
    constants = {"w": weights, "s": np.float32(0.1), "z": np.int8(0)}
    used = {name for one in nodes for name in one.input}
    graph = onnx.helper.make_graph(
        nodes,
        "made",
        [onnx.helper.make_tensor_value_info("x", kind, ["n", "t", 8])],
        [onnx.helper.make_tensor_value_info("y", kind, ["n", "t", 8])],
        [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used],
    )
    imports = [onnx.helper.make_opsetid("", opset)]
    path.write_bytes(
        onnx.helper.make_model(
            graph, opset_imports=imports, ir_version=3 if opset < 9 else 8
        ).SerializeToString()
    )
    return path


PRODUCT = node("MatMul", ["x", "w"], "y")
QUANTISED = [
    node("QuantizeLinear", ["x", "s", "z"], "a"),
    node("DequantizeLinear", ["a", "s", "z"], "b"),
    node("MatMul", ["b", "w"], "y"),
]


def test_an_old_model_with_open_dimensions_is_quantised(tmp_path: Path):
    """Of opset 7, which knows no scales by channel; the rows say how long its open dimension is."""
    model = onnx_file(tmp_path / "old.onnx", [PRODUCT], opset=7)
    rows = np.random.default_rng(1).standard_normal((40, 5, 8)).astype(np.float32)
    rows[3, 2, 1] = np.nan
    np.savez(tmp_path / "rows.npz", x=rows)
    np.save(tmp_path / "rows.npy", rows)
    found = data.load(tmp_path / "rows.npy", (TensorSpec("x", "FP32", (-1, -1, 8)),), None)
    assert found.rows["x"].shape == (39, 5, 8)
    status, out, err = optimised(model, tmp_path / "rows.npz", tmp_path, "--techniques", "int8", "--json")
    assert status == 0, err
    assert json.loads(out)["variants"][1]["loss"]["mean"] < 0.1
    assert "of the 19 windows" in json.loads(out)["data"]
    # A version is made once.
    written = tmp_path / "dense" / "1.0.0"
    before = (written / "manifest.json").read_bytes()
    status, _, err = optimised(model, tmp_path / "rows.npz", tmp_path, "--techniques", "fuse")
    assert status == 1
    assert "holds a package already" in err
    assert (written / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("quantised", r"quantised already \(DequantizeLinear, QuantizeLinear\)"),
        ("half", "weights are float16"),
    ],
)
def test_what_is_not_float32_is_said_to_be_no_original(content: str, reason: str, tmp_path: Path):
    nodes = QUANTISED if content == "quantised" else [PRODUCT]
    model = onnx_file(tmp_path / "m.onnx", nodes, half=content == "half")
    with pytest.raises(PitheadError, match=reason) as error:
        onnx_passes.check_float(model.read_bytes())
    assert error.value.code == "optimise.failed"


def test_a_quantised_tflite_is_no_original(built: Built):
    directory, _ = built("shuttle", "baseline")
    tflite_passes.check_float((directory / "float32.tflite").read_bytes())
    with pytest.raises(PitheadError, match="quantised already"):
        tflite_passes.check_float((directory / "int8.tflite").read_bytes())


TWO = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("z", "FP32", (-1, 2)))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.float32(1), "z": np.zeros((4, 2))}, r"float32 \[\], no rows"),
        ({"x": np.zeros((4, 0)), "z": np.zeros((4, 2))}, "no rows of numbers"),
        ({"x": np.array([["a", "b"]]), "z": np.zeros((1, 2))}, "no rows of numbers"),
        ({"x": np.zeros((4, 2)), "z": np.zeros((3, 2))}, "differ in length"),
        ({"x": np.zeros((4, 2)), "z": np.zeros((4, 2)), "label": np.zeros(3)}, "differ in length"),
        ({"x": np.full((4, 2), np.nan), "z": np.zeros((4, 2))}, "without missing values"),
        ({"x": np.zeros((4, 2))}, "the model's inputs are"),
    ],
)
def test_tensors_that_are_none_are_named(arrays: dict[str, np.ndarray], words: str, tmp_path: Path):
    np.savez(tmp_path / "t.npz", allow_pickle=False, **arrays)
    with pytest.raises(PitheadError, match=words) as error:
        data.load(tmp_path / "t.npz", TWO, None)
    assert error.value.code == "source.failed"


def test_rows_of_tensors_with_a_missing_value_are_left_out_together(tmp_path: Path):
    x = np.arange(8.0).reshape(4, 2)
    x[1, 0] = np.nan
    np.savez(tmp_path / "t.npz", x=x, z=np.arange(8.0).reshape(4, 2), label=[0, 1, 0, 1])
    found = data.load(tmp_path / "t.npz", TWO, None)
    assert found.rows["z"][:, 0].tolist() == [0, 4, 6]
    assert found.label is not None
    assert found.label.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("b.npz", b"PK\x03\x04 and no more"),
        ("b.npy", b"\x93NUMPY\x01\x00"),
        ("b.csv.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x00abcdefgh"),
        ("b.csv", bytes(range(256))),
        ("b.parquet", b"PAR1 no footer PAR1"),
    ],
)
def test_a_broken_recording_is_named(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PitheadError, match=name) as error:
        data.load(tmp_path / name, TWO[:1], None)
    assert error.value.code == "source.failed"


def test_options_that_would_do_nothing_are_refused(tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.zeros((4, 2)))
    for options in ({"label": "bad"}, {"columns": ["a", "b"]}):
        with pytest.raises(PitheadError, match="has no columns"):
            data.load(tmp_path / "rows.npy", TWO[:1], None, **options)


def test_a_package_is_there_whole_or_not_at_all(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Here Ctrl-C comes while its second file is written."""
    directory, manifest = built("shuttle", "baseline")
    contents = {ref.path: (directory / ref.path).read_bytes() for ref in manifest.files()}
    real, written = Path.write_bytes, []

    def interrupted(self: Path, content: bytes) -> int:
        if written:
            raise KeyboardInterrupt
        written.append(self)
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        package.write(tmp_path / "shuttle" / "9.0.0", manifest, contents)
    assert written
    assert list((tmp_path / "shuttle").iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(PitheadError, match="File exists"):
        package.write(tmp_path / "file" / "9.0.0", manifest, contents)


def test_windows_are_those_of_a_lane(tmp_path: Path):
    """Cut by stride, without unusable rows, normalised, labelled by any of their rows."""
    lines = ["c1,c0,bad"] + [f"{i},{10 * i},{int(i == 4)}" for i in range(9)]
    lines[8] = ",70,0"
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    found = data.load(tmp_path / "rows.csv", INPUT, FOUR, label="bad")
    assert found.start.tolist() == [0, 2, 4]
    assert found.label is not None
    assert found.label.tolist() == [False, True, True]
    assert found.rows["x"][1].tolist() == [[9.5, 2], [14.5, 3], [19.5, 4]]


def test_no_row_is_in_both_parts():
    start = np.arange(0, 100, 2, dtype=np.int64)
    whole = data.Data({"x": np.zeros((50, 1))}, None, start, 10)
    parts = data.divide(whole, 0.5, 8, 1000)
    assert len(parts.calibration) == 8
    assert max(parts.calibration.start) + 10 <= min(parts.evaluation.start)
    with pytest.raises(PitheadError, match="cannot be divided"):
        data.divide(whole.take(np.array([0])), 0.5, 8, 8)


def test_losses_are_those_of_scores_and_decisions():
    want = {"y": np.array([[0.0], [1.0], [2.0], [3.0]])}
    got = {"y": np.array([[0.0], [1.5], [2.0], [1.4]])}
    score = Score(method="output", threshold=1.45)
    label = np.array([False, False, True, True])
    loss = judge.compare(want, got, np.zeros((4, 1), np.float32), score, label)
    assert (loss.max_abs, loss.mean_abs, loss.flips) == (pytest.approx(1.6), pytest.approx(0.525), 0.5)
    assert (loss.auc_original, loss.auc) == (1.0, 0.75)
    allowed = judge.tolerances(["auc=0.3", "max=1"], {"tolerance.flips": 0.5, "tolerance.mean": 0.9})
    assert judge.excess(loss, allowed) == "max 1.6 is more than 1 (command line)"
    shares = judge.compare({"y": np.eye(3)}, {"y": np.eye(3)[[0, 2, 1]]}, None, None, None)
    assert shares.flips == pytest.approx(2 / 3)
    assert judge.compare({"y": np.eye(3) * 5}, {"y": np.eye(3)}, None, None, None).flips is None
    with pytest.raises(PitheadError, match="the variant gives NaN"):
        judge.compare(want, {"y": got["y"] * np.nan}, None, None, None)
    with pytest.raises(PitheadError, match="the original gives NaN"):
        judge.compare({"y": got["y"] * np.nan}, got, None, None, None)
    whole = Score(method="reconstruction_mse", threshold=1.0)
    with pytest.raises(PitheadError, match="a window has 2 values and its output 1"):
        judge.compare(want, got, np.zeros((4, 2), np.float32), whole, None)


def test_the_smallest_weights_become_zero():
    weights = np.array([[0.1, -3.0], [2.0, -0.2]], np.float32)
    assert pruned(weights, 0.5).tolist() == [[0, -3], [2, 0]]
    assert pruned(weights, 0.2).tolist() == weights.tolist()


def test_techniques_are_named_after_their_steps():
    found = techniques.parse("prune=0.7+int8, fuse, fuse=extended,fuse", "onnx")
    assert [t.slug for t in found] == ["prune70-int8", "fuse", "fuse-extended"]
    assert [t.calibrates for t in found] == [True, False, False]
    with pytest.raises(PitheadError, match="for tflite"):
        techniques.parse("fuse", "tflite")
