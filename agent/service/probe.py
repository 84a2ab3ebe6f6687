"""``pithead-agent probe``: what each variant costs on each accelerator of this device, and the choice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, Manifest
from contract.package import MAX_MANIFEST, parse_manifest
from inference import probing, registry
from inference.accelerators import CustomTable, Format, Resources

LIMITS: Final = probing.Limits(wall_s=60.0)
COLUMNS: Final = ("variant", "accelerator", "nodes", "p50", "p99", "memory", "energy", "golden", "")
_SECOND_US: Final = 1e6
_MILLISECOND_US: Final = 1e3


class Found(Struct, frozen=True):
    """The outcome."""

    model: str
    reports: tuple[probing.ProbeReport, ...]
    choice: probing.Choice | None = None
    code: str | None = None
    """Why nothing was chosen."""
    detail: str = ""
    golden: bool = True
    """False for a bare file, which is compared with the runtime's own kernels."""


def examine(model: Path, custom: CustomTable, resources: Resources, *, require_sandbox: bool) -> Found:
    """Probe a package's directory or a model file on all that this device has.

    Raises ``package.*`` for what is neither, and ``inference.runtime_missing``.
    """
    if model.is_dir() or model.name == MANIFEST_NAME:
        directory = model if model.is_dir() else model.parent
        manifest = _manifest(directory)
        files = {ref.path: directory / ref.path for ref in manifest.files()}
        reports = probing.probe(
            manifest,
            files,
            limits=LIMITS,
            require_sandbox=require_sandbox,
            custom=custom,
            resources=resources,
        )
        return _chosen(f"{manifest.name} {manifest.version}", reports, manifest)
    reports = probing.probe_file(
        model,
        _format(model),
        limits=LIMITS,
        require_sandbox=require_sandbox,
        custom=custom,
        resources=resources,
    )
    return _chosen(model.name, reports, None)


def _chosen(name: str, reports: Sequence[probing.ProbeReport], manifest: Manifest | None) -> Found:
    golden = manifest is not None
    try:
        choice = probing.choose(reports, manifest)
    except PitheadError as error:
        return Found(name, tuple(reports), None, error.code, error.detail, golden)
    return Found(name, tuple(reports), choice, golden=golden)


def _manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            return parse_manifest(file.read(MAX_MANIFEST + 1))
    except OSError as error:
        raise PitheadError("package.file_missing", f"{path}: {error.strerror}") from error


def _format(model: Path) -> Format:
    formats: dict[str, Format] = {".onnx": "onnx", ".tflite": "tflite"}
    found = formats.get(model.suffix)
    if found is None or not model.is_file():
        raise PitheadError(
            "package.file_missing", f"{model} is neither a package nor a file {' or '.join(formats)}"
        )
    if found not in registry.formats():
        needed = " or ".join(registry.RUNTIMES[found].packages[:2])
        raise PitheadError("inference.runtime_missing", f"install {needed}")
    return found


def render(found: Found) -> str:
    """Return the table and what was chosen, for people."""
    chosen = found.choice
    rows: list[tuple[str, ...]] = [COLUMNS]
    for r in found.reports:
        mark = chosen is not None and (r.variant, r.accelerator) == (chosen.variant, chosen.accelerator)
        rows.append(_row(r, golden=found.golden, chosen=mark))
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.rjust(w) if 2 <= i <= 6 else cell.ljust(w)  # noqa: PLR2004 - the numbers' columns
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for r in found.reports:
        if not r.passed:
            lines.append(f"{r.variant} on {r.accelerator}: {r.code}: {r.detail}")
        elif r.placement.nodes_on(r.accelerator) < r.placement.total:
            rest = ", ".join(f"{n} {op}" for op, n in r.placement.nodes.get("cpu", {}).items())
            lines.append(f"{r.variant} on {r.accelerator}: left to the CPU: {rest}")
    if chosen is not None:
        lines.append(f"{found.model}: {chosen.variant} on {chosen.accelerator}: {chosen.why}")
    else:
        lines.append(f"{found.model}: nothing was chosen: {found.code}")
    return "\n".join(lines) + "\n"


def _row(report: probing.ProbeReport, *, golden: bool, chosen: bool) -> tuple[str, ...]:
    name = (report.variant, report.accelerator)
    if not report.latency_p50_us:
        return (*name, "-", "-", "-", "-", "-", "failed", "")
    placed = report.placement
    if golden:
        agreed = f"{report.vectors} of {report.vectors}"
    else:
        agreed = f"off by {max(report.worst.values(), default=0.0):.3g} at most"
    return (
        *name,
        f"{placed.nodes_on(report.accelerator)}/{placed.total}",
        _time(report.latency_p50_us),
        _time(report.latency_p99_us),
        f"{report.memory_mb:.1f} MB",
        "unavailable" if report.energy_uj is None else f"{report.energy_uj:.3g} uJ",
        agreed if report.passed else "over budget",
        "chosen" if chosen else "",
    )


def _time(us: float) -> str:
    if us >= _SECOND_US:
        return f"{us / _SECOND_US:.2f} s"
    return f"{us / _MILLISECOND_US:.2f} ms" if us >= _MILLISECOND_US else f"{us:.1f} us"


def as_json(found: Found) -> str:
    """Return the outcome for programs."""
    return msgspec.json.format(msgspec.json.encode(found)).decode() + "\n"
