"""The OpenVINO execution provider for real, from its own build of ONNX Runtime, in its own environment."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from contract.manifest import Manifest
from inference.probing import ProbeReport
from models.assemble import Assembled

pytestmark = [pytest.mark.xdist_group("openvino"), pytest.mark.timeout(400)]

RUN = """
import json, sys
import numpy as np
from inference.accelerators import find
from inference.registry import accelerators, open_session
from contract.errors import PitheadError
wanted = json.loads(sys.stdin.read())
x = np.array(wanted["rows"], np.float32)
answer = {"accelerators": accelerators()}
for name in ("openvino", "cpu"):
    session = open_session(wanted["model"], "onnx", name)
    y = session.run({session.inputs[0].name: x})[session.outputs[0].name]
    answer[name] = {"y": y.tolist(), "used": session.accelerator, "nodes": session.placement.nodes,
                    "runtime": session.runtime}
for hint, value in (("device_type", "GPU"), ("device_type", "NPU"), ("device_type", "nonsense")):
    try:
        session = open_session(wanted["model"], "onnx", find("onnx", "openvino", None, {hint: value}))
        answer[value] = "runs on " + session.accelerator
    except PitheadError as error:
        answer[value] = error.code
print(json.dumps(answer))
"""
PROBE = """
import sys
from pathlib import Path
import msgspec
from contract.manifest import Manifest
from inference.probing import probe
directory = Path(sys.argv[1])
manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=Manifest)
variants = tuple(msgspec.structs.replace(v, accelerators=("openvino", "cuda", "cpu"))
                 for v in manifest.variants if v.format == "onnx")
manifest = msgspec.structs.replace(manifest, variants=variants)
files = {ref.path: directory / ref.path for ref in manifest.files()}
print(msgspec.json.encode(probe(manifest, files, accelerators=["openvino", "cuda", "cpu"])).decode())
"""


@pytest.fixture(scope="module")
def python(environment: Callable[[str], Path]) -> Path:
    return environment("openvino")


def run(python: Path, program: str, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [str(python), "-I", "-c", program, *arguments],
        input=stdin, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_the_model_and_takes_its_nodes(python: Path, assembled: Assembled, tmp_path: Path):
    file = tmp_path / "m.onnx"
    file.write_bytes(assembled.contents["int8.onnx"])
    rows = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    answer = json.loads(run(python, RUN, stdin=json.dumps({"model": str(file), "rows": rows.tolist()})))
    assert "openvino" in answer["accelerators"]
    assert answer["openvino"]["used"] == "openvino"
    assert answer["openvino"]["runtime"] == "onnxruntime 1.24.1"
    assert sum(answer["openvino"]["nodes"]["openvino"].values()) >= 4
    assert set(answer["cpu"]["nodes"]) == {"cpu"}
    np.testing.assert_allclose(answer["openvino"]["y"], answer["cpu"]["y"], atol=0.2)
    session = assembled.session("int8-onnx")
    here = session.run({session.inputs[0].name: rows})[session.outputs[0].name]
    np.testing.assert_allclose(answer["cpu"]["y"], here, atol=0.2)


def test_a_device_that_is_absent_is_never_said_to_run_it(python: Path, assembled: Assembled, tmp_path: Path):
    file = tmp_path / "m.onnx"
    file.write_bytes(assembled.contents["int8.onnx"])
    answer = json.loads(run(python, RUN, stdin=json.dumps({"model": str(file), "rows": [[0.0] * 4]})))
    for device in ("GPU", "NPU", "nonsense"):
        assert answer[device] in {"inference.accelerator_missing", "inference.load_failed", "runs on cpu"}
    assert answer["GPU"] == "inference.accelerator_missing"


def test_the_probe_checks_it_in_the_sandbox(python: Path, good: tuple[Manifest, dict[str, Path]]):
    _, files = good
    directory = next(iter(files.values())).parent
    reports = msgspec.json.decode(run(python, PROBE, str(directory)), type=list[ProbeReport])
    found = {r.accelerator: r for r in reports}
    assert found["cuda"].code == "inference.accelerator_missing"
    assert found["openvino"].code is None, found["openvino"]
    assert found["openvino"].vectors == 8
    assert found["openvino"].placement.nodes_on("openvino") == found["openvino"].placement.total > 0
    assert found["cpu"].passed
