"""Look at a model file that nobody knows, and record what it answers, in a confined process.

``recorded`` is the parent's side; ``python -m models.record`` the child's.
"""

import encodings.cp437
import os
from io import BytesIO
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np
from msgspec import Struct

from contract.errors import PitheadError
from contract.manifest import FileRef, TensorSpec, Tolerance
from inference import registry
from inference.arithmetic import DTYPES
from inference.probing import Limits
from inference.sandbox import confine
from inference.screening import SCREENS
from inference.session import Array, Session
from models import golden
from models.conversation import answer_one, converse

VECTORS: Final = 4
LIMITS: Final = Limits(wall_s=120.0, cpu_s=100, memory_mb=4096)
MAX_ANSWER: Final = 64 * 1024 * 1024
PRELOADED: Final = (encodings.cp437,)
"""What the standard library would import later, when no file can be opened any more."""
_SEED: Final = 7
_MB: Final = 1024 * 1024


class Request(Struct, frozen=True):
    """What the parent asks of the child."""

    model: str
    file: FileRef
    format: Literal["onnx", "tflite"]
    inputs: str | None
    limits: Limits
    parent: int
    require_sandbox: bool


class Recording(Struct, frozen=True, tag="recording"):
    """What a variant's part of a manifest needs of a model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    accelerators: tuple[str, ...]
    """Those without a device file that really run it; golden vectors are the first one's."""
    golden: bytes
    vectors: int
    tolerance: dict[str, Tolerance]


def recorded(
    model: Path,
    file: FileRef,
    model_format: Literal["onnx", "tflite"],
    inputs: Path | None = None,
    *,
    limits: Limits = LIMITS,
    require_sandbox: bool = False,
) -> Recording:
    """Return what the model at ``model`` is, and what it answers on ``inputs`` or on random numbers.

    Raises as ``open_session`` does, ``inference.bad_input`` for inputs that
    do not fit, and ``probe.*`` for a model that takes its process with it.
    """
    path = None if inputs is None else str(inputs.absolute())
    request = Request(
        str(model.absolute()), file, model_format, path, limits, os.getpid(), require_sandbox=require_sandbox
    )
    said: Recording = converse("models.record", request, model.name, Recording, MAX_ANSWER)
    return said


def main() -> None:
    """Answer one request."""
    answer_one(Request, _record)


def _record(request: Request) -> Recording:
    opener = registry.load_runtime(request.format, warm_up=True)
    model = registry.read_file(Path(request.model), request.file)
    given = None if request.inputs is None else registry.read_file(Path(request.inputs))
    np.savez(BytesIO(), allow_pickle=False, rehearsal=np.zeros(1))  # imports what it needs, while it can
    confine(
        memory_bytes=request.limits.memory_mb * _MB,
        cpu_s=request.limits.cpu_s,
        parent=request.parent,
        require=request.require_sandbox,
    )
    SCREENS[request.format](model)
    accelerators = registry.plain(request.format)
    opened = [opener(model, name, 1) for name in accelerators]
    # A delegate that takes no node is no accelerator of this model.
    sessions = [s for s, name in zip(opened, accelerators, strict=True) if s.accelerator == name]
    first = sessions[0]
    feeds = _random_feeds(first) if given is None else _feeds(first, given, Path(request.inputs or "").name)
    return Recording(
        inputs=first.inputs,
        outputs=first.outputs,
        accelerators=tuple(s.accelerator for s in sessions),
        golden=golden.record(first, feeds),
        vectors=len(feeds),
        tolerance=golden.tolerances(first, golden.spread(sessions, feeds)),
    )


def _feeds(session: Session, content: bytes, name: str) -> list[dict[str, Array]]:
    try:
        with np.load(BytesIO(content), allow_pickle=False) as arrays:
            given = {t.name: cast("Array", arrays[t.name]) for t in session.inputs}
        count = min(len(array) for array in given.values())
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise PitheadError("inference.bad_input", f"{name}: {error}") from error
    if not count:
        raise PitheadError("inference.bad_input", f"{name} has no vectors")
    return [{key: np.asarray(array[i]) for key, array in given.items()} for i in range(count)]


def _random_feeds(session: Session) -> list[dict[str, Array]]:
    random = np.random.default_rng(_SEED)
    return [{t.name: _random(random, t) for t in session.inputs} for _ in range(VECTORS)]


def _random(random: np.random.Generator, tensor: TensorSpec) -> Array:
    shape = tuple(max(1, d) for d in tensor.shape)
    dtype = np.dtype(DTYPES[tensor.datatype])
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    low, high = (-100, 100) if dtype.kind == "i" else (0, 2 if dtype.kind == "b" else 200)
    return random.integers(low, high, shape).astype(dtype)


if __name__ == "__main__":
    main()
