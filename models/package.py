"""Read, check and write a model package: a directory with ``manifest.json`` and the files that it names."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NoReturn

import msgspec
from msgspec import Struct

from contract.codec import decode
from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, FileRef, Fit, Manifest, Pipeline, Variant
from inference.probing import DEFAULT_LIMITS, Limits, ProbeReport, probe
from inference.registry import read_file

MAX_MANIFEST: Final = 1024 * 1024


class Validation(Struct, frozen=True, omit_defaults=True):
    """The answer of ``models validate``; ``code`` is None when the package may be published."""

    valid: bool
    code: str | None = None
    detail: str = ""
    name: str = ""
    version: str = ""
    release_counter: int = 0
    probes: tuple[ProbeReport, ...] = ()
    untried: tuple[str, ...] = ()
    """Variants that no accelerator of this machine can run."""


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest; raises ``package.file_missing`` or ``package.manifest_invalid`` with the path."""
    path = directory / MANIFEST_NAME
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_MANIFEST else b""
    except OSError as error:
        raise PitheadError("package.file_missing", f"{MANIFEST_NAME}: {error.strerror}") from error
    if size > MAX_MANIFEST:
        raise PitheadError("package.too_large", f"{MANIFEST_NAME}: {size} bytes, limit {MAX_MANIFEST}")
    return parse_manifest(content)


