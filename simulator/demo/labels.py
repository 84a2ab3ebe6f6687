"""How well the alarms agree with the labels of the recording."""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LABEL: Final = "label"


@dataclass(frozen=True)
class Agreement:
    """Alarms against labels, over all rows that were scored."""

    rows: int
    labelled: int
    alarms: int
    correct: int

    @property
    def precision(self) -> float:
        """Share of the alarms that are labelled."""
        return self.correct / self.alarms if self.alarms else 0.0

    @property
    def recall(self) -> float:
        """Share of the labelled rows that raised an alarm."""
        return self.correct / self.labelled if self.labelled else 0.0


def read_labels(recording: Path) -> list[bool]:
    """Return the label of each row."""
    with recording.open(newline="") as file:
        return [row[LABEL] == "1" for row in csv.DictReader(file)]


def agreement(
    labels: list[bool],
    offsets: Mapping[str, int],
    summaries: Iterable[Mapping[str, Any]],
    anomalies: Iterable[Mapping[str, Any]],
) -> Agreement:
    """Compare on the rows that each device has scored: so many as its summaries count, from its offset on."""
    scored: Counter[str] = Counter()
    for summary in summaries:
        scored[summary["device_id"]] += summary["count"]
    alarmed: dict[str, set[int]] = {}
    for anomaly in anomalies:
        alarmed.setdefault(anomaly["device_id"], set()).add(int(anomaly["source_ref"]))
    rows = labelled = alarms = correct = 0
    for device, count in scored.items():
        seen = {(offsets[device] + i) % len(labels) for i in range(count)}
        wrong_or_right = alarmed.get(device, set()) & seen
        rows += count
        labelled += sum(labels[row] for row in seen)
        alarms += len(wrong_or_right)
        correct += sum(labels[row] for row in wrong_or_right)
    return Agreement(rows, labelled, alarms, correct)
