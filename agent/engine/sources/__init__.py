"""The sources that a lane can have. A new one is one file and one line here."""

from importlib import import_module
from typing import Final

from agent.engine.clock import Clock
from agent.engine.sources.base import Opener, Source, Table
from contract.errors import PitheadError
from contract.manifest import Pipeline

SOURCES: Final = {
    "mqtt": "agent.engine.sources.mqtt",
    "replay": "agent.engine.sources.replay",
    "system": "agent.engine.sources.system",
}
"""Module of each kind, with a function ``open_source``; imported when a lane first needs it."""


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Open the source that ``table["kind"]`` names for the channels of ``pipeline``.

    Raises ``config.invalid`` for a wrong setting and ``source.failed`` when the sensor does not answer.
    """
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in SOURCES:
        raise PitheadError(
            "config.invalid", f"lanes.source.kind is {kind!r}, not one of {', '.join(SOURCES)}", key="kind"
        )
    opener: Opener = import_module(SOURCES[kind]).open_source
    return opener(table, pipeline, clock)
