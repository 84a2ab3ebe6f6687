"""`pithead models` as people and the control plane's admission call it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from contract.manifest import Manifest
from inference import registry
from models import package
from models.assemble import Assembled, assemble
from models.cli import app
from models.dense import Training, quantise_network, train_autoencoder

Built = Callable[[str, str], tuple[Path, Manifest]]


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="session")
def small() -> Assembled:
    rows = np.random.default_rng(2).standard_normal((128, 4))
    network = train_autoencoder(rows, Training(hidden=(3,), epochs=2, batch=32))
    return assemble(network, quantise_network(network, rows), rows.astype(np.float32), "small")


def test_admission_gets_one_json_document(built: Built):
    """Exactly as the control plane calls it."""
    directory, manifest = built("shuttle", "baseline")
    done = subprocess.run(
        [sys.executable, "-m", "models", "validate", str(directory), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout)
    assert report["valid"] is True
    assert (report["name"], report["version"]) == (manifest.name, manifest.version)
    assert all("code" not in p for p in report["probes"])


def test_a_refused_package_exits_with_one_and_says_why(built: Built, tmp_path: Path):
    shutil.copytree(built("shuttle", "baseline")[0], tmp_path / "p")
    (tmp_path / "p" / "int8.onnx").write_bytes(b"tampered")
    status, out, _ = call("validate", str(tmp_path / "p"), "--json")
    assert status == 1
    assert json.loads(out)["code"] == "package.file_mismatch"
    status, _, err = call("validate", str(tmp_path / "p"))
    assert status == 1
    assert "package.file_mismatch" in err
    assert "int8.onnx" in err


def test_build_writes_where_it_says(tmp_path: Path):
    arguments = ["build", "shuttle", "--out", str(tmp_path), "--version", "9.0.0", "--release-counter", "7"]
    status, out, err = call(*arguments, "--set", "hidden=4", "--set", "epochs=1", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert Path(report["directory"]) == tmp_path / "shuttle" / "9.0.0"
    assert (report["version"], report["release_counter"]) == ("9.0.0", 7)
    status, out, _ = call("inspect", report["directory"])
    assert status == 0
    assert "shuttle 9.0.0" in out
    assert "int8-tflite" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "--out", "x"], "--all"),
        (["build", "shuttle", "--all", "--out", "x"], "--all"),
        (["build", "shutle", "--out", "x"], "shuttle, host-health"),
        (["build", "shuttle", "--out", "x", "--set", "hidden"], "name=value"),
        (["build", "shuttle", "--out", "x", "--recipe", "best"], "baseline"),
        (["inspect", "nowhere"], "package.file_missing"),
    ],
)
def test_mistakes_are_answered_in_words(arguments: list[str], words: str):
    status, _, err = call(*arguments)
    assert status == 1
    assert words in err


@pytest.mark.parametrize("command", ["build", "inspect", "validate", "wrap"])
def test_help_has_examples(command: str):
    status, out, _ = call(command, "--help")
    assert status == 0
    assert f"pithead models {command}" in out


def test_files_from_elsewhere_are_packaged_unchanged(small: Assembled, tmp_path: Path):
    for name in ("int8.tflite", "int8.onnx"):
        (tmp_path / name).write_bytes(small.contents[name])
    files = [str(tmp_path / "int8.tflite"), str(tmp_path / "int8.onnx")]
    options = [
        "--name",
        "kws",
        "--version",
        "1.0.0",
        "--licence",
        "Apache-2.0",
        "--out",
        str(tmp_path / "out"),
    ]
    status, out, err = call("wrap", *files, *options)
    assert status == 0, err
    directory = Path(out.strip())
    result = package.validate(directory)
    assert result.valid, result.detail
    manifest = package.read_manifest(directory)
    assert [v.name for v in manifest.variants] == ["int8-tflite", "float32-onnx"]
    assert (directory / "int8-tflite.tflite").read_bytes() == small.contents["int8.tflite"]
    inputs = tmp_path / "inputs.npz"
    np.savez(inputs, input=np.zeros((3, 1, 4), np.int8))
    status, _, err = call("wrap", files[0], *options, "--inputs", str(inputs))
    assert status == 0, err
    assert package.read_manifest(directory).variants[0].golden.vectors == 3
    status, _, err = call("wrap", str(inputs), *options)
    assert status == 1
    assert ".tflite" in err


def test_files_from_elsewhere_are_never_opened_by_this_process(
    small: Assembled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "int8.tflite"
    file.write_bytes(small.contents["int8.tflite"])

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("a runtime was loaded")

    monkeypatch.setattr(registry, "load_runtime", opened)
    options = ["--name", "kws", "--version", "1.0.0", "--licence", "MIT", "--out", str(tmp_path / "out")]
    status, _, err = call("wrap", str(file), *options)
    assert status == 0, err
