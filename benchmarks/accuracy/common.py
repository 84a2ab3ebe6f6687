"""What all data sets share: where recordings lie, a run through the engine's lane, a line of the table."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models import package
from models.backtest import Backtest, backtest, judged

ROOT: Final = Path(__file__).parents[2]
DATA: Final = Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data"))
LABEL: Final = "label"
VARIANTS: Final = ("int8-tflite", "int8-onnx", "float32-tflite")

Rows = NDArray[np.float64]
Marks = NDArray[np.bool_]


@dataclass(frozen=True)
class Published:
    """A figure of other people."""

    value: float
    source: str


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    data: str
    model: str
    variant: str
    metric: str
    ours: float
    published: Published | None = None
    target: float | None = None
    """At least this is asked of ``ours``."""
    split: str = ""
    """What the model was made from, and what it was judged on."""

    @property
    def verdict(self) -> str:
        """``ok`` or ``missed`` where something is asked."""
        if self.target is None:
            return ""
        return "ok" if self.ours >= self.target else "missed"

    def facts(self) -> dict[str, Any]:
        """Return the line for a JSON document."""
        theirs = self.published
        return {
            "data": self.data,
            "model": self.model,
            "variant": self.variant,
            "metric": self.metric,
            "ours": round(self.ours, 6),
            "published": None if theirs is None else theirs.value,
            "source": "" if theirs is None else theirs.source,
            "difference": None if theirs is None else round(self.ours - theirs.value, 6),
            "target": self.target,
            "verdict": self.verdict,
            "split": self.split,
        }


class Absent(Exception):  # noqa: N818 - nothing is wrong, there is only nothing to judge
    """Recordings that are not on this machine."""


def sensors(name: str) -> Path:
    """Return the directory of a data set; raises ``Absent``."""
    path = DATA / "sensors" / name
    if not path.is_dir():
        raise Absent(f"no recordings at {path}; set PITHEAD_SHARED_DATA")
    return path


def write_recording(path: Path, columns: Sequence[str], rows: Rows, label: Marks | None = None) -> Path:
    """Write what a lane can replay, with ``label`` as one more column."""
    table = rows if label is None else np.column_stack([rows, label])
    names = columns if label is None else [*columns, LABEL]
    np.savez(path, **{name: table[:, i] for i, name in enumerate(names)})
    return path


def runs(directory: Path, recording: Path, *, label: bool = True) -> Iterator[tuple[str, Backtest]]:
    """Yield what each variant of a package finds, through the lane of the engine."""
    for variant in package.read_manifest(directory).variants:
        yield (
            variant.name,
            backtest(directory, recording, label=LABEL if label else None, variant=variant.name),
        )


def area(marks: Marks, scores: Rows) -> float:
    """Return the area under the curve, over the windows that have a score."""
    good = np.isfinite(scores)
    return float(judged(marks[good], scores[good], np.zeros(int(good.sum()), np.bool_))["auc"])


def auc(found: Backtest) -> float:
    """Return the area under the curve where the recording has labels."""
    assert found.label is not None
    return area(found.label, found.score)


def alarm_figures(
    found: Backtest, marks: Marks | None = None, among: Marks | None = None
) -> dict[str, float]:
    """Return recall and false-alarm rate at the package's own threshold.

    By ``marks`` instead of the recording's labels, and of the windows ``among`` which is given.
    """
    by = found.label if marks is None else marks
    assert by is not None
    which = np.ones(len(by), np.bool_) if among is None else among
    facts = judged(by[which], found.score[which], found.alarm[which])
    return {
        name: float(facts[key])
        for key, name in (("recall", "recall"), ("false_alarm_rate", "false alarms"))
        if key in facts
    }
