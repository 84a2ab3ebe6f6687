"""Statlog Shuttle: the shipped package, on the rows that its build never uses.

UCI shuffled the rows in time, so there is no earlier and later; the build's
own random division (models/shuttle/dataset.py) is the fair one.
"""

from collections.abc import Iterator, Mapping
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


RELEASES: Final[Mapping[str, float | None]] = {
    "baseline": TARGET,
    "longer": TARGET,
    "wider": None,
}
"""Sound recipes, and what is asked of each: the figure of the default and of the newest."""


def results(scratch: Path, recipes: Mapping[str, float | None] = RELEASES) -> Iterator[Result]:
    """Yield the lines."""
    recording = scratch / "shuttle.csv"
    dataset.write_replay(recording)
    for recipe, target in recipes.items():
        order = shipped.order("shuttle", recipe=recipe)
        directory = shipped.build_apart(order, scratch)
        model = f"shipped shuttle {order.version} ({recipe})"
        line = partial(Result, data="Shuttle", model=model, split=SPLIT)
        for variant, found in runs(directory, recording):
            yield line(variant=variant, metric="AUC", ours=auc(found), published=PUBLISHED, target=target)
            for metric, value in alarm_figures(found).items():
                yield line(variant=variant, metric=metric, ours=value)
