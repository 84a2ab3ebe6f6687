"""Make a package of model files that come from elsewhere, unchanged.

Nobody knows these files, so they are never opened here: ``models.record``
does that, in a confined process of its own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from contract.errors import PitheadError
from contract.manifest import Budget, Golden, Manifest, Provenance, Variant
from inference import registry
from models import package
from models.package import reference_to
from models.record import recorded

FORMATS: Final[Mapping[str, Literal["onnx", "tflite"]]] = {".onnx": "onnx", ".tflite": "tflite"}


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
    require_sandbox: bool = False,
) -> Manifest:
    """Write a package with one variant for each file; the first file is preferred.

    Golden vectors are what the model answers here and now, on the arrays of
    ``inputs`` (an ``.npz``: one array for each tensor, a leading axis of
    vectors) or on random numbers; the tolerance is what this machine's
    kernels differ by. Raises as ``recorded`` does.
    """
    contents: dict[str, bytes] = {}
    variants: list[Variant] = []
    for i, file in enumerate(files):
        if file.suffix not in FORMATS:
            raise PitheadError(
                "inference.runtime_missing", f"{file.name}: the suffix is none of {list(FORMATS)}"
            )
        taken = {v.name for v in variants}
        variant, parts = variant_of(file, len(files) - i, taken, inputs, require_sandbox=require_sandbox)
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


def variant_of(
    file: Path, preference: int, taken: set[str], inputs: Path | None, *, require_sandbox: bool
) -> tuple[Variant, dict[str, bytes]]:
    """Return the variant that a file becomes, under a name that is not ``taken``, and its files.

    Raises as ``recorded`` does.
    """
    content = registry.read_file(file)
    model_format = FORMATS[file.suffix]
    seen = recorded(
        file, reference_to(file.name, content), model_format, inputs, require_sandbox=require_sandbox
    )
    integers = any(t.datatype in {"INT8", "UINT8"} for t in seen.inputs)
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
        inputs=seen.inputs,
        outputs=seen.outputs,
        golden=Golden(reference_to(golden_path, seen.golden), seen.vectors, seen.tolerance),
        platform=registry.RUNTIMES[model_format].platform,
        accelerators=seen.accelerators,
        preference=preference,
    )
    return variant, {model_path: content, golden_path: seen.golden}
