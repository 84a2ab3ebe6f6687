"""Which of a machine's tags feeds which channel of a model, and in which unit.

Any source takes ``channels``: by channel name a ``unit``, a ``scale`` and an
``offset``. Sources with addresses take ``tags`` instead, a list of tables
(``tags_file`` was read into it with the configuration). A source sees the
addresses only; its values are converted by ``x * scale + offset`` after it.

A ``unit`` is the one *after* the conversion. It must be the manifest's: two
spellings of one unit are told apart, since nobody can know that they are one.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from agent.core.tags import Factor, Tag
from agent.engine.sources.base import Table
from contract.errors import PitheadError
from contract.manifest import Pipeline

BINDING: Final = ("channels", "tags")
"""Keys of a source table that are for every kind."""


class ChannelTable(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of ``channels``."""

    unit: str = ""
    scale: Factor = 1.0
    offset: Factor = 0.0


class Address(Struct, frozen=True, forbid_unknown_fields=True):
    """What is left of a tag for its source, in the order of the model's channels."""

    channel: str
    address: Annotated[str, Meta(min_length=1, max_length=1024)]
    datatype: str = ""


@dataclass(frozen=True, slots=True)
class Conversion:
    """From a source's values to the manifest's units, per channel."""

    scale: NDArray[np.float64]
    offset: NDArray[np.float64]

    def apply(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return ``values`` (rows, channels) in the units of the manifest."""
        return values * self.scale + self.offset


def split(table: Table) -> tuple[Table, str | None, dict[str, ChannelTable] | list[Tag]]:
    """Return the table as its source sees it, the key that bound channels, and what stood there.

    Raises ``config.invalid`` for what does not fit together, whatever the model is.
    """
    given = [name for name in BINDING if table.get(name) is not None]
    bare = {key: value for key, value in table.items() if key not in BINDING}
    if len(given) > 1:
        raise _invalid(given[1], f"lanes.source has both {given[0]} and {given[1]}")
    if not given:
        return bare, None, []
    if given == ["channels"]:
        named = _convert(table["channels"], dict[str, ChannelTable], "channels")
        return bare, "channels", named
    tags = _convert(table["tags"], list[Tag], "tags")
    bare["tags"] = _bare(tags)
    return bare, given[0], tags


def bound(table: Table, pipeline: Pipeline) -> tuple[Table, Conversion | None]:
    """Return the table without units and factors, and the conversion if there is one.

    Raises as ``split``, and ``config.invalid`` for a tag or unit that does not fit the model.
    """
    bare, place, found = split(table)
    if place is None:
        return bare, None
    entries: list[ChannelTable | Tag]
    if isinstance(found, dict):
        _check_names(found, pipeline, place)
        entries = [found.get(c.name, ChannelTable()) for c in pipeline.channels]
    else:
        _check_names([tag.channel for tag in found], pipeline, place, all_of_them=True)
        by_name = {tag.channel: tag for tag in found}
        ordered = [by_name[c.name] for c in pipeline.channels]
        bare["tags"] = _bare(ordered)
        entries = list(ordered)
    return bare, _conversion(entries, pipeline, place)


def _bare(tags: Iterable[Tag]) -> list[Any]:
    return [{"channel": tag.channel, "address": tag.address, "datatype": tag.datatype} for tag in tags]


def addresses(tags: Sequence[Address] | None) -> Sequence[Address]:
    """Return the tags of a source that cannot do without."""
    if not tags:
        raise _invalid("tags", "lanes.source needs tags (or tags_file): channel and address of each channel")
    return tags


def _conversion(entries: Sequence[ChannelTable | Tag], pipeline: Pipeline, place: str) -> Conversion | None:
    for channel, entry in zip(pipeline.channels, entries, strict=True):
        if entry.unit and channel.unit and entry.unit != channel.unit:
            raise _invalid(
                place,
                f"lanes.source.{place}: channel {channel.name!r} is in {entry.unit!r}, the model wants "
                f"{channel.unit!r}; convert with scale and offset, then say unit = {channel.unit!r}",
            )
        if not entry.scale:
            raise _invalid(place, f"lanes.source.{place}: channel {channel.name!r} has scale 0")
    if all((entry.scale, entry.offset) == (1.0, 0.0) for entry in entries):
        return None
    return Conversion(np.array([e.scale for e in entries]), np.array([e.offset for e in entries]))


def _check_names(names: Iterable[str], pipeline: Pipeline, place: str, *, all_of_them: bool = False) -> None:
    wanted = [c.name for c in pipeline.channels]
    counts = Counter(list(names))
    unknown = [name for name in counts if name not in wanted]
    if unknown:
        shown = ", ".join(wanted[:20])
        raise _invalid(
            place, f"lanes.source.{place}: the model has no channel {unknown[0]!r}; it has {shown}"
        )
    double = [name for name, n in counts.items() if n > 1]
    if double:
        raise _invalid(place, f"lanes.source.{place}: channel {double[0]!r} is named twice")
    missing = [name for name in wanted if all_of_them and name not in counts]
    if missing:
        raise _invalid(place, f"lanes.source.{place}: channel {missing[0]!r} of the model has no tag")


def _convert(value: object, kind: Any, place: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _invalid(place, f"lanes.source.{place}: {error}") from error


def _invalid(key: str, detail: str) -> PitheadError:
    return PitheadError("config.invalid", detail, key=key)
