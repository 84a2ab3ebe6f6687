"""Columns that a source reads beside the model's channels: the state of the machine, and its recipe.

They come by the very way of the samples, in the same rows, so nothing has to
be brought together by time. A source sees them as further channels at the
end, of the type ``Mark``; what it gives is then split.

A mark may be a text, which becomes a number here: a stable one, so that
equal texts are equal wherever they come from.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np

from agent.engine.sources.base import Batch, Source, Table
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

TAGGED: Final = ("modbus", "opcua")
"""Sources of the house that read nothing without ``tags``."""
LISTED: Final = ("columns", "topics")
"""Keys that list what is read, in the order of the channels."""
REMEMBERED: Final = 1000
"""Texts that can be shown again; others are equal or not, no more."""


class Texts:
    """Numbers for texts, and the way back for people."""

    def __init__(self) -> None:
        self._seen: dict[float, str] = {}

    def number(self, text: str) -> float:
        """Return what stands for ``text``: the number that it is, else one below -1."""
        try:
            found = float(text)
        except ValueError:
            digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
            found = -2.0 - int.from_bytes(digest, "big")
            if len(self._seen) < REMEMBERED:
                self._seen.setdefault(found, text)
        return found

    def text(self, number: float) -> str | None:
        """Return the text that ``number`` stands for, if it came."""
        return self._seen.get(number)


class Mark(Channel, frozen=True, kw_only=True):
    """A channel that no model sees; its values may be texts."""

    texts: Texts


@dataclass(frozen=True)
class Marks:
    """What to read beside the channels: (tag, datatype) of each."""

    tags: tuple[tuple[str, str], ...]
    texts: Texts


def value_of(value: object, channel: Channel) -> float | None:
    """Return what came for ``channel`` as a number, NaN where it is missing; None where it is no number."""
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str) and isinstance(channel, Mark):
        return channel.texts.number(value)
    return None


def widened(table: Table, pipeline: Pipeline, marks: Marks) -> tuple[Table, Pipeline]:
    """Return what a source is opened with so that it reads ``marks`` too.

    Raises ``config.invalid`` for a source that has nothing but samples.
    """
    kind = table.get("kind")
    if kind == "images":
        raise PitheadError(
            "config.invalid",
            "lanes.machine: pictures come without a state; say in lanes.machine.source where it is read",
            key="machine",
        )
    names = [tag for tag, _ in marks.tags]
    wide = dict(table)
    if table.get("tags") is not None or (not pipeline.channels and kind in TAGGED):
        tags = [{"channel": tag, "address": tag, "datatype": datatype} for tag, datatype in marks.tags]
        wide["tags"] = [*_listed(table, "tags"), *tags]
    elif any(datatype for _, datatype in marks.tags):
        raise PitheadError(
            "config.invalid", f"lanes.machine.datatype means nothing to the source {kind}", key="machine"
        )
    for key in LISTED:
        if table.get(key) is not None:
            wide[key] = [*_listed(table, key), *names]
    if kind == "mqtt" and not pipeline.channels and table.get("topic") is None:
        wide["topics"] = list(names)
    columns = tuple(Mark(name=tag, texts=marks.texts) for tag in names)
    return wide, msgspec.structs.replace(pipeline, channels=(*pipeline.channels, *columns))


def _listed(table: Table, key: str) -> list[object]:
    found = table.get(key)
    return list(found) if isinstance(found, list | tuple) else []


class Marked:
    """A source whose last columns are marks."""

    def __init__(self, source: Source, channels: int) -> None:
        self._source, self._channels = source, channels
        self.wait_s, self.backlog, self.close = source.wait_s, source.backlog, source.close

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        batch = self._source.poll(limit)
        if batch is None:
            return None
        samples = np.ascontiguousarray(batch.values[:, : self._channels])
        return replace(batch, values=samples, marks=batch.values[:, self._channels :])
