"""Tags of a machine as a table that people keep in a spreadsheet.

One line binds one channel of the model to an address of the machine. Columns:
channel, address, datatype, scale, offset, unit; the first two are needed.
Comma or semicolon, whichever the header has; between semicolons a number may
have a decimal comma, as spreadsheets write it where that is the custom.
"""

import csv
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from contract.errors import PitheadError

MAX_FILE: Final = 1024 * 1024
COLUMNS: Final = ("channel", "address", "datatype", "scale", "offset", "unit")
Factor = Annotated[float, Meta(ge=-1e30, le=1e30)]


class Tag(Struct, frozen=True, forbid_unknown_fields=True):
    """One channel's address; ``unit`` is the one after ``x * scale + offset``."""

    channel: str
    address: Annotated[str, Meta(min_length=1, max_length=1024)]
    datatype: str = ""
    scale: Factor = 1.0
    offset: Factor = 0.0
    unit: str = ""


def from_csv(data: bytes, name: str) -> tuple[Tag, ...]:
    """Return the tags of a CSV file called ``name``; ``config.invalid`` says which line is wrong, and how."""
    if len(data) > MAX_FILE:
        raise _invalid(f"{name} has more than {MAX_FILE} bytes")
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise _invalid(f"{name} is not UTF-8: {error}") from error
    delimiter = ";" if lines and ";" in lines[0] else ","
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        _check_header(header, name)
        tags = []
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            place = f"{name} line {reader.line_num}"
            if len(cells) != len(header):
                raise _invalid(f"{place} has {len(cells)} cells, its header {len(header)}")
            given = {key: cell for key, cell in zip(header, cells, strict=True) if cell}
            tags.append(_tag(given, place, decimal_comma=delimiter == ";"))
    except csv.Error as error:
        raise _invalid(f"{name}: {error}") from error
    return tuple(tags)


def _check_header(header: list[str], name: str) -> None:
    for column in header:
        if column not in COLUMNS or header.count(column) > 1:
            said = "twice the column" if column in COLUMNS else "a column"
            raise _invalid(f"{name} has {said} {column!r}; known are {', '.join(COLUMNS)}")
    for column in COLUMNS[:2]:
        if column not in header:
            raise _invalid(f"{name} has no column {column!r}")


def _tag(cells: dict[str, str], place: str, *, decimal_comma: bool) -> Tag:
    values: dict[str, Any] = dict(cells)
    for column in ("scale", "offset"):
        if (text := cells.get(column)) is not None:
            try:
                values[column] = float(text.replace(",", ".") if decimal_comma else text)
            except ValueError:
                raise _invalid(f"{place}: {column} {text!r} is not a number") from None
    try:
        return msgspec.convert(values, Tag)
    except msgspec.ValidationError as error:
        raise _invalid(f"{place}: {error}") from error


def _invalid(detail: str) -> PitheadError:
    return PitheadError("config.invalid", f"tags_file: {detail}", key="tags_file")
