"""Make variants, judge them against the original, measure all of them alike, keep those within tolerance."""

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import Golden, Manifest, Provenance, Score, TensorSpec, Tolerance, Variant
from inference import registry
from inference.probing import ProbeReport, probe
from models import package
from models.optimise.data import Division
from models.optimise.feeding import Rows, calls
from models.optimise.judge import PREFIX, Loss, Tolerances, compare, excess
from models.optimise.source import Source
from models.optimise.techniques import Technique
from models.optimise.worker import Asked, Model, ask, make
from models.package import reference_to
from models.record import recorded
from models.reference import rounded

GOLDEN_VECTORS: Final = 8
ZSTD_LEVEL: Final = 19
"""A release is compressed once and downloaded often."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Candidate:
    """What became of one technique; the original is one too."""

    name: str
    technique: str
    """What was asked for; empty for the original."""
    explanation: str = ""
    variant: Variant | None = None
    contents: Mapping[str, bytes] | None = None
    bytes: int = 0
    compressed: int = 0
    """Bytes after zstd, as a device downloads it."""
    loss: Loss | None = None
    accelerator: str = ""
    """The fastest of those of this machine without a driver."""
    p50_us: float = 0.0
    p99_us: float = 0.0
    load_ms: float = 0.0
    code: str | None = None
    """Why it is not kept."""
    detail: str = ""

    @property
    def kept(self) -> bool:
        """Whether it may be written."""
        return self.code is None


@dataclass(frozen=True)
class Result:
    """The original first, then every technique in the order asked."""

    candidates: tuple[Candidate, ...]
    tolerances: Tolerances
    division: str
    directory: Path | None
    """Of the new package; None when no variant was kept."""

    @property
    def refused(self) -> tuple[Candidate, ...]:
        """What was not written."""
        return tuple(c for c in self.candidates if not c.kept)


@dataclass(frozen=True)
class Settings:
    """How to judge and measure."""

    tolerances: Tolerances
    score: Score | None = None
    """Instead of the manifest's; for a file of its own the only one."""
    rounds: int = 3
    """Times that every variant is probed, alternating; latencies are medians of them."""
    require_sandbox: bool = False


def optimise(
    source: Source,
    techniques: Sequence[Technique],
    division: Division,
    settings: Settings,
    out: Path,
    progress: Progress = lambda _: None,
) -> Result:
    """Write a package with what is kept to OUT/<name>/<version>.

    What one technique meets is told in its candidate; what the original
    itself meets is raised: ``inference.*``, ``probe.*``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(source, division, settings, Path(scratch))
        progress(f"original {source.variant.name}")
        candidates = [bench.original()]
        for technique in techniques:
            progress(technique.text)
            candidates.append(bench.candidate(technique, {c.name for c in candidates}))
        progress("measuring")
        measured = bench.measured(candidates)
    kept = [c for c in measured[1:] if c.kept]
    directory = None
    if kept:
        manifest = _manifest(source, measured[0], kept, settings.tolerances, division.text)
        directory = out / manifest.name / manifest.version
        contents = dict(source.contents)
        for one in kept:
            contents |= one.contents or {}
        package.write(directory, manifest, contents)
    return Result(tuple(measured), settings.tolerances, division.text, directory)


class _Bench:
    """One original and the data that all its variants are compared on."""

    def __init__(self, source: Source, division: Division, settings: Settings, scratch: Path) -> None:
        self._source, self._settings, self._scratch = source, settings, scratch
        self._division = division
        self._calibration = self._saved("calibration", division.calibration.rows)
        self._evaluation = self._saved("evaluation", division.evaluation.rows)
        self._score = settings.score or source.manifest.score
        # Its inputs are what a reconstruction is compared with.
        first = next(iter(division.evaluation.rows.values()))
        self._x = first.astype(np.float32, copy=False)
        plain = registry.plain(source.model.format)
        self._accelerator = plain[0]
        _, self._want = self._ask(source.model)

    def original(self) -> Candidate:
        """Return the original; its golden vectors are those of its package."""
        variant = self._source.variant
        content = self._source.contents[variant.file.path]
        return _sized(Candidate(variant.name, "", "as it was", variant), content)

    def candidate(self, technique: Technique, taken: set[str]) -> Candidate:
        """Return what a technique makes, and its loss."""
        taken = taken | {v.name for v in self._source.manifest.variants}
        model_format = self._source.model.format
        name = base = f"{technique.slug}-{model_format}"
        number = 2
        while name in taken:
            name, number = f"{base}-{number}", number + 1
        made = Candidate(name, technique.text, technique.explanation)
        try:
            return self._judged(made, technique)
        except PitheadError as error:
            return replace(made, code=error.code, detail=error.detail)

    def _judged(self, made: Candidate, technique: Technique) -> Candidate:
        source, strict = self._source, self._settings.require_sandbox
        rows = self._calibration if technique.calibrates else None
        found = make(source.model, technique.steps, rows, require_sandbox=strict)
        path = f"{made.name}.{source.model.format}"
        file = self._scratch / path
        file.write_bytes(found.content)
        model = Model(file, reference_to(path, found.content), source.model.format)
        asked, got = self._ask(model)
        evaluation = self._division.evaluation
        loss = compare(self._want, got, self._x, self._score, evaluation.label)
        variant, contents = self._variant(made.name, model, asked.inputs, technique, found.steps)
        made = _sized(replace(made, variant=variant, contents=contents, loss=loss), found.content)
        too_much = excess(loss, self._settings.tolerances)
        return replace(made, code="optimise.over_tolerance", detail=too_much) if too_much else made

    def _ask(self, model: Model) -> tuple[Asked, dict[str, NDArray[Any]]]:
        return ask(model, self._evaluation, self._accelerator, require_sandbox=self._settings.require_sandbox)

    def _variant(
        self,
        name: str,
        model: Model,
        tensors: tuple[TensorSpec, ...],
        technique: Technique,
        steps: Mapping[str, float],
    ) -> tuple[Variant, dict[str, bytes]]:
        """Return a variant with golden vectors of windows that it was not calibrated on."""
        strict = self._settings.require_sandbox
        picked = _golden(self._division)
        feeds = list(calls(tensors, picked, most=1))
        stacked = {spec.name: np.stack([feed[spec.name] for feed in feeds]) for spec in tensors}
        inputs = self._saved(f"{name}.golden", stacked)
        seen = recorded(model.path, model.file, model.format, inputs, require_sandbox=strict)
        # Where a float output moves by whole steps, other kernels may be one step away.
        allowed = {
            output: Tolerance(atol=max(t.atol, float(f"{steps.get(output, 0.0):.2g}")), rtol=t.rtol)
            for output, t in seen.tolerance.items()
        }
        content, golden = model.path.read_bytes(), f"{name}.golden.npz"
        last = technique.steps[-1].name
        variant = Variant(
            name=name,
            file=model.file,
            format=model.format,
            quantisation="int8" if last == "int8" else "float16" if last == "fp16" else "float32",
            inputs=seen.inputs,
            outputs=seen.outputs,
            golden=Golden(reference_to(golden, seen.golden), seen.vectors, allowed),
            platform=registry.RUNTIMES[model.format].platform,
            accelerators=seen.accelerators,
        )
        return variant, {model.file.path: content, golden: seen.golden}

    def measured(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return all with their latencies, from the probe that a device uses, in alternating rounds."""
        made = [c for c in candidates if c.variant is not None]
        variants = tuple(c.variant for c in made if c.variant is not None)
        manifest = msgspec.structs.replace(self._source.manifest, variants=variants)
        contents = dict(self._source.contents)
        for one in made:
            contents |= one.contents or {}
        directory = self._scratch / "all"
        package.write(directory, manifest, {ref.path: contents[ref.path] for ref in manifest.files()})
        files = package.check_files(directory, manifest)
        reports: list[ProbeReport] = []
        for _ in range(self._settings.rounds):
            reports += probe(
                manifest,
                files,
                accelerators=registry.plain(self._source.model.format),
                require_sandbox=self._settings.require_sandbox,
                any_arch=True,
            )
        return [_timed(c, [r for r in reports if r.variant == c.name]) for c in candidates]

    def _saved(self, name: str, arrays: Rows) -> Path:
        path = self._scratch / f"{name}.npz"
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        return path


