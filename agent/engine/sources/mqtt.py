"""Samples from a broker on the plant's network: plain or TLS, with a password or a certificate.

With ``topic`` one message is one row: a JSON object by channel name, a JSON
list in the order of the channels, or a bare number where there is one
channel. With ``topics`` each channel has a topic of its own with a bare
number; a row is complete when every channel has a new value, and a second
value of a channel before that replaces the first: the slowest channel sets the
pace. What the broker has kept of samples is not asked for, since nobody
knows its age. A mark, such as the machine's state, waits for nothing: its last value
stands in each row. A message that cannot be used counts as a missing sample.
"""

import logging
import math
import threading
from collections import deque
from typing import Any, Final, Literal

import msgspec
import numpy as np

from agent.core.settings import PlantBroker
from agent.engine.clock import Clock
from agent.engine.sources.base import TICK_S, Batch, Source, Table, settings
from agent.engine.sources.broker import MAX_PAYLOAD, Connection, Topic
from agent.engine.sources.marks import Mark, value_of
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

log = logging.getLogger(__name__)

MAX_WAITING: Final = 20_000
"""Rows that wait to be taken; older ones are lost, and counted."""
_row = msgspec.json.Decoder(dict[str, Any] | list[Any] | int | float | bool | str | None)


class MqttSettings(PlantBroker, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The lane's ``source`` table."""

    kind: Literal["mqtt"]
    topic: Topic | None = None
    topics: tuple[Topic, ...] | None = None
    """One for each channel, in the order of the model's channels."""
    columns: tuple[str, ...] | None = None
    """Keys of the JSON object, in the order of the model's channels; default: the channels' names."""
    qos: Literal[0, 1] = 1


SETTINGS: Final = MqttSettings


class Rows:
    """Turns messages into rows. Messages come on the client's thread, rows go on the lane's."""

    def __init__(
        self,
        columns: tuple[str, ...],
        topics: tuple[str, ...] | None,
        clock: Clock,
        channels: tuple[Channel, ...] | None = None,
    ) -> None:
        """``channels`` say which columns are marks."""
        self._columns, self._clock = columns, clock
        self._channels = channels or tuple(Channel(name) for name in columns)
        self._samples = sum(not isinstance(c, Mark) for c in self._channels)
        self._places: dict[str, list[int]] | None = None if topics is None else {}
        for place, topic in enumerate(topics or ()):
            assert self._places is not None
            self._places.setdefault(topic, []).append(place)
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, list[float]]] = deque()
        self._partial: dict[int, float] = {}
        self._lost = 0
        self._gap = False
        self._complained = False

    def take(self, limit: int) -> tuple[list[tuple[int, list[float]]], int, bool]:
        """Return ``([(time, row), ...], lost, gap)`` since the call before.

        ``gap`` says that rows which were complete are missing before these. A
        message that could not be read is none: nobody knows whether it was a sample.
        """
        with self._lock:
            rows = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
            lost, self._lost = self._lost, 0
            gap, self._gap = self._gap, False
        return rows, lost, gap

    def __len__(self) -> int:
        return len(self._waiting)

    def message(self, topic: str, payload: bytes) -> None:
        """Take one message; one that cannot be used counts as a lost sample."""
        now = self._clock.wall()
        try:
            value = self._decoded(topic, payload)
            row = self._row(value) if self._places is None else self._part(topic, value)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            with self._lock:
                self._lost += 1
            if not self._complained:
                self._complained = True
                log.warning("source.bad_message", extra={"facts": {"topic": topic, "detail": str(error)}})
            return
        if row is None:
            return
        with self._lock:
            self._waiting.append((now, row))
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._lost += 1
                self._gap = True

    def _decoded(self, topic: str, payload: bytes) -> object:
        try:
            return _decoded(payload)
        except msgspec.MsgspecError:
            # A state alone on its topic may be a bare text.
            places = [] if self._places is None else self._places.get(topic, [])
            if not places or places[0] < self._samples:
                raise
            return payload.decode()

    def _row(self, value: object) -> list[float]:
        if isinstance(value, dict):
            return [_number(value.get(n), c) for n, c in zip(self._columns, self._channels, strict=True)]
        values = value if isinstance(value, list) else [value]
        if len(values) != len(self._columns):
            raise ValueError(f"{len(values)} values for {len(self._columns)} channels")
        return [_number(v, c) for v, c in zip(values, self._channels, strict=True)]

    def _part(self, topic: str, payload: object) -> list[float] | None:
        assert self._places is not None
        n, places = self._samples, self._places.get(topic, [])
        for place in places:
            self._partial[place] = _number(payload, self._channels[place])
        if not places or (n and places[0] >= n) or any(i not in self._partial for i in range(n)):
            return None
        row = [self._partial.get(i, math.nan) for i in range(len(self._columns))]
        for i in range(n):
            del self._partial[i]
        return row


def _decoded(payload: bytes) -> object:
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes, limit {MAX_PAYLOAD}")
    value: object = _row.decode(payload)
    return value


def _number(value: object, channel: Channel) -> float:
    """Return a number; null and absent are a missing sample."""
    if (found := value_of(value, channel)) is None:
        raise ValueError(f"{value!r} is not a number")
    return found


class MqttSource:
    """One connection. When it ends, ``poll`` raises, and the lane opens another after a while."""

    def __init__(
        self, given: MqttSettings, columns: tuple[str, ...], channels: tuple[Channel, ...], clock: Clock
    ) -> None:
        self._rows = Rows(columns, given.topics, clock, channels)
        self._width = len(columns)
        topics = tuple(dict.fromkeys(given.topics or (given.topic or "",)))
        # Of a sample that the broker has kept nobody knows how old it is; a state stands until another comes.
        marks = {t for t, c in zip(given.topics or (), channels, strict=False) if isinstance(c, Mark)}
        self._connection = Connection(given, topics, self._rows.message, clock, qos=given.qos, kept=marks)
        self._connection.start()

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        alive = self._connection.alive
        rows, lost, gap = self._rows.take(limit)
        if rows or lost:
            return Batch(
                values=np.array([row for _, row in rows], np.float64).reshape(-1, self._width),
                t=np.array([t for t, _ in rows], np.int64),
                lost=lost,
                continues=not gap,
            )
        up = self._connection.check(alive=alive)
        return Batch(np.empty((0, self._width)), np.empty(0, np.int64)) if up else None

    def wait_s(self) -> float:
        """See ``Source``."""
        return TICK_S

    def backlog(self) -> int:
        """See ``Source``."""
        return len(self._rows)

    def close(self) -> None:
        """See ``Source``."""
        self._connection.close()


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Begin to connect; whether that works shows in ``poll``."""
    given = settings(table, MqttSettings)
    channels = len(pipeline.channels)
    columns = given.columns or tuple(c.name for c in pipeline.channels)
    if (given.topic is None) == (given.topics is None):
        raise PitheadError("config.invalid", "lanes.source needs one of topic and topics", key="topic")
    for name, names in (("topics", given.topics), ("columns", columns)):
        if names is not None and len(names) != channels:
            raise PitheadError(
                "config.invalid",
                f"lanes.source.{name} names {len(names)}, the model has {channels} channels",
                key=name,
            )
    for topic in given.topics or ():
        if "+" in topic or "#" in topic:
            raise PitheadError(
                "config.invalid",
                f"lanes.source.topics has {topic!r}: each channel is one topic",
                key="topics",
            )
    return MqttSource(given, columns, pipeline.channels, clock)
