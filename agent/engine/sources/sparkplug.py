"""Metrics of a Sparkplug B edge node, or of one device behind it, as rows at the manifest's rate.

An address is a metric's name; without tags the channels' names are. A node
says the names, aliases and types of its metrics in its births; after a death,
or when a message is missing, nothing is known until the next births, which
are asked for. Rows of that time are lost, and no window reaches over them.

It is one subscriber among others, no primary host application: nodes that
wait for one are not woken by it.
"""

import logging
import threading
from typing import Annotated, Final, Literal

from msgspec import Meta

from agent.core.settings import PlantBroker
from agent.engine.clock import Clock
from agent.engine.sources import sparkplug_payload as payloads
from agent.engine.sources.base import TICK_S, Batch, Source, Table, sample_rate, settings
from agent.engine.sources.broker import MAX_PAYLOAD, Connection
from agent.engine.sources.hold import Hold
from agent.engine.sources.inbox import Inbox
from agent.engine.sources.marks import Mark
from agent.engine.sources.tags import Address
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

log = logging.getLogger(__name__)

NAMESPACE: Final = "spBv1.0"
SEQUENCES: Final = 256
ASK_AGAIN_US: Final = 5_000_000
"""Between two requests for births."""
SILENT_US: Final = 30_000_000
"""So long a node may be gone before the lane is said to have no source."""
MAX_METRICS: Final = 100_000

Id = Annotated[str, Meta(min_length=1, max_length=255, pattern=r"^[^+#/\x00]+$")]