def parse_manifest(content: bytes) -> Manifest:
    """Return a manifest that is consistent in itself; raises ``package.manifest_invalid`` with the path."""
    try:
        manifest = decode(content, Manifest)
    except PitheadError as error:
        raise PitheadError("package.manifest_invalid", error.detail) from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise ``package.manifest_invalid``, naming the field, where the manifest contradicts itself."""
    hashes: dict[str, FileRef] = {}
    names: set[str] = set()
    for i, variant in enumerate(manifest.variants):
        path = f"$.variants[{i}]"
        if variant.name in names:
            _refuse(f"{path}.name", f"{variant.name!r} stands twice")
        names.add(variant.name)
        for field, ref in (("file", variant.file), ("golden.file", variant.golden.file)):
            if ref.path == MANIFEST_NAME:
                _refuse(f"{path}.{field}.path", "the manifest cannot name itself")
            if hashes.setdefault(ref.path, ref) != ref:
                _refuse(f"{path}.{field}", f"{ref.path!r} stands twice with different contents")
        _check_tensors(path, variant)
    if (manifest.pipeline is None) != (manifest.score is None):
        _refuse("$.score", "pipeline and score belong together")
    if manifest.score is not None and not math.isfinite(manifest.score.threshold):
        _refuse("$.score.threshold", "must be finite")
    if manifest.pipeline is not None:
        _check_pipeline(manifest, manifest.pipeline)


def _check_tensors(path: str, variant: Variant) -> None:
    for which, tensors in (("inputs", variant.inputs), ("outputs", variant.outputs)):
        if len({t.name for t in tensors}) != len(tensors):
            _refuse(f"{path}.{which}", "a name stands twice")
        for i, tensor in enumerate(tensors):
            if any(d < -1 for d in tensor.shape):
                _refuse(f"{path}.{which}[{i}].shape", f"{list(tensor.shape)} holds a length below -1")
            if tensor.scale is not None and not (math.isfinite(tensor.scale) and tensor.scale > 0):
                _refuse(f"{path}.{which}[{i}].scale", "must be above 0")
    unknown = sorted(set(variant.golden.tolerance) - {t.name for t in variant.outputs})
    if unknown:
        _refuse(f"{path}.golden.tolerance", f"{unknown[0]!r} is no output of the model")
    for i, accelerator in enumerate(variant.accelerators):
        if not accelerator:
            _refuse(f"{path}.accelerators[{i}]", "is empty")
    if not variant.accelerators:
        _refuse(f"{path}.accelerators", "is empty")


def _check_pipeline(manifest: Manifest, pipeline: Pipeline) -> None:
    width = len(pipeline.channels)
    names = [c.name for c in pipeline.channels]
    if len(set(names)) != width:
        _refuse("$.pipeline.channels", "a name stands twice")
    _check_normalisation(pipeline, width)
    for i, variant in enumerate(manifest.variants):
        if len(variant.inputs) != 1:
            _refuse(f"$.variants[{i}].inputs", "a model with a pipeline has one input")
        shape = variant.inputs[0].shape
        size = math.prod(d for d in shape if d > 0)
        if size != pipeline.window * width:
            _refuse(
                f"$.variants[{i}].inputs[0].shape",
                f"{list(shape)} holds {size} values, window x channels are {pipeline.window * width}",
            )
    if pipeline.fit is not None:
        _check_fit(pipeline.fit, width)
    if manifest.reference is not None:
        unknown = sorted(set(manifest.reference.channels) - set(names))
        if unknown:
            _refuse("$.reference.channels", f"{unknown[0]!r} is no channel of the pipeline")


def _check_normalisation(pipeline: Pipeline, width: int) -> None:
    for field, values in (("mean", pipeline.mean), ("scale", pipeline.scale)):
        if len(values) != width:
            _refuse(f"$.pipeline.{field}", f"{len(values)} values for {width} channels")
        for i, value in enumerate(values):
            if not math.isfinite(value) or (field == "scale" and value <= 0):
                _refuse(f"$.pipeline.{field}[{i}]", f"{value} is not allowed")
    if pipeline.clip is not None and not pipeline.clip > 0:
        _refuse("$.pipeline.clip", "must be above 0")


def _check_fit(fit: Fit, width: int) -> None:
    for field, ranges in (("mean_range", fit.mean_range), ("scale_range", fit.scale_range)):
        if len(ranges) != width:
            _refuse(f"$.pipeline.fit.{field}", f"{len(ranges)} ranges for {width} channels")
        for i, (low, high) in enumerate(ranges):
            if not low <= high or (field == "scale_range" and low <= 0):
                _refuse(f"$.pipeline.fit.{field}[{i}]", f"{low} to {high} is no range")
    low, high = fit.threshold_range
    if not low <= high:
        _refuse("$.pipeline.fit.threshold_range", f"{low} to {high} is no range")


def _refuse(path: str, why: str) -> NoReturn:
    raise PitheadError("package.manifest_invalid", f"{why} - at `{path}`", path=path)


def check_files(directory: Path, manifest: Manifest) -> dict[str, Path]:
    """Return path in the package -> path on disk, after length and hash of each file were checked.

    Raises ``package.file_missing`` and ``package.file_mismatch``; a link out of the directory is missing.
    """
    root = directory.resolve()
    files = {}
    for ref in manifest.files():
        path = (root / ref.path).resolve()
        if not path.is_relative_to(root):
            raise PitheadError("package.file_missing", f"{ref.path} leads out of the package", path=ref.path)
        read_file(path, ref)
        files[ref.path] = path
    return files


def validate(
    directory: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    require_sandbox: bool = False,
) -> Validation:
    """Check a package as a control plane does before it admits one: manifest, files, probes."""
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(directory)
        files = check_files(directory, manifest)
    except PitheadError as error:
        return _validation(manifest, (), error.code, error.detail)
    reports = tuple(probe(manifest, files, limits=limits, require_sandbox=require_sandbox, any_arch=True))
    for report in reports:
        if not report.passed:
            where = f"variant {report.variant!r} on {report.accelerator!r}: {report.detail}"
            return _validation(manifest, reports, report.code, where)
    if not reports:
        return _validation(manifest, reports, "probe.no_variant", "no accelerator of this machine fits")
    return _validation(manifest, reports, None, "")


def _validation(
    manifest: Manifest | None, reports: Sequence[ProbeReport], code: str | None, detail: str
) -> Validation:
    if manifest is None:
        return Validation(valid=False, code=code, detail=detail)
    tried = {r.variant for r in reports}
    return Validation(
        valid=code is None,
        code=code,
        detail=detail,
        name=manifest.name,
        version=manifest.version,
        release_counter=manifest.release_counter,
        probes=tuple(reports),
        untried=tuple(v.name for v in manifest.variants if v.name not in tried),
    )


def reference_to(path: str, content: bytes) -> FileRef:
    """Return the ``FileRef`` of a file's content."""
    return FileRef(path, hashlib.sha256(content).hexdigest(), len(content))


def write(directory: Path, manifest: Manifest, contents: Mapping[str, bytes]) -> None:
    """Write a package, replacing what is there; raises when it is not consistent.

    The manifest comes last, so that a directory with one is complete.
    """
    check_manifest(manifest)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    for stale in _stale(directory, contents):
        stale.unlink()
    for path, content in contents.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (directory / MANIFEST_NAME).write_bytes(text + b"\n")


def _stale(directory: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield the model and golden files of an earlier build that this one does not write."""
    for path in sorted(directory.rglob("*")):
        if path.suffix in {".tflite", ".onnx", ".npz"} and str(path.relative_to(directory)) not in contents:
            yield path
