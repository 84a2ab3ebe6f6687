"""Play a recorded file back at its own pace: CSV, CSV.gz, Parquet or NumPy.

It behaves like a sensor with a buffer of ``buffer_s`` seconds: rows that are
not taken in time are lost, and counted.
"""

import csv
import gzip
import io
import math
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from agent.engine.clock import Clock
from agent.engine.sources import numpy_file
from agent.engine.sources.base import TICK_S, Batch, Source, Table, sample_rate, settings
from agent.engine.sources.marks import Mark
from contract.errors import PitheadError
from contract.manifest import Channel, Hertz, Pipeline

MISSING: Final = frozenset({"", "null", "none", "na", "n/a", "nan", "-"})
"""What tools write where there is no value, in small letters."""
TEXTS: Final = frozenset({"string", "large_string", "string_view"})
"""Parquet's types of a text."""
MAX_VALUES: Final = 64_000_000
"""Rows x channels that a file may have; all of it is held in memory."""


class ReplaySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The lane's ``source`` table."""

    kind: Literal["replay"]
    path: Annotated[str, Meta(min_length=1)]
    columns: tuple[str, ...] | None = None
    """Of the file, in the order of the model's channels; default: the channels' names."""
    rate_hz: Hertz | None = None
    speed: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    loop: bool = True
    offset: Annotated[int, Meta(ge=0, le=2**31)] = 0
    """First row to play."""
    buffer_s: Annotated[float, Meta(gt=0, le=86400)] = 10.0


SETTINGS: Final = ReplaySettings


class ReplaySource:
    """Rows of a table, each due at its time. ``refs`` are row numbers in the file, from 0."""

    def __init__(
        self, rows: NDArray[np.float64], rate_hz: float, given: ReplaySettings, clock: Clock
    ) -> None:
        self._rows, self._rate, self._clock = rows, rate_hz, clock
        self._loop = given.loop
        self._buffer = max(1, round(given.buffer_s * rate_hz))
        self._offset = given.offset % len(rows) if given.loop else given.offset
        self._started = clock.mono()
        self._done = 0
        """Rows that were played or lost."""

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        now = self._clock.mono()
        waiting = self._waiting(now)
        lost = max(0, waiting - self._buffer)
        self._done += lost
        first = (self._offset + self._done) % len(self._rows)
        n = min(waiting - lost, limit, len(self._rows) - first)
        if n <= 0:
            return None
        index = np.arange(self._done, self._done + n, dtype=np.int64)
        due = self._started + (index * (1e6 / self._rate)).astype(np.int64)
        batch = Batch(
            values=self._rows[first : first + n],
            t=due + (self._clock.wall() - now),
            refs=np.arange(first, first + n, dtype=np.int64),
            lost=lost,
            continues=not lost and first > 0,
        )
        self._done += n
        return batch

    def wait_s(self) -> float:
        """See ``Source``."""
        now = self._clock.mono()
        if self._ended:
            return 60.0
        due = self._started + self._done * 1e6 / self._rate
        return max(TICK_S, (due - now) / 1e6) if self._waiting(now) <= self._tick_rows else 0.0

    def backlog(self) -> int:
        """See ``Source``."""
        return self._waiting(self._clock.mono())

    def close(self) -> None:
        """See ``Source``."""

    @property
    def _ended(self) -> bool:
        return not self._loop and self._offset + self._done >= len(self._rows)

    @property
    def _tick_rows(self) -> float:
        return 2 * TICK_S * self._rate

    def _waiting(self, now: int) -> int:
        due = int((now - self._started) * self._rate / 1e6) + 1
        if not self._loop:
            due = min(due, len(self._rows) - self._offset)
        return max(0, due - self._done)


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Read the whole file; ``source.failed`` names what is wrong with it."""
    given = settings(table, ReplaySettings)
    channels = len(pipeline.channels)
    columns = given.columns or tuple(c.name for c in pipeline.channels)
    if len(columns) != channels:
        raise PitheadError(
            "config.invalid",
            f"lanes.source.columns names {len(columns)} columns, the model has {channels} channels",
            key="columns",
        )
    rate = sample_rate(given.rate_hz, pipeline) * given.speed
    path = Path(given.path)
    try:
        rows = _rows(path, columns, pipeline.channels)
    except OSError as error:
        raise PitheadError("source.failed", f"{path}: {error.strerror or error}") from error
    if not len(rows):
        raise PitheadError("source.failed", f"{path} has no rows")
    return ReplaySource(rows, rate, given, clock)


def _rows(path: Path, columns: tuple[str, ...], channels: tuple[Channel, ...]) -> NDArray[np.float64]:
    if path.suffix == ".parquet":
        return _parquet(path, columns, channels)
    if path.suffix in {".npy", ".npz"}:
        return numpy_file.read(path, columns, MAX_VALUES)
    return _csv(path, columns, channels)


def _csv(path: Path, columns: tuple[str, ...], channels: tuple[Channel, ...]) -> NDArray[np.float64]:
    """Read the columns of a CSV file with a header line; a cell of ``MISSING`` is a missing sample.

    Between the cells is what the header has most of: comma, semicolon (then with decimal commas) or tab.

    Lines with nothing on them are left out, wherever they stand.
    """
    values = array("d")
    try:
        with _text(path) as file:
            first = file.readline(csv.field_size_limit())
            delimiter = max(",;\t", key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            places = _places(path, [name.strip() for name in next(reader, [])], columns)
            for row in reader:
                if not any(map(str.strip, row)) and len(row) <= 1:
                    continue
                try:
                    values.extend(
                        [
                            _cell(row[i], c, comma=delimiter == ";")
                            for i, c in zip(places, channels, strict=True)
                        ]
                    )
                except (ValueError, IndexError) as error:
                    raise PitheadError("source.failed", f"{path} line {reader.line_num}: {error}") from error
                _check_size(path, len(values))
    except (csv.Error, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise PitheadError("source.failed", f"{path}: {error}") from error
    return np.frombuffer(values, np.float64).reshape(-1, len(columns))


def _cell(text: str, channel: Channel, *, comma: bool = False) -> float:
    """Return a cell's number; with ``comma`` it may have a decimal comma. Raises ``ValueError``."""
    if text.strip().lower() in MISSING:
        return math.nan
    if isinstance(channel, Mark):
        return channel.texts.number(text.strip())
    if "_" in text:  # which is a number to Python alone
        raise ValueError(f"could not convert string to float: {text!r}")
    return float(text.replace(",", ".") if comma and "." not in text else text)


