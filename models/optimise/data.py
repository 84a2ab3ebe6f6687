"""Recordings as windows of a model's input, divided by time for calibrating and for judging.

A package's windows are cut and normalised with the very functions of the
lane; a bare model gets rows as they are. Where a device would fit the model
to itself, the manifest's own normalisation is used.
"""

import csv
import gzip
import importlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import Pipeline, TensorSpec
from inference.arithmetic import normalise
from inference.features import Features
from models.optimise.feeding import Rows

LABEL: Final = "label"
"""Of an .npz: labels beside the tensors."""
MAX_VALUES: Final = 64_000_000
"""In all windows together; of more windows evenly spaced ones are taken."""


@dataclass(frozen=True)
class Data:
    """Windows in the order of time."""

    rows: Rows
    label: NDArray[np.bool_] | None
    """Whether a row of the window is labelled."""
    start: NDArray[np.int64]
    """Number of each window's first row in the recording."""
    length: int
    """Rows in a window."""

    def __len__(self) -> int:
        return len(self.start)

    def take(self, index: NDArray[np.int64]) -> "Data":
        """Return some of the windows."""
        return Data(
            {name: array[index] for name, array in self.rows.items()},
            None if self.label is None else self.label[index],
            self.start[index],
            self.length,
        )


@dataclass(frozen=True)
class Division:
    """What a variant is made with, and what it is judged by; no row of the recording is in both."""

    calibration: Data
    evaluation: Data
    text: str
    """For people."""


def divide(data: Data, share: float, most_calibration: int, most_evaluation: int) -> Division:
    """Return the first ``share`` of the recording for calibration, what follows for judging.

    Of more windows than ``most_...`` evenly spaced ones are taken; those across the border are left out.
    Raises ``config.invalid`` where a part is empty.
    """
    border = int(data.start[0] + share * (data.start[-1] + data.length - data.start[0]))
    early = np.flatnonzero(data.start + data.length <= border)
    late = np.flatnonzero(data.start >= border)
    if not len(early) or not len(late):
        raise PitheadError(
            "config.invalid", f"{len(data)} windows cannot be divided at a share of {share:g}: give more rows"
        )
    parts = [data.take(_spaced(early, most_calibration)), data.take(_spaced(late, most_evaluation))]
    text = (
        f"calibrated on {len(parts[0])} of the {len(early)} windows before row {border}, "
        f"judged on {len(parts[1])} of the {len(late)} windows from there on; no row is in both"
    )
    return Division(parts[0], parts[1], text)


