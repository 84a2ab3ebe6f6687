"""`pithead models optimise`: variants of real models, judged, measured, written or refused."""

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from contract.errors import PitheadError
from contract.manifest import Channel, Manifest, Pipeline, Score, TensorSpec
from inference import registry
from models import dense, onnx_builder, package
from models.cli import app
from models.optimise import data, judge, techniques
from models.optimise.pruning import pruned
from models.shuttle import dataset

Built = Callable[[str, str], tuple[Path, Manifest]]
SHARED = Path(__file__).parents[3] / "shared" / "data" / "models"
FOUR = Pipeline(tuple(Channel(f"c{i}", minimum=-50) for i in range(2)), 3, 2, (1.0, 0.0), (2.0, 1.0))
INPUT = (TensorSpec("x", "FP32", (-1, 6)),)


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "250", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="session")
def shuttle_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return held-out rows of Shuttle, with their labels."""
    x, wrong = dataset.load()
    held = dataset.divide(len(x)).held_out[:4000]
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
    report = json.loads(out)
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
    ],
)
def test_mistakes_are_answered_in_words(
    arguments: list[str], words: str, dense_onnx: tuple[Path, Path], tmp_path: Path
):
    model, rows = dense_onnx
    status, _, err = call(
        *("optimise", str(model), "--data", str(rows), "--out", str(tmp_path), "--rounds", "1"),
        *("--name", "dense", "--version", "1.0.0", "--licence", "MIT", *arguments),
    )
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
    with pytest.raises(PitheadError, match="NaN"):
        judge.compare(want, {"y": got["y"] * np.nan}, None, None, None)


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
