"""The sources that a lane can have. A new one is one file here and one word in the settings."""

from importlib import import_module
from typing import Any, Final

from agent.core.settings import SOURCE_KINDS
from agent.engine import plugins
from agent.engine.clock import Clock
from agent.engine.sources.around import Checked, Converted
from agent.engine.sources.base import Opener, Source, Table, settings
from agent.engine.sources.marks import Marked, Marks, widened
from agent.engine.sources.tags import bound, split
from contract.errors import PitheadError
from contract.manifest import Pipeline

SOURCES: Final = {kind: f"agent.engine.sources.{kind}" for kind in SOURCE_KINDS}
"""Module of each kind, with ``SETTINGS`` and ``open_source``; imported when a lane first needs it."""
NOTHING: Final = Pipeline((), 1, 1, (), (), sample_rate_hz=10.0)
"""Of a source that reads marks alone, so often."""


def check(table: Table, marks: Marks | None = None) -> None:
    """Raise ``config.invalid`` for what can be seen to be wrong without opening the source."""
    module = _module(table)
    bare, _, _ = split(table)
    if marks is not None:
        bare, _ = widened(bare, NOTHING, marks)
    if (kind := getattr(module, "SETTINGS", None)) is not None:
        settings(bare, kind)


def open_source(table: Table, pipeline: Pipeline, clock: Clock, marks: Marks | None = None) -> Source:
    """Open the source that ``table["kind"]`` names for the channels of ``pipeline``, in its units.

    ``marks`` are read along, into ``Batch.marks``. Raises ``config.invalid`` for a wrong setting,
    ``source.plugin_broken`` for a third party's source that cannot be used, and ``source.failed`` when the
    sensor does not answer.
    """
    opener: Opener = _module(table).open_source
    bare, conversion = bound(table, pipeline)
    wide = pipeline
    if marks is not None:
        bare, wide = widened(bare, pipeline, marks)
    source = opener(bare, wide, clock)
    if table["kind"] not in SOURCES:
        source = Checked(str(table["kind"]), source, len(wide.channels))
    if marks is not None:
        source = Marked(source, len(pipeline.channels))
    return source if conversion is None else Converted(source, conversion)


def _own(kind: str) -> Any:
    try:
        return import_module(SOURCES[kind])
    except ImportError as error:
        raise PitheadError("source.failed", f"{kind}: {error}; install the extra `{kind}`") from error


def _module(table: Table) -> Any:
    kind = table.get("kind")
    if isinstance(kind, str):
        if kind in SOURCES:
            return _own(kind)
        if (module := plugins.load(kind)) is not None:
            return module
    raise PitheadError(
        "config.invalid",
        f"lanes.source.kind is {kind!r}, not one of {', '.join([*SOURCES, *plugins.kinds()])}",
        key="kind",
    )
