"""Read, check and write a model package: a directory with ``manifest.json`` and the files that it names."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, FileRef, Manifest
from contract.package import MAX_MANIFEST, parse_manifest
from inference.probing import DEFAULT_LIMITS, Limits, ProbeReport, probe
from inference.registry import read_file


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

    A new directory appears whole or not at all. In one that is there the
    manifest goes first and comes last, so that a directory with one is complete.
    Raises ``config.invalid`` where it cannot be written.
    """
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    parse_manifest(text)  # as everybody will who reads it
    try:
        if directory.exists():
            (directory / MANIFEST_NAME).unlink(missing_ok=True)
            for stale in _stale(directory, contents):
                stale.unlink()
            _fill(directory, text, contents)
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
        try:
            _fill(part, text, contents)
            part.rename(directory)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise PitheadError("config.invalid", f"{directory}: {error.strerror}") from error


def _fill(directory: Path, text: bytes, contents: Mapping[str, bytes]) -> None:
    directory.mkdir(exist_ok=True)
    for path, content in contents.items():
        file = directory / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (directory / MANIFEST_NAME).write_bytes(text)


def vacant(directory: Path) -> Path:
    """Return ``directory``; raises ``config.invalid`` where a package is in it: a version is made once."""
    if (directory / MANIFEST_NAME).exists():
        raise PitheadError(
            "config.invalid", f"{directory} holds a package already: give another version, or remove it"
        )
    return directory


def _stale(directory: Path, contents: Mapping[str, bytes]) -> Iterator[Path]:
    """Yield the model and golden files of an earlier build that this one does not write."""
    for path in sorted(directory.rglob("*")):
        if path.suffix in {".tflite", ".onnx", ".npz"} and str(path.relative_to(directory)) not in contents:
            yield path
