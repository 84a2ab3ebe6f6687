"""What is to be optimised: a variant of a package, or a file of its own."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from contract.errors import PitheadError
from contract.manifest import Budget, Manifest, Pipeline, Provenance, Variant
from models import package
from models.optimise.worker import Model
from models.package import reference_to
from models.wrap import FORMATS, variant_of


@dataclass(frozen=True)
class Source:
    """The original, and the manifest that its variants will stand in."""

    model: Model
    variant: Variant
    manifest: Manifest
    """Of the version to be written, with the variants of the original only."""
    contents: dict[str, bytes]
    """Every file that the manifest names."""
    what: str
    """For people."""

    @property
    def pipeline(self) -> Pipeline | None:
        """What makes windows of rows; None for a model without a lane."""
        return self.manifest.pipeline


def of_package(
    directory: Path, *, wanted: str | None, version: str | None, release_counter: int | None
) -> Source:
    """Return the float variant of a package that ``wanted`` names, or the most preferred one.

    Raises ``package.*``, and ``config.invalid`` where there is no such variant.
    """
    manifest = package.read_manifest(directory)
    files = package.check_files(directory, manifest)
    floats = sorted(
        (v for v in manifest.variants if v.quantisation == "float32"), key=lambda v: -v.preference
    )
    variant = next((v for v in floats if wanted in {None, v.name}), None)
    if variant is None:
        names = ", ".join(v.name for v in floats) or "none"
        raise PitheadError(
            "config.invalid", f"{manifest.name} has no float32 variant {wanted or ''!r}; there are: {names}"
        )
    new = msgspec.structs.replace(
        manifest,
        version=version or _next(manifest.version),
        release_counter=release_counter or manifest.release_counter + 1,
    )
    if manifest.pipeline is not None and manifest.pipeline.graph is not None:
        raise PitheadError(
            "config.invalid", f"{manifest.name} has a graph for its features: optimise its model file alone"
        )
    model = Model(files[variant.file.path], variant.file, variant.format)
    contents = {path: file.read_bytes() for path, file in files.items()}
    return Source(
        model, variant, new, contents, f"{manifest.name} {manifest.version}, variant {variant.name}"
    )


def of_file(
    file: Path,
    *,
    name: str,
    version: str,
    release_counter: int,
    licence: str,
    source: str,
    require_sandbox: bool,
) -> Source:
    """Return a model file, packaged as ``models wrap`` does. Raises as that does."""
    if file.suffix not in FORMATS:
        raise PitheadError("inference.runtime_missing", f"{file.name}: the suffix is none of {list(FORMATS)}")
    variant, contents = variant_of(file, 0, set(), None, require_sandbox=require_sandbox)
    if any(not t.datatype.startswith("FP") for t in (*variant.inputs, *variant.outputs)):
        datatypes = sorted({t.datatype for t in (*variant.inputs, *variant.outputs)})
        raise PitheadError("config.invalid", f"{file.name} is not a float model: its tensors are {datatypes}")
    manifest = Manifest(
        format=1,
        name=name,
        version=version,
        release_counter=release_counter,
        summary=f"{name}, from {file.name}",
        licence=licence,
        variants=(variant,),
        provenance=Provenance(source=source, data="not known here"),
        budget=Budget(),
    )
    model = Model(file, reference_to(file.name, contents[variant.file.path]), FORMATS[file.suffix])
    return Source(model, variant, manifest, contents, file.name)


def _next(version: str) -> str:
    major, minor, _ = version.split(".", maxsplit=2)
    return f"{major}.{int(minor) + 1}.0"
