"""Make a variant of a model that nobody knows, or ask it, in a confined process.

``make`` and ``ask`` are the parent's side; ``python -m models.optimise.worker`` the child's. What converts
opens the model too, so it does so here.
"""

import encodings.cp437
import importlib
import os
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import FileRef, TensorSpec
from inference import registry
from inference.accelerators import Format
from inference.probing import Limits
from inference.sandbox import confine
from inference.screening import SCREENS
from models.conversation import answer_one, converse
from models.optimise.feeding import answers, calls
from models.optimise.techniques import Step

LIMITS: Final = Limits(wall_s=600.0, cpu_s=500, memory_mb=4096)
MAX_ANSWER: Final = 128 * 1024 * 1024
CALIBRATION_BATCH: Final = 16
"""Windows whose activations are held at once."""
PRELOADED: Final = (encodings.cp437,)
"""What the standard library would import later, when no file can be opened any more."""
_MB: Final = 1024 * 1024


class Request(Struct, frozen=True):
    """What the parent asks of the child: a variant by ``steps``, or answers where there are none."""

    model: str
    file: FileRef
    format: Format
    accelerator: str
    steps: tuple[Step, ...]
    rows: str
    """An .npz of windows by input tensor; may be empty for steps that need none."""
    limits: Limits
    parent: int
    require_sandbox: bool


class Made(Struct, frozen=True, tag="made"):
    """A variant."""

    content: bytes
    steps: dict[str, float]
    """By output: what one step of its quantisation is worth, where its datatype does not say so."""


class Asked(Struct, frozen=True, tag="asked"):
    """What a model is, and what it gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    answers: bytes
    """An .npz by output tensor."""


class Model(Struct, frozen=True):
    """A model file on disk."""

    path: Path
    file: FileRef
    format: Format


def make(model: Model, steps: tuple[Step, ...], rows: Path | None, *, require_sandbox: bool = False) -> Made:
    """Return what ``steps`` make of a model; ``rows`` are what it is calibrated on.

    Raises ``optimise.*``, ``package.unsafe_model``, ``inference.*`` and ``probe.*``.
    """
    said = _converse(model, "cpu", steps, rows, require_sandbox=require_sandbox)
    assert isinstance(said, Made)
    return said


def ask(
    model: Model, rows: Path | None, accelerator: str = "cpu", *, require_sandbox: bool = False
) -> tuple[Asked, dict[str, NDArray[Any]]]:
    """Return a model's tensors, and what it gives for ``rows``; nothing without them. Raises as ``make``."""
    said = _converse(model, accelerator, (), rows, require_sandbox=require_sandbox)
    assert isinstance(said, Asked)
    with np.load(BytesIO(said.answers), allow_pickle=False) as arrays:
        return said, {name: arrays[name] for name in arrays.files}


def _converse(
    model: Model, accelerator: str, steps: tuple[Step, ...], rows: Path | None, *, require_sandbox: bool
) -> Made | Asked:
    request = Request(
        str(model.path.absolute()),
        model.file,
        model.format,
        accelerator,
        steps,
        "" if rows is None else str(rows.absolute()),
        LIMITS,
        os.getpid(),
        require_sandbox=require_sandbox,
    )
    said: Made | Asked = converse(
        "models.optimise.worker", request, model.path.name, Made | Asked, MAX_ANSWER
    )
    return said


def main() -> None:
    """Answer one request."""
    answer_one(Request, _answer)


def _answer(request: Request) -> Made | Asked:
    opener = registry.load_runtime(request.format, warm_up=True)
    passes = importlib.import_module(f"models.optimise.{request.format}_passes") if request.steps else None
    if request.format == "tflite" and any(step.name == "int8" for step in request.steps):
        assert passes is not None
        passes.load_quantizer()
    content = registry.read_file(Path(request.model), request.file)
    given = registry.read_file(Path(request.rows)) if request.rows else b""
    np.savez(BytesIO(), allow_pickle=False, rehearsal=np.zeros(1))  # imports what it needs, while it can
    confine(
        memory_bytes=request.limits.memory_mb * _MB,
        cpu_s=request.limits.cpu_s,
        parent=request.parent,
        require=request.require_sandbox,
    )
    SCREENS[request.format](content)
    rows = _rows(given)
    if passes is None:
        return _asked(opener(content, request.accelerator, 1), rows)
    passes.check_float(content)
    scales: dict[str, float] = {}
    for step in request.steps:
        try:
            content, scales = _changed(passes, opener, content, step, rows)
        except PitheadError:
            raise
        # Whatever these tools meet in a foreign model, it is said in one line.
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            detail = f"{step.name}: {type(error).__name__}: {first}"
            raise PitheadError("optimise.failed", detail) from error
    SCREENS[request.format](content)
    return Made(content, scales)


def _asked(session: Any, rows: Mapping[str, NDArray[Any]]) -> Asked:
    file = BytesIO()
    found = answers(session, rows) if rows else {}
    np.savez(file, allow_pickle=False, **found)
    return Asked(session.inputs, session.outputs, file.getvalue())


def _changed(
    passes: Any, opener: Any, content: bytes, step: Step, rows: Mapping[str, NDArray[Any]]
) -> tuple[bytes, dict[str, float]]:
    if step.name != "int8":
        arguments = () if step.value is None else (step.value,)
        return getattr(passes, step.name)(content, *arguments), {}
    first = opener(content, "cpu", 1)
    if passes.__name__.endswith("tflite_passes"):
        # One window in each: its interpreter keeps all tensors between the layers.
        return passes.int8(content, list(calls(first.inputs, rows, most=1))), {}

    def run(watched: bytes) -> Iterator[Mapping[str, NDArray[Any]]]:
        session = opener(watched, "cpu", 1)
        for feed in calls(session.inputs, rows, most=CALIBRATION_BATCH):
            yield {**feed, **session.run(feed)}

    made: tuple[bytes, dict[str, float]] = passes.int8(content, run)
    return made


def _rows(content: bytes) -> dict[str, NDArray[Any]]:
    if not content:
        return {}
    with np.load(BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


if __name__ == "__main__":
    main()
