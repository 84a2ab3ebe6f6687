"""Other people's models: what they answered where they were recorded, and what they answer here.

``golden.json`` states for each model a rule for its input, the first values
of its output, the kernels that it was recorded with, and a tolerance. For
silero-vad it has nothing; there ONNX Runtime itself, called bare in the same
run and handing its state on, is what the session is held against.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.accuracy.common import DATA, Absent, Published, Result
from inference.registry import open_session

NAME: Final = "recorded"
SEED: Final = 7
SILERO: Final = "silero-vad-16k/silero_vad_16k_op15.onnx"
STEPS: Final = 20
"""Chunks of sound that silero hears, each with the state of the one before."""
MOST: Final = 1e-4
"""Between two runs of one runtime."""
METRIC: Final = "share of the tolerance left"
Array = NDArray[Any]


def entry_input(entry: dict[str, Any]) -> Array:
    """Return the input that the file's rule gives."""
    random = np.random.default_rng(SEED)
    shape, dtype = entry["input_shape"], entry["input_dtype"]
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    low, high = (-100, 100) if dtype == "int8" else (0, 256)
    return random.integers(low, high, shape).astype(dtype)


def tolerance(text: str, want: Array) -> Array:
    """Return what each value may differ by."""
    if steps := re.match(r"(\d+) steps", text):
        return np.full(want.shape, float(steps[1]))
    found = re.fullmatch(r"rtol ([\d.e-]+), atol ([\d.e-]+)", text)
    assert found is not None
    allowed: Array = float(found[2]) + float(found[1]) * np.abs(want)
    return allowed


def results(scratch: Path) -> Iterator[Result]:  # noqa: ARG001 - every data set is called alike
    """Yield a line for each model: 1 is equal, 0 is at the edge of the tolerance, less is out of it."""
    file = DATA / "models" / "golden.json"
    if not file.is_file():
        raise Absent(f"no recorded outputs at {file}; set PITHEAD_SHARED_DATA")
    for name, entry in json.loads(file.read_text(encoding="utf-8")).items():
        path = DATA / "models" / name
        kind: Literal["onnx", "tflite"] = "onnx" if path.suffix == ".onnx" else "tflite"
        session = open_session(path, kind, "cpu" if kind == "onnx" else "xnnpack")
        output = session.run({session.inputs[0].name: entry_input(entry)})[session.outputs[0].name]
        session.close()
        want = np.array(entry["output_first8"])
        away = np.abs(output.ravel()[: len(want)].astype(np.float64) - want)
        yield Result(
            data="recorded outputs",
            model=name,
            variant=kind,
            metric=METRIC,
            ours=1.0 - float((away / tolerance(entry["tolerance"], want)).max()),
            published=Published(1.0, f"{entry['recorded_with']}; {entry['tolerance']}"),
            target=0.0,
        )
    yield from _silero()


def _silero() -> Iterator[Result]:
    path = DATA / "models" / SILERO
    line = partial(Result, data="recorded outputs", model=SILERO, variant="onnx", metric=METRIC, target=0.0)
    ours = open_session(path, "onnx", "cpu")
    bare = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(SEED)
    state = theirs = np.zeros((2, 1, 128), np.float32)
    worst, rate = 0.0, np.array(16000, np.int64)
    for _ in range(STEPS):
        sound = random.standard_normal((1, 576)).astype(np.float32)
        answer = ours.run({"input": sound, "state": state, "sr": rate})
        output, theirs = bare.run(["output", "stateN"], {"input": sound, "state": theirs, "sr": rate})
        state = answer["stateN"]
        worst = max(
            worst, float(np.abs(answer["output"] - output).max()), float(np.abs(state - theirs).max())
        )
    yield line(
        ours=1.0 - worst / MOST,
        published=Published(
            1.0, f"nothing is recorded: bare ONNX Runtime in this run, {STEPS} steps; {MOST:g}"
        ),
    )