def _golden(division: Division) -> Rows:
    """Return a few windows of the evaluation, spread over it; half of them labelled where some are."""
    data = division.evaluation
    index = np.linspace(0, len(data) - 1, min(GOLDEN_VECTORS, len(data))).astype(np.int64)
    if data.label is not None and data.label.any() and not data.label.all():
        half = GOLDEN_VECTORS // 2
        index = np.concatenate([np.flatnonzero(data.label)[:half], np.flatnonzero(~data.label)[:half]])
    return data.take(index).rows


def _sized(candidate: Candidate, content: bytes) -> Candidate:
    compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(content)
    return replace(candidate, bytes=len(content), compressed=len(compressed))


def _timed(candidate: Candidate, reports: Sequence[ProbeReport]) -> Candidate:
    """Return a candidate with the medians of its fastest accelerator; what failed on one is refused."""
    failed = next((r for r in reports if not r.passed), None)
    if failed is not None:
        if not candidate.technique:
            raise PitheadError(failed.code or "probe.crashed", f"the original: {failed.detail}")
        code, detail = candidate.code or failed.code, candidate.detail or failed.detail
        return replace(candidate, code=code, detail=detail)
    by_accelerator: dict[str, list[ProbeReport]] = {}
    for report in reports:
        by_accelerator.setdefault(report.accelerator, []).append(report)
    if not by_accelerator:
        return candidate
    medians = {
        name: statistics.median(r.latency_p50_us for r in some) for name, some in by_accelerator.items()
    }
    best = min(medians, key=lambda name: medians[name])
    some = by_accelerator[best]
    return replace(
        candidate,
        accelerator=best,
        p50_us=medians[best],
        p99_us=statistics.median(r.latency_p99_us for r in some),
        load_ms=statistics.median(r.load_ms for r in some),
    )


def _manifest(
    source: Source, original: Candidate, kept: Sequence[Candidate], allowed: Tolerances, division: str
) -> Manifest:
    """Return the new version's manifest; faster variants are preferred to the original, others are not."""
    manifest, base = source.manifest, source.variant.preference
    by_speed = [one.name for one in sorted(kept, key=lambda c: -c.p50_us)]
    variants = list(manifest.variants)
    for one in kept:
        assert one.variant is not None
        place = by_speed.index(one.name)
        preference = base + place + 1 if one.p50_us < original.p50_us else base + place - len(kept)
        variants.append(msgspec.structs.replace(one.variant, preference=preference))
    old = manifest.provenance
    metrics: dict[str, float] = dict(old.metrics)
    for one in kept:
        if one.loss is not None:
            found = {**one.loss.measured, "mean_abs": one.loss.mean_abs}
            metrics |= {f"{one.name}.{kind}": rounded(value) for kind, value in found.items()}
    stated: dict[str, Any] = {PREFIX + kind: limit for kind, limit in allowed.limits.items()}
    parameters = {**old.parameters, **stated, "optimised_from": source.what, "optimised_on": division}
    provenance: Provenance = msgspec.structs.replace(old, metrics=metrics, parameters=parameters)
    return msgspec.structs.replace(manifest, variants=tuple(variants), provenance=provenance)
