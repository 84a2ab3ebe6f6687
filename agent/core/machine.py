"""What a lane knows of the machine that it watches: the tag of its state, and when that means that it runs.

Pure types of the configuration: ``agent.engine.machine`` judges rows by them.
"""

import math
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Tag = Annotated[str, Meta(min_length=1, max_length=1024)]
Value = int | float | str | tuple[float, float]
"""One state: a number, a name or text, or the numbers from ... to, both included."""


class Machine(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """``[lanes.machine]``: the state that mutes a lane."""

    tag: Tag
    """How the source addresses the state: a register, a node, a key, a topic, a column."""
    datatype: str = ""
    """As a tag of the source has it."""
    runs: Annotated[tuple[Value, ...], Meta(min_length=1, max_length=1000)]
    """The states in which the machine does what the model was made for."""
    settle_s: Annotated[float, Meta(ge=0, le=86400)] = 0.0
    """After a change to running, or to another recipe, windows are muted for so long."""
    recipe: Tag | None = None
    """A second tag: what the machine makes. Another value is another recipe."""
    recipe_datatype: str = ""
    states: Annotated[
        dict[str, Annotated[str, Meta(min_length=1, max_length=200)]], Meta(max_length=1000)
    ] = {}
    """Names of states by their numbers, for people and for ``runs``."""
    hold_s: Annotated[float, Meta(ge=0, le=86400)] = 5.0
    """A state that is missing is taken to be the last one for so long; then it is unknown."""
    unknown: Literal["runs", "muted"] = "runs"
    """What an unknown state counts as. It never counts for a calibration."""
    source: dict[str, str | int | float | bool | list[Any] | dict[str, Any] | None] | None = None
    """Where the tags are read, if not with the samples: a source like a lane's."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        for value in self.runs:
            if isinstance(value, tuple) and not value[0] <= value[1]:
                raise ValueError(f"machine.runs: {value[0]:g} to {value[1]:g} is no range")
            if isinstance(value, float) and math.isnan(value):
                raise ValueError("machine.runs: nan is no state")
        names = set(self.numbers().values())
        for value in self.runs:
            if names and isinstance(value, str) and value not in names:
                raise ValueError(f"machine.runs: no state is named {value!r}; there are {', '.join(names)}")

    def numbers(self) -> dict[float, str]:
        """Return the names by number."""
        found: dict[float, str] = {}
        for key, name in self.states.items():
            try:
                number = float(key)
            except ValueError:
                raise ValueError(f"machine.states: {key!r} is no number; a text needs no name") from None
            if not math.isfinite(number) or number in found:
                raise ValueError(f"machine.states: {key!r} is no number, or stands twice")
            found[number] = name
        return found

    @property
    def tags(self) -> tuple[tuple[str, str], ...]:
        """(tag, datatype) of the columns that are read: the state, and the recipe if there is one."""
        recipe = () if self.recipe is None else ((self.recipe, self.recipe_datatype),)
        return (self.tag, self.datatype), *recipe
