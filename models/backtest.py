"""What a model would have found in a recording: the recording through the very lane of a device.

The lane is the agent's, which this room does not import; it runs as a child
process (docs/adr/0007-backtest.md). The package's files and golden vectors
are checked first, in the probe's sandbox, as a device does.
"""

import csv
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, Manifest, Variant
from inference.probing import Limits, in_child, probe
from models import package

LANE: Final = "agent.engine.backtest"
QUANTILES: Final = (0.5, 0.9, 0.99, 0.999, 1.0)


class _Answer(msgspec.Struct, frozen=True):
    """What the child says, by its own names."""

    code: str | None
    detail: str
    threshold: float
    rows: int
    missing: int
    calibrated_on: int


@dataclass(frozen=True)
class Backtest:
    """The windows of a recording, in its order."""

    row: NDArray[np.int64]
    """Number of each window's last row in the file, from 0."""
    score: NDArray[np.float64]
    """NaN where the model gave none."""
    alarm: NDArray[np.bool_]
    label: NDArray[np.bool_] | None
    """Whether a row of the window is labelled."""
    variant: str
    accelerator: str
    threshold: float
    rows: int
    missing: int
    calibrated_on: int


def backtest(
    directory: Path,
    recording: Path,
    *,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    variant: str | None = None,
    accelerator: str | None = None,
    timeout_s: float = 3600.0,
) -> Backtest:
    """Return what the model of a package finds in a file.

    Where the manifest asks for a fit, the recording's first windows are what
    the device calibrates on; they are not scored. Raises ``package.*``,
    ``probe.*`` and ``inference.*`` for the model, ``source.failed`` and
    ``config.invalid`` for the recording.
    """
    manifest = package.read_manifest(directory)
    files = package.check_files(directory, manifest)
    chosen = _variant(manifest, variant)
    used = accelerator or chosen.accelerators[0]
    _probe(manifest, files, chosen, used)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.npz"
        spec = {
            "lane": "backtest",
            "model_name": manifest.name,
            "version": manifest.version,
            "digest": hashlib.sha256((directory / MANIFEST_NAME).read_bytes()).hexdigest(),
            "manifest": str((directory / MANIFEST_NAME).absolute()),
            "files": {path: str(file) for path, file in files.items()},
            "variant": chosen.name,
            "accelerator": used,
        }
        request = {
            "spec": spec,
            "path": str(recording.absolute()),
            "columns": None if columns is None else list(columns),
            "label": label,
            "rate_hz": None if manifest.pipeline is None else manifest.pipeline.sample_rate_hz,
            "out": str(out),
        }
        answer = msgspec.msgpack.decode(
            in_child(LANE, msgspec.msgpack.encode(request), Limits(wall_s=timeout_s)), type=_Answer
        )
        if answer.code is not None:
            raise PitheadError(answer.code, answer.detail)
        with np.load(out, allow_pickle=False) as arrays:
            found: dict[str, Any] = {name: arrays[name] for name in arrays.files}
    return Backtest(
        row=found["row"],
        score=found["score"],
        alarm=found["alarm"],
        label=found.get("label"),
        variant=chosen.name,
        accelerator=used,
        threshold=answer.threshold,
        rows=answer.rows,
        missing=answer.missing,
        calibrated_on=answer.calibrated_on,
    )


def _variant(manifest: Manifest, name: str | None) -> Variant:
    ordered = sorted(manifest.variants, key=lambda v: -v.preference)
    for variant in ordered:
        if name in (None, variant.name):
            return variant
    raise PitheadError("config.invalid", f"{manifest.name} has no variant {name!r}")


def _probe(manifest: Manifest, files: dict[str, Path], variant: Variant, accelerator: str) -> None:
    """Raise for what no device would take."""
    reports = list(probe(manifest, files, variants=[variant.name], accelerators=[accelerator], any_arch=True))
    if not reports:
        raise PitheadError("probe.no_variant", f"{variant.name} on {accelerator} cannot be tried here")
    for report in reports:
        if not report.passed:
            raise PitheadError(report.code or "probe.crashed", report.detail)


def summary(found: Backtest) -> dict[str, int | float | str]:
    """Return the figures for people, among them precision, recall and AUC where there are labels."""
    good = np.isfinite(found.score)
    facts: dict[str, int | float | str] = {
        "variant": found.variant,
        "accelerator": found.accelerator,
        "rows": found.rows,
        "missing_rows": found.missing,
        "windows": len(found.row),
        "windows_without_score": int(len(good) - good.sum()),
        "calibrated_on_windows": found.calibrated_on,
        "threshold": found.threshold,
        "alarms": int(found.alarm.sum()),
    }
    if good.any():
        values = np.quantile(found.score[good], QUANTILES)
        facts |= {f"score_q{q:g}": float(v) for q, v in zip(QUANTILES, values, strict=True)}
    if found.label is not None:
        facts |= judged(found.label[good], found.score[good], found.alarm[good])
    return facts


def judged(
    label: NDArray[np.bool_], score: NDArray[np.float64], alarm: NDArray[np.bool_]
) -> dict[str, int | float]:
    """Return what of the labelled windows was found, window by window.

    ``auc`` is the share of (labelled, not labelled) pairs that the scores
    put in order, ties for a half; a figure whose denominator is 0 is left out.
    """
    wrong, hits = int(label.sum()), int((label & alarm).sum())
    right = len(label) - wrong
    facts: dict[str, int | float] = {"labelled_windows": wrong}
    if alarm.any():
        facts["precision"] = hits / int(alarm.sum())
    if wrong:
        facts["recall"] = hits / wrong
    if right:
        facts["false_alarm_rate"] = int((~label & alarm).sum()) / right
    if wrong and right:
        _, place, times = np.unique(score, return_inverse=True, return_counts=True)
        # The middle of the ranks that equal scores share.
        rank = np.cumsum(times) - (times - 1) / 2
        facts["auc"] = float((rank[place][label].sum() - wrong * (wrong + 1) / 2) / (wrong * right))
    return facts


def write_csv(path: Path, found: Backtest) -> None:
    """Write a line for each window; raises ``config.invalid`` where that is not possible."""
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["row", "score", "alarm"])
            lines.writerows(
                zip(found.row.tolist(), found.score.tolist(), found.alarm.astype(int).tolist(), strict=True)
            )
    except OSError as error:
        raise PitheadError("config.invalid", f"--out {path}: {error.strerror}") from error
