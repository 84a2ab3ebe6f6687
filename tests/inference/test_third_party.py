"""Models that other people made run unchanged, and answer what they answered elsewhere."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from inference.registry import open_session
from models import package
from models.wrap import wrap

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data")) / "models"
pytestmark = pytest.mark.skipif(
    not (MODELS / "golden.json").is_file(),
    reason=f"no third-party models at {MODELS}; set PITHEAD_SHARED_DATA",
)

BUILT_IN_KERNELS = ("fan-autoencoder/", "mlperf-tiny-ad01/")
"""On the random inputs of the golden file the other models' softmax turns one step into many: their
tolerance is stated for XNNPACK, the kernels that they were recorded with."""


def golden_entries() -> dict[str, dict]:
    file = MODELS / "golden.json"
    return json.loads(file.read_text()) if file.is_file() else {}


CASES = [
    (name, accelerator)
    for name in golden_entries()
    for accelerator in (["cpu"] if name.endswith(".onnx") else ["xnnpack", "cpu"])
    if accelerator == "xnnpack" or name.endswith(".onnx") or name.startswith(BUILT_IN_KERNELS)
]


def golden_input(entry: dict) -> np.ndarray:
    """The rule that the file states, in code."""
    random = np.random.default_rng(7)
    shape, dtype = entry["input_shape"], entry["input_dtype"]
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    low, high = (-100, 100) if dtype == "int8" else (0, 256)
    return random.integers(low, high, shape).astype(dtype)


def allowed(entry: dict, want: np.ndarray) -> np.ndarray:
    if steps := re.match(r"(\d+) steps", entry["tolerance"]):
        return np.full(want.shape, float(steps[1]))
    rtol, atol = re.fullmatch(r"rtol ([\d.e-]+), atol ([\d.e-]+)", entry["tolerance"]).groups()
    return float(atol) + float(rtol) * np.abs(want)


@pytest.mark.parametrize(("name", "accelerator"), CASES)
def test_reproduces_its_golden_output(name: str, accelerator: str):
    entry = golden_entries()[name]
    path = MODELS / name
    session = open_session(path, path.suffix[1:], accelerator)
    assert session.accelerator == accelerator
    output = session.run({session.inputs[0].name: golden_input(entry)})[session.outputs[0].name]
    assert output.dtype == entry["output_dtype"]
    want = np.array(entry["output_first8"])
    got = output.ravel()[: len(want)].astype(np.float64)
    assert (np.abs(got - want) <= allowed(entry, want)).all(), np.abs(got - want).max()


def test_a_recurrent_model_with_subgraphs_runs():
    """Silero: `If` nodes, a state that is handed on, a scalar integer input."""
    session = open_session(MODELS / "silero-vad-16k" / "silero_vad_16k_op15.onnx", "onnx")
    state = np.zeros((2, 1, 128), np.float32)
    silence = np.zeros((1, 512), np.float32)
    rate = np.array(16000, np.int64)
    for _ in range(3):
        answer = session.run({"input": silence, "state": state, "sr": rate})
        state = answer["stateN"]
    assert 0 <= float(answer["output"][0, 0]) < 0.5


def test_quantised_tensors_carry_their_scale():
    path: Path = MODELS / "mlperf-tiny-ad01" / "ad01_int8.tflite"
    session = open_session(path, "tflite", "xnnpack")
    assert session.inputs[0].scale == pytest.approx(0.3910152316)
    assert session.inputs[0].zero_point == 89
    assert session.inputs[0].shape == (-1, 640)


@pytest.mark.parametrize(
    "files",
    [
        ("mlperf-tiny-ad01/ad01_int8.tflite", "mlperf-tiny-ad01/ad01_int8.onnx"),
        ("mlperf-tiny-kws/kws_ref_model.tflite",),
        ("mlperf-tiny-ic/pretrainedResnet_quant.onnx",),
        ("fan-autoencoder/fan_low_model.tflite",),
    ],
)
def test_can_be_published_unchanged(files: tuple[str, ...], tmp_path: Path):
    """Wrapped into a package, which then passes the validation that admission runs."""
    sources = [MODELS / name for name in files]
    options = {"name": "theirs", "version": "1.0.0", "release_counter": 1, "licence": "Apache-2.0"}
    manifest = wrap(sources, tmp_path, **options, source="elsewhere")
    for source, variant in zip(sources, manifest.variants, strict=True):
        assert (tmp_path / variant.file.path).read_bytes() == source.read_bytes()
    result = package.validate(tmp_path)
    assert result.valid, result.detail
    assert result.untried == ()


def test_a_recurrent_model_can_be_published_with_inputs_of_its_own(tmp_path: Path):
    random = np.random.default_rng(1)
    inputs = tmp_path / "inputs.npz"
    np.savez(
        inputs,
        input=random.standard_normal((2, 1, 512)).astype(np.float32),
        state=np.zeros((2, 2, 1, 128), np.float32),
        sr=np.full(2, 16000, np.int64),
    )
    file = MODELS / "silero-vad-16k" / "silero_vad_16k_op15.onnx"
    options = {"name": "vad", "version": "5.0.0", "release_counter": 1, "licence": "MIT"}
    wrap([file], tmp_path / "vad", **options, source="elsewhere", inputs=inputs)
    result = package.validate(tmp_path / "vad")
    assert result.valid, result.detail
