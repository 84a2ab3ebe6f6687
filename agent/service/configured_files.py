"""Files that the configuration names: found from where it lies, and tags read into it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct, to_builtins
from msgspec.structs import replace

from agent.core import tags
from agent.core.settings import AgentSettings, Lane
from contract.errors import PitheadError

_Table = TypeVar("_Table", bound=Struct)


def with_files(settings: AgentSettings, directory: Path) -> AgentSettings:
    """Return the settings with their files found from ``directory``, and tags read from theirs.

    So the tags are a part of the lane's source like any other: a changed file is a changed source.
    Raises ``config.invalid`` naming the file, and the line.
    """
    serve = settings.serve
    if serve.mqtt is not None:
        serve = replace(serve, mqtt=_found_from(serve.mqtt, directory))
    return replace(
        settings,
        serve=_found_from(serve, directory),
        lanes=tuple(_with_files(lane, directory) for lane in settings.lanes),
    )


def _found_from(table: _Table, directory: Path) -> _Table:
    """Return a table of the configuration with all its ``*_file`` as absolute paths."""
    files = {name: getattr(table, name) for name in table.__struct_fields__ if name.endswith("_file")}
    return replace(table, **{key: str(directory / path) for key, path in files.items() if path is not None})


def _table_from(table: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Return a source's or sink's table with its files as absolute paths."""
    return {
        key: str(directory / value)
        if (key == "path" or key.endswith("_file")) and isinstance(value, str)
        else value
        for key, value in table.items()
    }


def _with_files(lane: Lane, directory: Path) -> Lane:
    lane = replace(lane, sinks=tuple(_table_from(sink, directory) for sink in lane.sinks))
    if lane.machine is not None and lane.machine.source is not None:
        aside = _table_from(lane.machine.source, directory)
        lane = replace(lane, machine=replace(lane.machine, source=aside))
    source = _table_from(lane.source, directory)
    path = source.pop("tags_file", None)
    if path is None:
        return replace(lane, source=source)
    if "tags" in source:
        raise PitheadError(
            "config.invalid", f"lane {lane.name!r} has both tags and tags_file", key="tags_file"
        )
    try:
        with Path(str(path)).open("rb") as file:
            data = file.read(tags.MAX_FILE + 1)
    except OSError as error:
        raise PitheadError(
            "config.invalid", f"lane {lane.name!r}: tags_file {path}: {error.strerror}", key="tags_file"
        ) from error
    found = tags.from_csv(data, str(path))
    return replace(lane, source=source | {"tags": [to_builtins(tag) for tag in found]})
