"""Recordings as NumPy keeps them: ``.npy`` and ``.npz``, never with pickles.

A table of two axes has the channels in its columns, in the order of the
model's; columns that are asked for by number ("0", "3") may stand anywhere.
An array of records has its fields' names, an ``.npz`` an array for each name.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError

NUMBERS: Final = "biuf"
"""Kinds of datatype that are numbers."""
TABLE: Final = 2
"""Axes of a table."""


def read(path: Path, columns: tuple[str, ...], max_values: int) -> NDArray[np.float64]:
    """Return (rows, columns); ``source.failed`` says what is wrong with the file, ``OSError`` goes on."""
    try:
        if path.suffix == ".npz":
            return _archive(path, columns, max_values)
        # Mapped, so that a file's size is known before it is held in memory.
        return _array(path, np.load(path, mmap_mode="r", allow_pickle=False), columns, max_values)
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise PitheadError("source.failed", f"{path}: {error}") from error


def _archive(path: Path, columns: tuple[str, ...], max_values: int) -> NDArray[np.float64]:
    with zipfile.ZipFile(path) as file:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in file.infolist()}
    only = next(iter(sizes)) if len(sizes) == 1 and columns != tuple(sizes) else None
    for name in columns if only is None else (only,):
        if name not in sizes:
            raise PitheadError("source.failed", f"{path} has no column {name!r}", key="columns")
        if sizes[name] > 16 * max_values:  # of the largest kind of number
            raise _too_large(path, max_values)
    with np.load(path, allow_pickle=False) as found:
        if only is not None:
            return _array(path, found[only], columns, max_values)
        return _side_by_side(path, {name: found[name] for name in columns}, columns, max_values)


def _array(path: Path, found: NDArray[Any], columns: tuple[str, ...], max_values: int) -> NDArray[np.float64]:
    if found.dtype.names is not None:
        for name in columns:
            if name not in found.dtype.names:
                raise PitheadError("source.failed", f"{path} has no column {name!r}", key="columns")
        return _side_by_side(path, {name: found[name] for name in columns}, columns, max_values)
    if found.ndim == 1:
        found = found[:, None]
    if found.ndim != TABLE:
        raise PitheadError("source.failed", f"{path} has {found.ndim} axes, not rows and columns")
    if all(name.isdecimal() for name in columns):
        places = [int(name) for name in columns]
        if max(places) >= found.shape[1]:
            raise PitheadError("source.failed", f"{path} has no column {max(places)}", key="columns")
        found = found[:, places] if len(found) * len(places) <= max_values else found
    elif found.shape[1] != len(columns):
        raise PitheadError(
            "source.failed", f"{path} has {found.shape[1]} columns, the model {len(columns)} channels"
        )
    if found.size > max_values:
        raise _too_large(path, max_values)
    _check_kind(path, found)
    return np.array(found, np.float64, order="C")


def _side_by_side(
    path: Path, found: Mapping[str, NDArray[Any]], columns: tuple[str, ...], max_values: int
) -> NDArray[np.float64]:
    rows = len(found[columns[0]]) if found[columns[0]].ndim else 0
    if rows * len(columns) > max_values:
        raise _too_large(path, max_values)
    table = np.empty((rows, len(columns)))
    for place, name in enumerate(columns):
        column = found[name]
        if column.shape != (rows,):
            raise PitheadError("source.failed", f"{path}: {name!r} has shape {column.shape}, not ({rows},)")
        _check_kind(path, column)
        table[:, place] = column
    return table


def _check_kind(path: Path, found: NDArray[Any]) -> None:
    if found.dtype.kind not in NUMBERS:
        raise PitheadError("source.failed", f"{path} holds {found.dtype}, no numbers")


def _too_large(path: Path, max_values: int) -> PitheadError:
    return PitheadError("source.failed", f"{path} has more than {max_values} values; split it")
