"""What a sink of a lane is: where results go that people and controls shall have.

There are two families. A *sink of messages* (MQTT, HTTP, a file) gets each
result once at least, in order, and may lag. A *control* (Modbus, OPC UA) gets
the state of the alarm as it is now, over and over, and a stated safe value
when there is no state that can be trusted.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from contract.errors import PitheadError

Table = dict[str, Any]
"""One ``[[lanes.sinks]]`` table of the configuration."""
Settings = TypeVar("Settings", bound=Struct)
When = Literal["anomalies", "every window", "alarm state changes"]
WHERE: Final = "lanes.sinks"
PLACE: Final = re.compile(r"`\$\.?([^`]*)`")
Factor = Annotated[float, Meta(ge=-1e30, le=1e30)]
"""By which a score is multiplied; NaN is none."""
USERINFO: Final = re.compile(r"//[^/@\s]*@")
UNKNOWN: Final = re.compile(r"unknown field `([^`]*)`")
MISSING: Final = re.compile(r"missing required field `([^`]*)`")


class Message(Struct, frozen=True, omit_defaults=False):
    """What a lane found in one window, as it goes out."""

    lane: str
    model: str
    version: str
    time: str
    """When the window ended, by the source's clock: ISO 8601, UTC, microseconds."""
    score: float | None
    """None where the model gave none."""
    threshold: float
    alarm: bool
    contributions: dict[str, float]
    """Share of the score by channel; empty where a score has no parts."""


def always() -> bool:
    """Return that all may be written."""
    return True


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a control shall hold now."""

    alarm: float
    """``on`` or ``off`` of the configuration, or ``safe``."""
    score: float | None
    """Of the newest window; None where the state is the safe one: what was written before stands."""
    quality: bool
    """Whether ``alarm`` is a judgement of a model, made just now."""
    heartbeat: int
    """Counts the writes from 0 to 32767, and begins again."""
    may_write: Callable[[], bool] = field(default=always, compare=False)
    """To be asked again between the requests of one write: false once the bypass is on."""


class MessageSink(Protocol):
    """A way for messages. Used by one thread of its own, which may wait for the network.

    It may have ``at_once``, the most messages that one ``send`` gets.
    """

    def send(self, messages: Sequence[Message]) -> int:
        """Hand over ``messages``; return how many of them the other side refused for good.

        Raises ``sink.failed`` or ``OSError`` when it is away; all of them then come again, to a new sink.
        """

    def close(self) -> None:
        """Give back what is held; more than once is harmless."""


class ControlSink(Protocol):
    """A way into a control. Used by one thread of its own."""

    def write(self, outputs: Outputs) -> None:
        """Write all of it; raises as ``MessageSink.send``.

        A sink may also have ``accepts(values)``, called once with ``on``, ``off`` and ``safe`` before
        anything is written; it raises for what its place cannot hold.
        """

    def close(self) -> None:
        """Give back what is held; more than once is harmless."""


class Delivery(Struct, frozen=True, forbid_unknown_fields=True):
    """Keys that every sink of messages has."""

    name: str = ""
    """Of the sink, in the log and the status; default: its kind."""
    when: When = "anomalies"
    queue: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    """Messages that may wait; the oldest are lost, and counted."""
    contributions: bool = True
    """Whether messages say what each channel contributes."""


class Control(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Keys that every control has."""

    name: str = ""
    safe: bool | int | float
    """Written when the lane fails or stops, when it has judged nothing lately, and when the engine ends."""
    on: bool | int | float = 1
    off: bool | int | float = 0
    hold_s: Annotated[float, Meta(ge=0, le=3600)] = 1.0
    """An alarm stays on for so long after its last window, so that no scan of a controller misses it."""
    refresh_s: Annotated[float, Meta(ge=0.05, le=60)] = 1.0
    """All is written again so often, and at once when the alarm changes."""
    max_age_s: Annotated[float, Meta(gt=0, le=86_400)] = 10.0
    """When the newest judgement is older, there is none."""


Way = MessageSink | ControlSink
Opener = Callable[[Table], Way]


def failed(name: str, problem: object) -> PitheadError:
    """Return an error that names the sink's other side."""
    return PitheadError("sink.failed", f"{name}: {problem}")


def invalid(key: str, problem: str) -> PitheadError:
    """Return ``config.invalid`` for one key of a sink's table."""
    return PitheadError("config.invalid", f"{WHERE}.{key} {problem}", key=key)


def refuse_zero(score_scale: float) -> None:
    """Raise ``config.invalid`` for a factor that makes every score 0."""
    if not score_scale:
        raise invalid("score_scale", "is 0, which makes every score 0")


def settings(table: Table, kind: type[Settings], others: Sequence[str] = ()) -> Settings:
    """Return ``table`` as ``kind``; ``config.invalid`` names the key, its value, and what may stand there.

    ``others`` are keys that this table may have beside those of ``kind``.
    """
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        names = sorted({*kind.__struct_fields__, *others})
        if found := UNKNOWN.search(text):
            raise _unknown(found[1], table, names) from error
        if found := MISSING.search(text):
            raise invalid(found[1], f"is missing; see docs/sinks.md#{table.get('kind', '')}") from error
        path = PLACE.search(text)
        if path is None:  # what does not go together, said by the table itself
            raise PitheadError("config.invalid", f"{WHERE}: {text}") from error
        key = path[1]
        expected = text.split(" - at", maxsplit=1)[0]
        if USERINFO.search(str(table.get(key, ""))):
            expected = "a user and a password go into credentials_file"
        raise invalid(key, f"is {_shown(key, table)}: {expected}") from error


def _unknown(key: str, table: Table, names: Sequence[str]) -> PitheadError:
    close = difflib.get_close_matches(key, names, 1)
    hint = f"did you mean {close[0]}? There" if close else "there"
    return invalid(
        key,
        f"= {_shown(key, table)} is no key of a {table.get('kind')!r} sink; {hint} are {', '.join(names)}",
    )


def _shown(key: str, table: Table) -> str:
    """Return the value as it stands; what may hold a secret is not repeated."""
    first = key.split("[", maxsplit=1)[0].split(".", maxsplit=1)[0]
    if re.search(r"pass|token|secret", first):
        return "..."
    return USERINFO.sub("//...@", repr(table.get(first)))[:80]
