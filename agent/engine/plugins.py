"""Sources of third parties: distributions that name a module in the entry point group ``pithead.sources``.

The module has ``open_source(table, pipeline, clock)``, as the sources here,
and may have ``SETTINGS``. It is imported when a lane of its kind is opened,
in the engine; what is wrong with it is that lane's problem alone. A name of a
source of the house cannot be taken.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from contract.errors import PitheadError

GROUP: Final = "pithead.sources"


def kinds() -> tuple[str, ...]:
    """Return the kinds of source that installed distributions add; nothing of them is imported."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def load(kind: str) -> Any:
    """Return the module of a kind, or None where no distribution has it.

    Raises ``source.plugin_broken`` naming the distribution.
    """
    points = list(entry_points(group=GROUP, name=kind))
    if not points:
        return None
    makers = ", ".join(sorted(map(_maker, points)))
    if len({point.value for point in points}) > 1:
        raise PitheadError("source.plugin_broken", f"source {kind!r} is in several distributions: {makers}")
    try:
        module = points[0].load()
    except Exception as error:
        detail = f"source {kind!r} of {makers}: {type(error).__name__}: {error}"
        raise PitheadError("source.plugin_broken", detail) from error
    if not callable(getattr(module, "open_source", None)):
        raise PitheadError("source.plugin_broken", f"source {kind!r} of {makers} has no open_source")
    return module


def _maker(point: EntryPoint) -> str:
    return point.value if point.dist is None else f"{point.dist.name} {point.dist.version}"
