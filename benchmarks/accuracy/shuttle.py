"""Statlog Shuttle: the shipped package, on the rows that its build never uses.

UCI shuffled the rows in time, so there is no earlier and later; the build's
own random division (models/shuttle/dataset.py) is the fair one.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.accuracy.common import Published, Result, alarm_figures, auc, runs
from models import shipped
from models.shuttle import dataset

NAME: Final = "shuttle"
TARGET: Final = 0.998
PUBLISHED: Final = Published(0.9646, "LODA, rolling AUC online, first 10,000 rows (documentation of river)")
SPLIT: Final = "made from 35 %, threshold from 25 %, judged on 40 % of the rows, at random"


def results(scratch: Path, recipe: str = "baseline") -> Iterator[Result]:
    """Yield the lines."""
    directory = shipped.build_apart(shipped.order("shuttle", recipe=recipe), scratch)
    recording = scratch / "shuttle.csv"
    dataset.write_replay(recording)
    line = partial(Result, data="Shuttle", model=f"shipped `shuttle`, {recipe}", split=SPLIT)
    for variant, found in runs(directory, recording):
        yield line(variant=variant, metric="AUC", ours=auc(found), published=PUBLISHED, target=TARGET)
        for metric, value in alarm_figures(found).items():
            yield line(variant=variant, metric=metric, ours=value)