@contextmanager
def _text(path: Path) -> Iterator[io.TextIOBase]:
    """Open a file as text; a byte-order mark, which spreadsheets write, is no part of it."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    else:
        with path.open(encoding="utf-8-sig", newline="") as plain:
            yield plain


def _parquet(path: Path, columns: tuple[str, ...], channels: tuple[Channel, ...]) -> NDArray[np.float64]:
    try:
        parquet = import_module("pyarrow.parquet")
        errors = import_module("pyarrow.lib").ArrowException
    except ImportError as error:
        raise PitheadError(
            "source.failed", f"{path}: install the extra `parquet` (pyarrow), or give a CSV file"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            _places(path, list(file.schema_arrow.names), columns)
            _check_size(path, file.metadata.num_rows * len(columns))
            table = file.read(columns=list(dict.fromkeys(columns)), use_threads=False)
        rows = np.empty((table.num_rows, len(columns)))
        for i, (name, channel) in enumerate(zip(columns, channels, strict=True)):
            column = table.column(name)
            if isinstance(channel, Mark) and str(column.type) in TEXTS:
                rows[:, i] = [_cell(text or "", channel) for text in column.to_pylist()]
            else:
                rows[:, i] = column.cast("double").to_numpy()
    except errors as error:
        raise PitheadError("source.failed", f"{path}: {error}") from error
    return rows


def _places(path: Path, header: list[str], columns: tuple[str, ...]) -> list[int]:
    for name in columns:
        if name not in header:
            # Another file may lie there soon, so it is worth another look.
            raise PitheadError("source.failed", f"{path} has no column {name!r}", key="columns")
        if header.count(name) > 1:
            raise PitheadError("source.failed", f"{path} has two columns {name!r}", key="columns")
    return [header.index(name) for name in columns]


def _check_size(path: Path, values: int) -> None:
    if values > MAX_VALUES:
        raise PitheadError("source.failed", f"{path} has more than {MAX_VALUES} values; split it")
