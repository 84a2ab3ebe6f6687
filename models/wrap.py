"""Make a package of model files that come from elsewhere, unchanged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, cast

import numpy as np

from contract.errors import PitheadError
from contract.manifest import Budget, Golden, Manifest, Provenance, TensorSpec, Variant
from inference import registry
from inference.arithmetic import DTYPES
from inference.session import Array, Session
from models import golden, package
from models.package import reference_to

FORMATS: Final[Mapping[str, Literal["onnx", "tflite"]]] = {".onnx": "onnx", ".tflite": "tflite"}
VECTORS: Final = 4
_SEED: Final = 7


def wrap(
    files: Sequence[Path],
    directory: Path,
    *,
    name: str,
    version: str,
    release_counter: int,
    licence: str,
    source: str,
    inputs: Path | None = None,
) -> Manifest:
    """Write a package with one variant for each file; the first file is preferred.

    Golden vectors are what the model answers here and now, on the arrays of
    ``inputs`` (an ``.npz``: one array for each tensor, a leading axis of
    vectors) or on random numbers; the tolerance is what this machine's
    kernels differ by. Raises as ``open_session`` does, and
    ``inference.bad_input`` for inputs that do not fit.
    """
    contents: dict[str, bytes] = {}
    variants: list[Variant] = []
    for i, file in enumerate(files):
        if file.suffix not in FORMATS:
            raise PitheadError(
                "inference.runtime_missing", f"{file.name}: the suffix is none of {list(FORMATS)}"
            )
        variant, parts = _variant(file, len(files) - i, {v.name for v in variants}, inputs)
        variants.append(variant)
        contents |= parts
    manifest = Manifest(
        format=1,
        name=name,
        version=version,
        release_counter=release_counter,
        summary=f"{name}, packaged unchanged from {', '.join(file.name for file in files)}",
        licence=licence,
        variants=tuple(variants),
        provenance=Provenance(source=source, data="not known here"),
        budget=Budget(),
    )
    package.write(directory, manifest, contents)
    return manifest


def _variant(
    file: Path, preference: int, taken: set[str], inputs: Path | None
) -> tuple[Variant, dict[str, bytes]]:
    content = registry.read_file(file)
    model_format = FORMATS[file.suffix]
    runtime = registry.RUNTIMES[model_format]
    accelerators = tuple(a.name for a in runtime.accelerators if not a.needs)
    opened = [registry.open_session(content, model_format, a) for a in accelerators]
    # A delegate that takes no node is no accelerator of this model.
    sessions = [s for s, a in zip(opened, accelerators, strict=True) if s.accelerator == a]
    first = sessions[0]
    feeds = _feeds(first, inputs)
    vectors = golden.record(first, feeds)
    integers = any(t.datatype in {"INT8", "UINT8"} for t in first.inputs)
    quantisation: Literal["int8", "float32"] = "int8" if integers else "float32"
    name = base = f"{quantisation}-{model_format}"
    number = 2
    while name in taken:
        name, number = f"{base}-{number}", number + 1
    model_path, golden_path = f"{name}{file.suffix}", f"{name}.golden.npz"
    variant = Variant(
        name=name,
        file=reference_to(model_path, content),
        format=model_format,
        quantisation=quantisation,
        inputs=first.inputs,
        outputs=first.outputs,
        golden=Golden(
            reference_to(golden_path, vectors),
            len(feeds),
            golden.tolerances(first, golden.spread(sessions, feeds)),
        ),
        platform=runtime.platform,
        accelerators=tuple(s.accelerator for s in sessions),
        preference=preference,
    )
    return variant, {model_path: content, golden_path: vectors}


def _feeds(session: Session, inputs: Path | None) -> list[dict[str, Array]]:
    if inputs is None:
        random = np.random.default_rng(_SEED)
        return [{t.name: _random(random, t) for t in session.inputs} for _ in range(VECTORS)]
    try:
        with np.load(inputs, allow_pickle=False) as arrays:
            given = {t.name: cast("Array", arrays[t.name]) for t in session.inputs}
    except (OSError, ValueError, KeyError) as error:
        raise PitheadError("inference.bad_input", f"{inputs.name}: {error}") from error
    count = min(len(array) for array in given.values())
    return [{name: np.asarray(array[i]) for name, array in given.items()} for i in range(count)]


def _random(random: np.random.Generator, tensor: TensorSpec) -> Array:
    shape = tuple(max(1, d) for d in tensor.shape)
    dtype = np.dtype(DTYPES[tensor.datatype])
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    low, high = (-100, 100) if dtype.kind == "i" else (0, 2 if dtype.kind == "b" else 200)
    return random.integers(low, high, shape).astype(dtype)
