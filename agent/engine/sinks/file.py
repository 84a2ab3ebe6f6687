"""Messages in a file, a line each, JSON or CSV; rotated, so that the disk they take is bounded."""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from agent.engine.sinks.base import Message, Table, settings

COLUMNS: Final = tuple(Message.__struct_fields__)


class FileSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's own keys."""

    kind: Literal["file"]
    path: Annotated[str, Meta(min_length=1)]
    """Found from where agent.toml lies."""
    format: Literal["jsonl", "csv"] = "jsonl"
    max_bytes: Annotated[int, Meta(ge=4096, le=2**40)] = 10_000_000
    """A file that would become larger is put aside as ``<path>.1``, which becomes ``<path>.2``, and so on."""
    files: Annotated[int, Meta(ge=1, le=1000)] = 5
    """How many are kept, the newest among them."""


SETTINGS: Final = FileSettings


class FileSink:
    """Appends; a line that a power cut left unfinished is ended first."""

    def __init__(self, given: FileSettings) -> None:
        self._given = given
        self._path = Path(given.path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._opened()

    def send(self, messages: Sequence[Message]) -> int:
        """See ``MessageSink``. A full disk is a failure like any other: it is tried again."""
        if not self._mine():  # somebody else has put it aside, and may have made another
            self._file.close()
            self._file = self._opened()
        for message in messages:
            line = self._line(message)
            if self._file.tell() + len(line) > self._given.max_bytes and self._file.tell():
                self._rotate()
            self._file.write(line)
        self._file.flush()
        return 0

    def close(self) -> None:
        """See ``MessageSink``."""
        self._file.close()

    def _mine(self) -> bool:
        """Return whether what is open is still what lies at the path."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def _opened(self) -> Any:
        file = self._path.open("ab")
        if not file.tell():
            if self._given.format == "csv":
                file.write(_row(COLUMNS))
        elif not _ended(self._path):
            file.write(b"\n")
        return file

    def _rotate(self) -> None:
        self._file.close()
        for n in range(self._given.files - 1, 0, -1):
            older = self._path if n == 1 else Path(f"{self._path}.{n - 1}")
            if older.exists():
                older.replace(f"{self._path}.{n}")
        self._path.unlink(missing_ok=True)
        self._file = self._opened()

    def _line(self, message: Message) -> bytes:
        if self._given.format == "jsonl":
            return msgspec.json.encode(message) + b"\n"
        values = msgspec.structs.asdict(message)
        values["alarm"] = int(message.alarm)
        values["contributions"] = msgspec.json.encode(message.contributions).decode()
        return _row([values[name] for name in COLUMNS])


def _row(values: Sequence[Any]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue().encode()


def _ended(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def open_sink(table: Table) -> FileSink:
    """Open the file for appending; raises ``OSError``."""
    return FileSink(settings(table, FileSettings))