def _spaced(index: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    if len(index) <= most:
        return index
    return index[np.linspace(0, len(index) - 1, most).astype(np.int64)]


def load(
    path: Path,
    inputs: tuple[TensorSpec, ...],
    pipeline: Pipeline | None,
    *,
    columns: Sequence[str] | None = None,
    label: str | None = None,
) -> Data:
    """Return the windows of a recording.

    CSV (.gz) and Parquet have a column for each channel; an ``.npy`` holds
    rows or whole inputs, an ``.npz`` an array for each input tensor and
    perhaps ``label``. Raises ``source.failed`` and ``config.invalid``.
    """
    if path.suffix in {".npy", ".npz"} and (label is not None or columns is not None):
        raise PitheadError(
            "config.invalid",
            f"{path.name} has no columns for --label and --columns; an .npz may have an array {LABEL!r}",
        )
    try:
        if path.suffix == ".npz":
            return _tensors(path, inputs)
        if path.suffix == ".npy":
            return _cut(_numeric(np.load(path, allow_pickle=False), ""), None, inputs, pipeline, path.name)
        wanted = columns or (None if pipeline is None else [c.name for c in pipeline.channels])
        table, labels = _table(path, wanted, label)
    except (OSError, ValueError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error) as error:
        raise PitheadError("source.failed", f"{path.name}: {error}") from error
    return _cut(table, labels, inputs, pipeline, path.name)


def _tensors(path: Path, inputs: tuple[TensorSpec, ...]) -> Data:
    # numpy leaves a file that it cannot read open, if it opened it.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        found = {name: np.asarray(arrays[name]) for name in arrays.files}
    label = None if any(spec.name == LABEL for spec in inputs) else found.pop(LABEL, None)
    rows = {s.name: _numeric(found[s.name], s.name) for s in inputs if s.name in found}
    if len(rows) != len(inputs):
        names = [spec.name for spec in inputs]
        raise PitheadError(
            "source.failed", f"{path.name}: arrays {sorted(found)}, the model's inputs are {names}"
        )
    lengths = {name: len(array) for name, array in rows.items()}
    if label is not None:
        label = _numeric(label, LABEL).reshape(-1)
        lengths[LABEL] = len(label)
    count = min(lengths.values())
    if len(set(lengths.values())) != 1 or not count:
        raise PitheadError(
            "source.failed", f"{path.name}: the arrays differ in length, or are empty: {lengths}"
        )
    good = np.ones(count, np.bool_)
    for array in rows.values():
        good &= np.isfinite(array).reshape(count, -1).all(axis=1)
    data = Data(rows, None if label is None else label != 0, np.arange(count, dtype=np.int64), 1)
    return _kept(data, np.flatnonzero(good), path.name)


def _numeric(array: NDArray[Any], name: str) -> NDArray[Any]:
    """Return an array of numbers with at least one axis, and a value in each row of it."""
    if array.dtype.kind not in "fiub" or not array.ndim or not math.prod(array.shape[1:]):
        raise ValueError(f"array {name or 'in it'} is {array.dtype} {list(array.shape)}, no rows of numbers")
    return array


def _table(
    path: Path, columns: Sequence[str] | None, label: str | None
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    names, values = _parquet(path) if path.suffix == ".parquet" else _csv(path)
    wanted = [name for name in names if name != label] if columns is None else list(columns)
    for name in (*wanted, *(() if label is None else (label,))):
        if name not in names:
            raise PitheadError("source.failed", f"{path.name} has no column {name!r}, but {', '.join(names)}")
    table = np.column_stack([_numbers(values[names.index(name)], name) for name in wanted])
    return table, None if label is None else _numbers(values[names.index(label)], label)


def _csv(path: Path) -> tuple[list[str], list[Any]]:
    how: dict[str, Any] = {"mode": "rt", "encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, **how) if path.suffix == ".gz" else path.open(**how) as text:
        lines = csv.reader(text)
        names = [name.strip() for name in next(lines, [])]
        rows = [row for row in lines if len(row) == len(names)]
    return names, [list(column) for column in zip(*rows, strict=True)] or [[] for _ in names]


def _parquet(path: Path) -> tuple[list[str], list[Any]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise PitheadError(
            "source.failed", f"{path.name}: install the extra `parquet`, or give a CSV file"
        ) from error
    table = parquet.read_table(path, use_threads=False)
    return list(table.column_names), [table.column(name).to_numpy() for name in table.column_names]


def _numbers(column: Any, name: str) -> NDArray[np.float64]:
    try:
        return np.array([math.nan if v in {"", None} else float(v) for v in column], np.float64)
    except (TypeError, ValueError) as error:
        raise PitheadError(
            "source.failed", f"column {name!r}: {error}; choose others with --columns"
        ) from error


def _cut(
    table: NDArray[Any],
    label: NDArray[np.float64] | None,
    inputs: tuple[TensorSpec, ...],
    pipeline: Pipeline | None,
    name: str,
) -> Data:
    if len(inputs) != 1:
        raise PitheadError(
            "source.failed", f"{name}: a model of {len(inputs)} inputs needs an .npz, an array for each"
        )
    spec = inputs[0]
    if not len(table):
        raise PitheadError("source.failed", f"{name} has no rows")
    if pipeline is not None:
        return _windows(table.reshape(len(table), -1), label, spec, pipeline, name)
    row = spec.shape[1:] if spec.shape and spec.shape[0] in {-1, 1} else spec.shape
    if len(row) == table.ndim - 1:  # open dimensions are as long as the data's
        row = tuple(b if a == -1 else a for a, b in zip(row, table.shape[1:], strict=True))
    row = tuple(max(1, d) for d in row)
    size, width = math.prod(row), math.prod(table.shape[1:])
    if size % width:
        raise PitheadError("source.failed", f"{name}: rows of {width} values do not make an input of {size}")
    length = size // width
    count = len(table) // length
    windows = np.asarray(table[: count * length], np.float32).reshape(count, *row)
    good = np.flatnonzero(np.isfinite(windows).reshape(count, -1).all(axis=1))
    start = np.arange(count, dtype=np.int64) * length
    labels = None if label is None else (label[: count * length].reshape(count, length) != 0).any(axis=1)
    return _kept(Data({spec.name: windows}, labels, start, length), good, name)


def _windows(
    table: NDArray[Any], label: NDArray[np.float64] | None, spec: TensorSpec, pipeline: Pipeline, name: str
) -> Data:
    if table.shape[1] != len(pipeline.channels):
        raise PitheadError(
            "source.failed",
            f"{name} has {table.shape[1]} columns, the model {len(pipeline.channels)} channels",
        )
    usable = np.isfinite(table).all(axis=1)
    for i, channel in enumerate(pipeline.channels):
        low, high = channel.minimum, channel.maximum
        usable &= (table[:, i] >= (-math.inf if low is None else low)) & (
            table[:, i] <= (math.inf if high is None else high)
        )
    length, stride = pipeline.window, pipeline.stride
    start = np.arange(0, max(0, len(table) - length + 1), stride, dtype=np.int64)
    before = np.concatenate([[0], np.cumsum(~usable)])
    start = start[before[start + length] == before[start]]
    if not len(start):
        raise PitheadError("source.failed", f"{name} has no whole window of {length} usable rows")
    start = _spaced(start, max(2, MAX_VALUES // (length * table.shape[1])))
    with np.errstate(invalid="ignore", over="ignore"):
        values = normalise(np.where(usable[:, None], table, 0), pipeline.mean, pipeline.scale, pipeline.clip)
    windows = np.stack([values[i : i + length] for i in start])
    if pipeline.features:
        windows = Features(pipeline).of(windows)
    labels = None
    if label is not None:
        wrong = np.concatenate([[0], np.cumsum(label != 0)])
        labels = wrong[start + length] > wrong[start]
    return Data({spec.name: windows}, labels, start, length)


def _kept(data: Data, index: NDArray[np.int64], name: str) -> Data:
    if not len(index):
        raise PitheadError("source.failed", f"{name} has no row without missing values")
    return data if len(index) == len(data) else data.take(index)
