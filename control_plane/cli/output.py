"""What the command line prints: a table for people, JSON for programs."""

import datetime as dt
import enum
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Output(enum.Enum):
    """How a command prints."""

    TABLE = "table"
    JSON = "json"


PLAIN_WIDTH: Final = 240
"""Columns of a table that goes into a file or a pipe: there a row should stay on its line."""

OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print.")]


def print_json(value: Any) -> None:
    """Print ``value`` as JSON, indented."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], empty: str) -> None:
    """Print rows, or ``empty`` when there are none. Nothing in a cell is taken for markup."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    count = 0
    for row in rows:
        table.add_row(*[cell if isinstance(cell, Text) else Text(cell) for cell in row])
        count += 1
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(table if count else Text(empty, style="dim"))


def moment(micros: int | None) -> str:
    """Return a time in the local zone, or a dash."""
    if micros is None:
        return "-"
    return dt.datetime.fromtimestamp(micros / 1_000_000, dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def ago(micros: int | None, now: int) -> str:
    """Return how long ago something was, roughly."""
    if micros is None:
        return "never"
    seconds = max(0, now - micros) // 1_000_000
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


def labels(values: dict[str, str]) -> str:
    """Return labels as ``name=value`` in order."""
    return " ".join(f"{name}={value}" for name, value in sorted(values.items())) or "-"
