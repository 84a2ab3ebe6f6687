"""Sources and sinks of third parties: distributions that name a module in an entry point group.

In ``pithead.sources`` the module has ``open_source(table, pipeline, clock)``,
as the sources here; in ``pithead.sinks`` it has ``open_sink(table)``. It may
have ``SETTINGS``. It is imported when a lane needs one of its kind, in the
engine; what is wrong with it is that lane's problem alone. A name of the
house cannot be taken.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from contract.errors import PitheadError

GROUP: Final = "pithead.sources"
SINKS: Final = "pithead.sinks"


def kinds() -> tuple[str, ...]:
    """Return the kinds of source that installed distributions add; nothing of them is imported."""
    return _kinds(GROUP)


def sink_kinds() -> tuple[str, ...]:
    """Return the kinds of sink that installed distributions add; nothing of them is imported."""
    return _kinds(SINKS)


def load(kind: str) -> Any:
    """Return the module of a kind of source, or None where no distribution has it.

    Raises ``source.plugin_broken`` naming the distribution.
    """
    return _load(GROUP, "source", kind)


def load_sink(kind: str) -> Any:
    """Return the module of a kind of sink, or None; raises ``sink.plugin_broken``."""
    return _load(SINKS, "sink", kind)


def _kinds(group: str) -> tuple[str, ...]:
    return tuple(sorted({point.name for point in entry_points(group=group)}))


def _load(group: str, what: str, kind: str) -> Any:
    points = list(entry_points(group=group, name=kind))
    if not points:
        return None
    makers, broken = ", ".join(sorted(map(_maker, points))), f"{what}.plugin_broken"
    if len({point.value for point in points}) > 1:
        raise PitheadError(broken, f"{what} {kind!r} is in several distributions: {makers}")
    try:
        module = points[0].load()
    except (Exception, SystemExit) as error:
        detail = f"{what} {kind!r} of {makers}: {type(error).__name__}: {error}"
        raise PitheadError(broken, detail) from error
    if not callable(getattr(module, f"open_{what}", None)):
        raise PitheadError(broken, f"{what} {kind!r} of {makers} has no open_{what}")
    return module


def _maker(point: EntryPoint) -> str:
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
