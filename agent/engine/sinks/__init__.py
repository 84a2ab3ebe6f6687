"""The sinks that a lane can have. A new one is one file here and one word in the settings."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Final

from agent.core.settings import SINK_KINDS
from agent.engine import plugins
from agent.engine.sinks.base import Control, Delivery, Opener, Table, invalid, settings
from contract.errors import PitheadError

SINKS: Final = {kind: f"agent.engine.sinks.{kind}" for kind in SINK_KINDS}
"""Module of each kind, with ``SETTINGS``, ``CONTROL`` and ``open_sink``; imported when first needed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A table of the configuration, understood."""

    name: str
    keys: Delivery | Control
    table: Table
    """What is left for the sink itself."""
    open: Opener


def plan(table: Table) -> Plan:
    """Return what ``table`` asks for. Opens nothing.

    Raises ``config.invalid`` naming the key, ``sink.failed`` for a library that is missing, and
    ``sink.plugin_broken`` for a third party's sink that cannot be used.
    """
    module = _module(table)
    try:
        return _planned(table, module)
    except PitheadError:
        raise
    except (Exception, SystemExit) as error:
        # Code of somebody else must not take the engine with it.
        detail = f"sink {table['kind']!r}: {type(error).__name__}: {error}"
        raise PitheadError("sink.plugin_broken", detail) from error


def _planned(table: Table, module: Any) -> Plan:
    kind: type[Delivery | Control] = Control if getattr(module, "CONTROL", False) else Delivery
    mine = {key: value for key, value in table.items() if key in kind.__struct_fields__}
    rest = {key: value for key, value in table.items() if key not in mine}
    if (own := getattr(module, "SETTINGS", None)) is not None:
        settings(rest, own, kind.__struct_fields__)
    keys = settings(mine, kind)
    if (check := getattr(module, "check", None)) is not None:
        check(rest, keys)
    return Plan(keys.name or str(table["kind"]), keys, rest, module.open_sink)


def check(table: Table) -> None:
    """Raise as ``plan`` for what can be seen to be wrong without opening the sink."""
    plan(table)


def _module(table: Table) -> Any:
    kind = table.get("kind")
    if isinstance(kind, str):
        if kind in SINKS:
            return import_module(SINKS[kind])
        if (module := plugins.load_sink(kind)) is not None:
            return module
    there = ", ".join([*SINKS, *plugins.sink_kinds()])
    raise invalid("kind", f"is {kind!r}, not one of {there}")
