"""Photovoltaic inverters: what is wrong is the sensor and not the machine. Stuck, filled in, or far off.

15 minutes from sample to sample, nights are missing or 0. A value that stands
still or runs along a straight line has less in its higher frequencies than
any weather, and in dB that is as far from normal as too much would be. A night
stands still too, which is why the level belongs to what tells a stuck sensor.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.common import (
    Marks,
    Result,
    Rows,
    alarm_figures,
    area,
    runs,
    sensors,
    write_recording,
)
from contract.features import Bands, Feature, Statistics
from contract.manifest import Channel
from models import detector

LEFT_OUT: Final = "windows that are partly marked left out"
NAME: Final = "inverters"
RATE_HZ: Final = 1 / 900
VALUE: Final = "value_normalized"
WINDOW: Final = 8
_BIN: Final = RATE_HZ / WINDOW
SHAPE: Final[tuple[Feature, ...]] = (
    Bands(tuple(((i - 0.5) * _BIN, (i + 0.5) * _BIN) for i in (2, 3, 4)), decibel=True),
)


@dataclass(frozen=True)
class Fault:
    """One kind of fault, and how it is looked for."""

    name: str
    file: str
    column: str
    rows: int
    """The first rows, which make the model, less those that are marked."""
    model: str
    window: int
    features: tuple[Feature, ...]


FAULTS: Final = (
    Fault(
        "stuck",
        "ac_power_inv_2173_stale_data.csv",
        "stale_data_mask",
        750,
        "mean and bands in dB",
        WINDOW,
        (Statistics(("mean",)), *SHAPE),
    ),
    Fault(
        "filled in",
        "ac_power_inv_2173_interpolated_data.csv",
        "interpolated_data_mask",
        750,
        "bands in dB",
        WINDOW,
        SHAPE,
    ),
    Fault("far off", "ac_power_inv_7539_outliers.csv", "outlier", 150, "2 samples", 2, ()),
)


def load(fault: Fault) -> tuple[Rows, Marks]:
    """Return (rows, 1), NaN where nothing was recorded, and which rows are marked as wrong."""
    path = sensors("pvanalytics-inverters") / fault.file
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    values = [float(line[VALUE]) if line[VALUE] else np.nan for line in lines]
    return np.array(values)[:, None], np.array([line[fault.column].lower() == "true" for line in lines])


def design(fault: Fault) -> detector.Design:
    """Return the detector of one kind of fault."""
    return detector.Design(
        name="inverter-sensor",
        summary=f"Mahalanobis distance of an inverter's power: {fault.name} values.",
        channels=(Channel("power"),),
        window=fault.window,
        stride=1,
        method=detector.Mahalanobis(),
        features=fault.features,
        sample_rate_hz=RATE_HZ,
        false_alarms=0.01,
        data="pvanalytics 0.2.2, its own example data",
        data_licence="MIT",
    )


def results(scratch: Path) -> Iterator[Result]:
    """Yield the lines."""
    for fault in FAULTS:
        rows, wrong = load(fault)
        making = np.where(wrong[: fault.rows, None], np.nan, rows[: fault.rows])
        directory = scratch / "inverter"
        detector.build(directory, design(fault), [making])
        recording = write_recording(scratch / "inverter.npz", ["power"], rows[fault.rows :])
        line = partial(
            Result,
            data=f"inverters, {fault.name}",
            model=f"Mahalanobis on {fault.model}",
            split=f"made from the unmarked of the first {fault.rows} rows; judged on the rest, {LEFT_OUT}",
        )
        for variant, found in runs(directory, recording, label=False):
            marked, clear = sides(wrong[fault.rows :], found.row, fault)
            either = marked | clear
            yield line(variant=variant, metric="AUC", ours=area(marked[either], found.score[either]))
            for metric, value in alarm_figures(found, marked, either).items():
                yield line(variant=variant, metric=metric, ours=value)


def sides(wrong: Marks, ends: NDArray[np.int64], fault: Fault) -> tuple[Marks, Marks]:
    """Return which windows are faulty, and which have no marked row at all.

    A fault that lasts must fill its window: that a window begins to stand still is nothing to be seen.
    """
    before = np.concatenate([[0], np.cumsum(wrong)])
    marked = before[ends + 1] - before[ends + 1 - fault.window]
    least = fault.window if fault.features else 1
    return marked >= least, marked == 0