class SparkplugSettings(PlantBroker, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The lane's ``source`` table."""

    kind: Literal["sparkplug"]
    group: Id
    edge_node: Id
    device: Id | None = None
    """Without it, the metrics are the edge node's own."""
    tags: tuple[Address, ...] | None = None
    rate_hz: Annotated[float, Meta(gt=0, le=1000)] | None = None
    timestamps: Literal["source", "arrival"] = "source"
    """Whose clock a value's time is; ``arrival`` where the edge node's is wrong."""
    delay_s: Annotated[float, Meta(ge=0, le=60)] = 0.5
    """How long a row waits for values that are on their way."""
    rebirth: bool = True
    """Whether births may be asked for; else one waits for the node's own."""


SETTINGS: Final = SparkplugSettings


class EdgeNode:
    """What is known of a node: births, aliases, and the sequence of its messages. Does no I/O."""

    def __init__(
        self,
        metrics: tuple[str, ...],
        device: str | None,
        hold: Hold,
        *,
        own_time: bool,
        channels: tuple[Channel, ...] = (),
    ) -> None:
        """``channels`` say which metrics are marks, that may be texts."""
        self._channels = channels or tuple(Channel(name) for name in metrics)
        self._places: dict[str, list[int]] = {}
        for place, name in enumerate(metrics):
            self._places.setdefault(name, []).append(place)
        self._metrics, self._device, self._hold, self._own_time = metrics, device, hold, own_time
        self._aliases: dict[int, str] = {}
        self._datatypes: dict[str, int] = {}
        self._seq: int | None = None
        """Of the last message, None when messages are missing."""
        self._death: int | None = None
        """``bdSeq`` of the birth; a death with another is an older connection's."""
        self.born = False

    def message(self, kind: str, device: str | None, data: bytes, now: int) -> bool:
        """Take one message; return whether births are needed. ``ValueError`` for what is no payload."""
        payload = payloads.parsed(data)
        if kind == "NDEATH":
            self._died(payload)
            return False
        if kind == "NBIRTH":
            self._gone()
            self._aliases, self._datatypes = {}, {}
            self._seq, self._death = payload.seq, _death(payload)
        elif not self._follows(payload.seq):
            self._gone()
            return True
        if device != self._device:
            return False
        if kind == "DDEATH":
            self._gone()
            return False
        if kind.endswith("BIRTH"):
            return self._birth(payload, now)
        return not self.born or not self._data(payload, now)

    def _follows(self, seq: int | None) -> bool:
        before, self._seq = self._seq, None
        if before is None or seq != (before + 1) % SEQUENCES:
            return False
        self._seq = seq
        return True

    def _died(self, payload: payloads.Payload) -> None:
        said = _death(payload)
        if said is None or self._death is None or said == self._death:
            self._gone()
            self._seq = None

    def _gone(self) -> None:
        if self.born:
            self.born = False
            self._hold.offline()

    def _birth(self, payload: payloads.Payload, now: int) -> bool:
        if len(payload.samples) > MAX_METRICS:
            raise PitheadError("source.failed", f"a birth of more than {MAX_METRICS} metrics")
        # What an older birth said does not count: a metric that is gone must not stand for ever.
        self._aliases, self._datatypes = {}, {}
        for sample in payload.samples:
            if sample.name in self._places:
                self._datatypes[sample.name] = sample.datatype
                if sample.alias is not None:
                    self._aliases[sample.alias] = sample.name
        absent = [name for name in self._metrics if name not in self._datatypes]
        if absent:
            raise PitheadError("source.failed", f"the birth has no metric {absent[0]!r}")
        self.born = True
        self._data(payload, now)
        return False

    def _data(self, payload: payloads.Payload, now: int) -> bool:
        for sample in payload.samples:
            name = sample.name or (self._aliases.get(sample.alias) if sample.alias is not None else None)
            if name is None or name not in self._places or sample.historical:
                continue
            t = sample.t if self._own_time else None
            for place in self._places[name]:
                self._hold.put(place, self._value(sample, name, self._channels[place]), t, now)
        return True

    def _value(self, sample: payloads.Sample, name: str, channel: Channel) -> float:
        if not sample.textual:
            return sample.value(sample.datatype or self._datatypes[name])
        if isinstance(channel, Mark) and sample.text is not None:
            return channel.texts.number(sample.text)
        raise PitheadError("source.failed", f"metric {name!r} is no number")


def _death(payload: payloads.Payload) -> int | None:
    for sample in payload.samples:
        if sample.name == "bdSeq" and sample.raw is not None:
            return int(sample.raw)
    return None


class SparkplugSource:
    """One connection to the broker. Messages come on the client's thread, rows go on the lane's."""

    def __init__(
        self,
        given: SparkplugSettings,
        metrics: tuple[str, ...],
        channels: tuple[Channel, ...],
        rate_hz: float,
        clock: Clock,
    ) -> None:
        self._given, self._clock = given, clock
        name = f"sparkplug {given.group}/{given.edge_node}"
        self._name = name if given.device is None else f"{name}/{given.device}"
        self._hold = Hold(self._name, len(metrics), rate_hz, round(given.delay_s * 1e6))
        self._node = EdgeNode(
            metrics, given.device, self._hold, own_time=given.timestamps == "source", channels=channels
        )
        self._inbox = Inbox(self._name, len(metrics))
        self._lock = threading.Lock()
        self._last_seen = clock.mono()
        self._asked: int | None = None
        self._complained = False
        node = f"{given.group}/{{}}/{given.edge_node}"
        topics = [f"{NAMESPACE}/{node.format(kind)}" for kind in ("NBIRTH", "NDATA", "NDEATH")]
        # The sequence runs over the messages of all its devices.
        topics += [f"{NAMESPACE}/{node.format(kind)}/+" for kind in ("DBIRTH", "DDATA", "DDEATH")]
        self._connection = Connection(given, tuple(topics), self._message, clock, subscribed=self._ask)
        self._connection.start()

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        # What stands here is worth nothing any more once nobody would tell of its end.
        up = self._connection.check(alive=self._connection.alive)
        with self._lock:
            born = self._node.born
            due = self._hold.due(self._clock.wall())
        if born:
            self._last_seen = self._clock.mono()
            self._inbox.up()
        if due.rows or due.lost:
            self._inbox.put(due.rows, lost=due.lost, gap=due.gap)
        batch = self._inbox.take(limit)
        if batch is not None and (len(batch.t) or batch.lost):
            return batch
        if up and self._clock.mono() - self._last_seen > SILENT_US:
            raise PitheadError("source.failed", f"{self._name} has not been born")
        return batch

    def wait_s(self) -> float:
        """See ``Source``."""
        return TICK_S

    def backlog(self) -> int:
        """See ``Source``."""
        return len(self._inbox)

    def close(self) -> None:
        """See ``Source``."""
        self._connection.close()

    # ---- on the client's thread

    def _message(self, topic: str, data: bytes) -> None:
        parts = topic.split("/")
        kind, device = parts[2], parts[4] if len(parts) > 4 else None  # noqa: PLR2004 - of the namespace
        with self._lock:
            try:
                if len(data) > MAX_PAYLOAD:
                    raise ValueError(f"{len(data)} bytes, limit {MAX_PAYLOAD}")  # noqa: TRY301
                wanted = self._node.message(kind, device, data, self._clock.wall())
            except ValueError as error:
                self._hold.miss(1)
                wanted = False  # the next message shows that one is missing
                if not self._complained:
                    self._complained = True
                    log.warning("source.bad_message", extra={"facts": {"topic": topic, "detail": str(error)}})
        if wanted:
            self._ask()

    def _ask(self) -> None:
        now = self._clock.mono()
        if not self._given.rebirth or (self._asked is not None and now - self._asked < ASK_AGAIN_US):
            return
        self._asked = now
        topic = f"{NAMESPACE}/{self._given.group}/NCMD/{self._given.edge_node}"
        self._connection.publish(topic, payloads.rebirth(self._clock.wall()))


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Begin to connect; whether that works shows in ``poll``."""
    given = settings(table, SparkplugSettings)
    metrics = tuple(tag.address for tag in given.tags or ()) or tuple(c.name for c in pipeline.channels)
    return SparkplugSource(given, metrics, pipeline.channels, sample_rate(given.rate_hz, pipeline), clock)
