"""The sources that a lane can have. A new one is one file here and one word in the settings."""

from importlib import import_module
from typing import Any, Final

from agent.core.settings import SOURCE_KINDS
from agent.engine.clock import Clock
from agent.engine.sources.base import Opener, Source, Table, settings
from contract.errors import PitheadError
from contract.manifest import Pipeline

SOURCES: Final = {kind: f"agent.engine.sources.{kind}" for kind in SOURCE_KINDS}
"""Module of each kind, with ``SETTINGS`` and ``open_source``; imported when a lane first needs it."""


def check(table: Table) -> None:
    """Raise ``config.invalid`` for what can be seen to be wrong without opening the source."""
    settings(table, _module(table).SETTINGS)


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Open the source that ``table["kind"]`` names for the channels of ``pipeline``.

    Raises ``config.invalid`` for a wrong setting and ``source.failed`` when the sensor does not answer.
    """
    opener: Opener = _module(table).open_source
    return opener(table, pipeline, clock)


def _module(table: Table) -> Any:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in SOURCES:
        raise PitheadError(
            "config.invalid", f"lanes.source.kind is {kind!r}, not one of {', '.join(SOURCES)}", key="kind"
        )
    return import_module(SOURCES[kind])
