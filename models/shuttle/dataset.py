"""The Statlog Shuttle rows, and how they are divided.

Nine sensor readings per row and a label; about 7 % are anomalies. The rows
come from the wheel of ``river``, which is installed for its data alone and
never imported. In the source the rows are shuffled in time, so a random
division is a fair one.
"""

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from contract.errors import PitheadError

FEATURES: Final = tuple(f"f{i}" for i in range(1, 10))
LABEL: Final = "label"
ROW: Final = "row"
DATA: Final = "Statlog (Shuttle), as bundled in the PyPI package river"
DATA_LICENCE: Final = "CC-BY-4.0"

_SEED: Final = 1989
_TRAINING, _CALIBRATION = 0.35, 0.25

Rows = NDArray[np.float64]
Labels = NDArray[np.bool_]
Indices = NDArray[np.int64]


class Division(Struct, frozen=True):
    """Row numbers of the three parts; they never change, whatever a recipe does."""

    training: Indices
    """For weights."""
    calibration: Indices
    """For the threshold and the reference distribution."""
    held_out: Indices
    """For nobody but the judge, and for replays."""


def path() -> Path:
    """Return the data file inside the installed ``river``; raises ``source.failed`` when it is not there."""
    spec = importlib.util.find_spec("river")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(folder) / "datasets" / "shuttle.csv.gz"
        if file.is_file():
            return file
    raise PitheadError(
        "source.failed", "the Shuttle rows are in the package river: pip install --no-deps river"
    )


def load() -> tuple[Rows, Labels]:
    """Return all rows, (n, 9), and whether each is an anomaly."""
    with gzip.open(path(), "rt", encoding="ascii") as file:
        table = np.loadtxt(file, delimiter=",", skiprows=1)
    return table[:, :-1], table[:, -1] > 0


def divide(count: int) -> Division:
    """Return the division of ``count`` rows."""
    order = np.random.default_rng(_SEED).permutation(count)
    a, b = int(_TRAINING * count), int((_TRAINING + _CALIBRATION) * count)
    return Division(order[:a], order[a:b], order[b:])


def held_out() -> tuple[Rows, Labels, Indices]:
    """Return the rows that no model has seen, their labels, and their numbers in the source."""
    x, anomalous = load()
    rows = divide(len(x)).held_out
    return x[rows], anomalous[rows], rows


def write_replay(file: Path, count: int | None = None) -> int:
    """Write held-out rows for a replay source, with ``label`` (0 or 1) and ``row`` columns; returns how many.

    The suffix chooses ``.csv``, ``.csv.gz`` or ``.parquet``.
    """
    x, anomalous, rows = held_out()
    columns: dict[str, NDArray[np.int64]] = {
        name: x[:count, i].astype(np.int64) for i, name in enumerate(FEATURES)
    }
    columns[LABEL] = anomalous[:count].astype(np.int64)
    columns[ROW] = rows[:count]
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        import pyarrow as pa  # noqa: PLC0415 - large, and only for this suffix
        from pyarrow import parquet  # noqa: PLC0415

        parquet.write_table(pa.table(columns), file)
        return len(columns[LABEL])
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "wt", encoding="ascii", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*(values.tolist() for values in columns.values()), strict=True))
    return len(columns[LABEL])
