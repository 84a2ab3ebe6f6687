"""Hydraulic test rig: cycles of a minute, eight sensors at 1 Hz, four components that wear.

One detector for each component knows the cycles in which that component was
sound, whatever state the others were in. The rig was driven through all
states in a fixed order, and most of them came once: so a division into an
earlier and a later half of the recording judges states that were never seen,
and the detectors say so. The other division keeps time within each state.
"""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.accuracy.common import Marks, Published, Result, Rows, auc, runs, sensors, write_recording
from contract.features import Statistics
from contract.manifest import Channel
from models import detector

NAME: Final = "hydraulic"
SENSORS: Final = ("TS1", "TS2", "TS3", "TS4", "VS1", "CE", "CP", "SE")
UNITS: Final = ("Cel", "Cel", "Cel", "Cel", "mm/s", "%", "kW", "%")
CYCLE: Final = 60
SOUND: Final = {"cooler": (0, 100), "valve": (1, 100), "pump": (2, 0), "accumulator": (3, 130)}
"""Column of the profile, and its value where nothing is wrong."""
MEASURED: Final = {"cooler": 1.000, "valve": 0.719, "pump": 0.981, "accumulator": 0.781}
SOURCE: Final = "24 summary features + one-class Mahalanobis, its split not told (the data's index.json)"
MODEL: Final = "Mahalanobis on mean, std, minimum, maximum"
BY_STATE: Final = (
    "each state of the rig: made from the sound cycles of its first half; judged on its second half"
)
BY_TIME: Final = (
    "made from the first half of the sound cycles; judged on the second half and all that are not"
)


def load() -> tuple[Rows, Rows]:
    """Return (cycles, 60, sensors), and (cycles, 4) states of the components."""
    folder = sensors("uci-hydraulic-1hz")
    rows = np.stack([np.loadtxt(folder / f"{name}.txt.gz") for name in SENSORS], axis=-1)
    return rows, np.loadtxt(folder / "profile.txt.gz")[:, :4]


def design(component: str) -> detector.Design:
    """Return the detector of one component."""
    return detector.Design(
        name=f"hydraulic-{component}",
        summary=f"Mahalanobis distance of a rig's cycles from those with a sound {component}.",
        channels=tuple(Channel(name, unit) for name, unit in zip(SENSORS, UNITS, strict=True)),
        window=CYCLE,
        stride=CYCLE,
        method=detector.Mahalanobis(shrinkage=0.02),
        later=0.2,
        reach=1.2,
        features=(Statistics(("mean", "std", "minimum", "maximum")),),
        sample_rate_hz=1.0,
        false_alarms=0.01,
        data="UCI Condition monitoring of hydraulic systems, Helwig et al. 2015",
        data_licence="CC-BY-4.0",
    )


def first_halves(states: Rows) -> Marks:
    """Return which cycles lie in the first half of a run of cycles in one state."""
    starts = [0, *(np.flatnonzero((np.diff(states, axis=0) != 0).any(axis=1)) + 1).tolist(), len(states)]
    early = np.zeros(len(states), np.bool_)
    for first, after in pairwise(starts):
        early[first : (first + after) // 2] = True
    return early


def runs_of(cycles: Rows, chosen: Marks) -> list[Rows]:
    """Return the chosen cycles as recordings, one for each run of neighbours."""
    index = np.flatnonzero(chosen)
    parts = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
    return [cycles[part].reshape(-1, len(SENSORS)) for part in parts]


def results(scratch: Path) -> Iterator[Result]:
    """Yield the lines."""
    cycles, states = load()
    early = first_halves(states)
    for component, (column, sound) in SOUND.items():
        good = states[:, column] == sound
        before = good & (np.cumsum(good) <= good.sum() // 2)
        for split, making, judging in ((BY_STATE, early & good, ~early), (BY_TIME, before, ~before)):
            directory = scratch / f"{component}-{split == BY_TIME}"
            detector.build(directory, design(component), runs_of(cycles, making))
            label = np.repeat(~good[judging], CYCLE)
            rows = cycles[judging].reshape(-1, len(SENSORS))
            recording = write_recording(scratch / "hydraulic.npz", SENSORS, rows, label)
            known = Published(MEASURED[component], SOURCE) if split == BY_STATE else None
            metric = "AUC" if split == BY_STATE else "AUC, unseen states"
            line = partial(
                Result, data=f"hydraulic rig, {component}", model=MODEL, metric=metric, split=split
            )
            for variant, found in runs(directory, recording):
                yield line(variant=variant, ours=auc(found), published=known)
