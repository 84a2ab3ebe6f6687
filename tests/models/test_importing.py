"""`pithead models import`: other frameworks' models, scikit-learn's by its real converter."""

import json
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from contract.errors import PitheadError
from models import importing, package
from models.cli import app
from models.converters import scikit_learn
from tests.serve.environments import environment

NAMING = ("--version", "1.0.0", "--licence", "MIT")
TRAIN = """
import sys
import joblib, numpy as np
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.decomposition import PCA
x = np.random.default_rng(0).standard_normal((200, 6))
for name, model in {
    "detector": IsolationForest(n_estimators=20, random_state=0).fit(x),
    "states": RandomForestClassifier(n_estimators=9, random_state=0).fit(x, np.where(x[:, 0] > 0, "a", "b")),
    "pca": PCA(n_components=2).fit(x),
}.items():
    joblib.dump(model, f"{sys.argv[1]}/{name}.joblib")
joblib.dump({"weights": 1}, f"{sys.argv[1]}/dict.joblib")
"""


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["import", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def sklearn() -> str:
    """Return an interpreter that has scikit-learn and skl2onnx."""
    return str(environment("import-scikit-learn"))


@pytest.fixture(scope="module")
def trained(sklearn: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of estimators."""
    folder = tmp_path_factory.mktemp("trained")
    subprocess.run([sklearn, "-c", TRAIN, str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.timeout(600)  # the first time it installs what it needs
@pytest.mark.parametrize(("name", "outputs"), [("detector", 2), ("states", 2)])
def test_scikit_learn(name: str, outputs: int, sklearn: str, trained: Path, tmp_path: Path):
    file = str(trained / f"{name}.joblib")
    where = ("--python", sklearn, "--name", name, *NAMING, "--out", str(tmp_path))
    status, out, err = call(file, "--trust-pickle", *where, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["rows"] == 64
    assert report["worst"] < 1e-5
    assert "skl2onnx 1.20.0" in report["source"]
    result = package.validate(Path(report["directory"]))
    assert result.valid, result.detail
    manifest = package.read_manifest(Path(report["directory"]))
    assert len(manifest.variants[0].outputs) == outputs
    assert manifest.variants[0].golden.vectors == 8
    assert file.rpartition("/")[2] in manifest.provenance.source


@pytest.mark.timeout(600)
def test_given_rows_are_what_both_models_get(sklearn: str, trained: Path, tmp_path: Path):
    np.save(tmp_path / "rows.npy", np.ones((5, 6), np.float32))
    status, out, err = call(
        *(
            str(trained / "pca.joblib"),
            "--trust-pickle",
            "--python",
            sklearn,
            "--inputs",
            str(tmp_path / "rows.npy"),
        ),
        *("--name", "pca", *NAMING, "--out", str(tmp_path)),
    )
    assert status == 0, err
    assert "on 5 given rows" in out
    assert len(package.read_manifest(tmp_path / "pca" / "1.0.0").variants[0].outputs) == 1


class Table:
    """What of an estimator says which columns it takes, as scikit-learn has it."""

    def __init__(self, *columns: Any) -> None:
        self.feature_names_in_ = np.array(["temp", "load", "mode"], object)
        self.steps = [
            ("pick", SimpleNamespace(transformers=[("a", None, c) for c in columns])),
            ("last", None),
        ]


def test_a_pipeline_of_a_table_gets_an_array_for_each_column():
    """Texts as they are, numbers as float32, in the order of the table; one matrix is cut by columns."""
    assert scikit_learn.picks_by_name(Table(["temp", "load"], "mode"))
    assert not scikit_learn.picks_by_name(Table([0, 1], slice(2, 3)))
    assert not scikit_learn.picks_by_name(SimpleNamespace(transformers=[("a", None, ["temp"])]))
    names = ["temp", "load", "mode"]
    given = [("mode", np.array([["run"], ["idle"]])), ("load", np.zeros(2)), ("temp", np.arange(2))]
    found = scikit_learn.by_name(np, names, given)
    assert found is not None
    assert {name: array.tolist() for name, array in found.items()} == {
        "temp": [0.0, 1.0],
        "load": [0.0, 0.0],
        "mode": ["run", "idle"],
    }
    assert list(found) == names
    assert scikit_learn.by_name(np, names, given[1:]) is None
    cut = scikit_learn.by_name(np, names, [("0", np.arange(6).reshape(2, 3))])
    assert cut is not None
    assert cut["load"].tolist() == [1.0, 4.0]
    assert cut["load"].dtype == np.float32
    assert scikit_learn.by_name(np, names, [("0", np.zeros((2, 2)))]) is None


@pytest.mark.timeout(600)
def test_what_is_no_estimator_is_told(sklearn: str, trained: Path, tmp_path: Path):
    where = ("--python", sklearn, "--name", "dict", *NAMING, "--out", str(tmp_path))
    status, _, err = call(str(trained / "dict.joblib"), "--trust-pickle", *where)
    assert status == 1
    assert "no fitted estimator, but dict" in err


@pytest.mark.parametrize("content", [b"no array", b"PK\x03\x04 no archive"])
def test_inputs_that_are_none_are_told_before_a_converter_runs(content: bytes, tmp_path: Path):
    (tmp_path / "m.pt2").write_bytes(b"")
    (tmp_path / "rows.npz").write_bytes(content)
    inputs = ("--inputs", str(tmp_path / "rows.npz"))
    status, _, err = call(str(tmp_path / "m.pt2"), *inputs, "--name", "x", *NAMING, "--out", str(tmp_path))
    assert status == 1
    assert "inference.bad_input" in err


HOSTILE = """
import json, os, pathlib, socket, sys
request, seen = json.load(sys.stdin), {"environment": sorted(os.environ), "home": os.environ["HOME"]}
for name, attempt in {
    "write": lambda: pathlib.Path(TRACE).write_text("x"),
    "connect": lambda: socket.create_connection(("127.0.0.1", PORT), timeout=5),
    "kill": lambda: os.kill(os.getppid(), 0),
    "scratch": lambda: pathlib.Path(request["out"], "x").write_text("x"),
}.items():
    try:
        attempt()
        seen[name] = "done"
    except OSError as error:
        seen[name] = type(error).__name__
print("words before the answer")
print(json.dumps({"code": "import.failed", "detail": json.dumps(seen)}))
"""


def converting_with(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the error of an import whose converter, or the pickle in it, does as it pleases."""
    (folder / "pytorch.py").write_text(program)
    (folder / "__init__.py").write_text("")
    (folder / "m.pt2").write_bytes(b"")
    monkeypatch.setattr(importing.converters, "__file__", str(folder / "__init__.py"))
    with pytest.raises(PitheadError) as error:
        importing.bring_in(folder / "m.pt2", folder / "out", name="x", version="1.0.0", licence="MIT")
    assert error.value.code == "import.failed"
    return error.value.detail


def test_what_a_pickle_does_stays_in_a_folder_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No write elsewhere, no network, none of the caller's secrets."""
    monkeypatch.setenv("SECRET_TOKEN", "of the caller")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = HOSTILE.replace("TRACE", repr(str(tmp_path / "trace"))).replace("PORT", str(port))
        seen = json.loads(converting_with(program, tmp_path, monkeypatch))
    assert {seen[name] for name in ("write", "connect", "kill")} == {"PermissionError"}
    assert seen["scratch"] == "done"
    assert "SECRET_TOKEN" not in seen["environment"]
    assert seen["home"] != str(Path.home())
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("print('[1, 2]')", "no answer"),
        ('print(\'{"code": "no.such.code"}\')', "None"),
        ('print(\'{"source": "well"}\')', "left no model"),
        ("import os; os.abort()", "no answer"),
    ],
)
def test_a_converter_that_lies_is_told(
    answer: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert words in converting_with(answer, tmp_path, monkeypatch)


def test_what_a_converter_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = "import subprocess, sys; p = subprocess.Popen(['sleep', '600'])\nprint(p.pid, file=sys.stderr)"
    pid = int(converting_with(started, tmp_path, monkeypatch).rpartition(" ")[2])
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_pickle_is_not_opened_unless_it_is_trusted(tmp_path: Path):
    """This one would leave a trace."""
    trace = tmp_path / "trace"
    file = tmp_path / "model.pkl"
    file.write_bytes(b"cbuiltins\nopen\n(V" + str(trace).encode() + b"\nVw\ntR.")
    status, _, err = call(str(file), "--name", "x", *NAMING, "--out", str(tmp_path))
    assert status == 1
    assert "import.untrusted" in err
    assert "--trust-pickle" in err
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("model.joblib", "pip install scikit-learn skl2onnx"),
        ("model.pt2", "pip install torch onnx onnxscript"),
        ("model.keras", "pip install tensorflow tf2onnx"),
        ("saved", "pip install tensorflow tf2onnx"),
    ],
)
def test_what_is_missing_is_named_with_the_command(name: str, command: str, tmp_path: Path):
    """None of these frameworks is in this environment."""
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"")
    else:
        path.mkdir()
        (path / "saved_model.pb").write_bytes(b"")
    status, _, err = call(str(path), "--trust-pickle", "--name", "x", *NAMING, "--out", str(tmp_path))
    assert status == 1
    assert "import.converter_missing" in err
    assert command in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.txt"], "neither a SavedModel"),
        (["away.pt2"], "is not there"),
        (["model.pt2", "--shape", "1,x"], "is not like 1,3,32,32"),
        (["model.pt2", "--python", "no-such-python"], "--python no-such-python"),
    ],
)
def test_mistakes_are_answered_in_words(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("model.txt", "model.pt2"):
        Path(name).write_bytes(b"")
    status, _, err = call(*arguments, "--name", "x", *NAMING, "--out", "out")
    assert status == 1
    assert words in err


def test_values_beyond_the_tolerance_are_counted():
    want = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array(["a", "b"])]
    worst, share = importing.compared(want, [np.array([[1.0, 2.001], [3.5, np.nan]])])
    assert worst > 1e300
    assert share == 0.5
    with pytest.raises(PitheadError, match="do not correspond"):
        importing.compared(want[:1], [])
