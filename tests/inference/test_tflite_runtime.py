"""The TFLite path once more on tflite-runtime, which armv7l devices have, in an environment of its own.

It needs numpy below 2 and Python 3.11 or older. The environment is made once
in ``.venvs`` and used again while its requirements do not change.
"""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from packaging.requirements import Requirement

from contract.manifest import Manifest
from inference.registry import open_session
from models.assemble import Assembled

pytestmark = [pytest.mark.xdist_group("tflite-runtime"), pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data")) / "models"

RUN = """
import json, sys
import numpy as np
from inference.registry import accelerators, installed, open_session
wanted = json.loads(sys.stdin.read())
session = open_session(wanted["model"], "tflite", wanted["accelerator"])
results = []
for row in wanted["rows"]:
    x = np.array(row, wanted["dtype"])
    y = session.run({session.inputs[0].name: x})[session.outputs[0].name]
    results.append(y.astype(float).ravel().tolist())
print(json.dumps({"results": results, "runtime": session.runtime, "used": session.accelerator,
                  "installed": installed(), "numpy": np.__version__}))
"""
PROBE = """
import json, sys
from pathlib import Path
import msgspec
from contract.manifest import Manifest
from inference.probing import probe
directory = Path(sys.argv[1])
manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Manifest)
files = {ref.path: directory / ref.path for ref in manifest.files()}
print(msgspec.json.encode(probe(manifest, files)).decode())
"""


@pytest.fixture(scope="module")
def python(environment: Callable[[str], Path]) -> Path:
    return environment("tflite-runtime")


def run(python: Path, program: str, *arguments: str, stdin: str = "") -> dict | list:
    done = subprocess.run(
        [str(python), "-I", "-c", program, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


OTHER_KERNELS = (
    "mlperf-tiny-ic/pretrainedResnet_quant.tflite",
    "mlperf-tiny-kws/kws_ref_model_float32.tflite",
)
"""Recorded with XNNPACK, which tflite-runtime does not use for these two. On random input their softmax turns
one step into up to twelve, in LiteRT's built-in kernels just so: they are compared with those."""
GOLDEN = json.loads((MODELS / "golden.json").read_text()) if (MODELS / "golden.json").is_file() else {}


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.endswith(".tflite")])
def test_third_party_models_answer_alike(python: Path, name: str):
    entry = GOLDEN[name]
    random = np.random.default_rng(7)
    shape, dtype = entry["input_shape"], entry["input_dtype"]
    x = random.standard_normal(shape) if dtype == "float32" else random.integers(-100, 100, shape)
    x = x.astype(dtype)
    order = {
        "model": str(MODELS / name),
        "accelerator": "xnnpack",
        "rows": [x.astype(float).tolist()],
        "dtype": dtype,
    }
    answer = run(python, RUN, stdin=json.dumps(order))
    assert answer["runtime"] == "tflite-runtime 2.14.0"
    assert answer["numpy"].startswith("1.")
    got, want = np.array(answer["results"][0][:8]), np.array(entry["output_first8"])
    if name in OTHER_KERNELS:
        session = open_session(MODELS / name, "tflite", "cpu")
        want = session.run({session.inputs[0].name: x})[session.outputs[0].name].ravel()[:8].astype(float)
    allowed = 4.0 if dtype == "int8" else 1e-4 + 1e-3 * np.abs(want)
    assert (np.abs(got - want) <= allowed).all(), (answer["used"], np.abs(got - want).max())


@pytest.mark.parametrize("accelerator", ["xnnpack", "cpu"])
def test_own_models_agree_with_litert(python: Path, assembled: Assembled, tmp_path: Path, accelerator: str):
    rows = np.random.default_rng(1).integers(-100, 100, (20, 1, 4)).astype(np.int8)
    file = tmp_path / "int8.tflite"
    file.write_bytes(assembled.contents["int8.tflite"])
    order = {"model": str(file), "accelerator": accelerator, "rows": rows.tolist(), "dtype": "int8"}
    answer = run(python, RUN, stdin=json.dumps(order))
    session = assembled.session("int8-tflite", accelerator)
    here = np.concatenate([session.run({"input": row})["output"] for row in rows]).astype(int)
    assert np.abs(np.array(answer["results"]) - here).max() <= 4


def test_the_probe_passes_there_too(python: Path, good: tuple[Manifest, dict[str, Path]]):
    manifest, files = good
    directory = next(iter(files.values())).parent
    reports = run(python, PROBE, str(directory))
    seen = {(r["variant"], r["accelerator"]): r.get("code") for r in reports}
    assert seen["int8-tflite", "cpu"] is None
    assert seen["float32-tflite", "cpu"] is None
    assert seen["int8-onnx", "cpu"] == "inference.runtime_missing"
    assert all(r["sandbox"]["landlock_abi"] >= 0 for r in reports if r.get("code") is None)
    assert msgspec.json.encode(manifest)


def test_devices_of_armv7l_get_the_numpy_that_tflite_runtime_was_built_for():
    """With numpy 2 it imports, and then no model opens."""
    armv7l = {"platform_machine": "armv7l", "python_full_version": "3.11.9"}
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / "agent.txt").read_text().splitlines():
        if line.startswith((" ", "#")):
            continue
        wanted = Requirement(line.rstrip("\\ "))
        if wanted.marker is None or wanted.marker.evaluate(armv7l):
            pins[wanted.name] = str(wanted.specifier)
    assert pins["tflite-runtime"] == "==2.14.0"
    assert pins["numpy"].startswith("==1.26")
