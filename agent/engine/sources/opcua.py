"""Values of an OPC UA server by subscription, as rows at the manifest's rate.

An address is a node id (``ns=2;s=Press.Temperature``, ``i=2258``); instead of
an index, which a server may change at its next start, the namespace's own
name may stand: ``nsu=urn:plant:press;s=Temperature``. A value of bad status
is a missing sample, and so is one of uncertain status unless
``accept_uncertain`` is set.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from agent.engine.clock import Clock
from agent.engine.links.opcua import Link, OpcuaServer
from agent.engine.sources.base import TICK_S, Source, Table, sample_rate, settings
from agent.engine.sources.hold import Hold
from agent.engine.sources.loop import LoopSource
from agent.engine.sources.marks import value_of
from agent.engine.sources.tags import Address, addresses
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
OVERFLOWED: Final = 0x0480
"""Status bits: this value stands beside others that the server had no room to keep."""
ITEMS_A_CALL: Final = 500
QUEUE: Final = 10_000
DISCONNECT_S: Final = 1.0


class OpcuaSettings(OpcuaServer, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The lane's ``source`` table."""

    kind: Literal["opcua"]
    tags: tuple[Address, ...] | None = None
    rate_hz: Annotated[float, Meta(gt=0, le=1000)] | None = None
    sampling_ms: Annotated[float, Meta(ge=0, le=86_400_000)] | None = None
    """How often the server looks at each node; default: the period of the rate."""
    publishing_ms: Annotated[float, Meta(ge=10, le=60_000)] = 100.0
    """How often the server sends what it saw."""
    timestamps: Literal["source", "server", "arrival"] = "source"
    """Whose clock a value's time is; ``arrival`` where none but this device's is right."""
    max_age_s: Annotated[float, Meta(gt=0)] | None = None
    """A value that is older is missing; for servers that renew the time of values that stay the same."""
    accept_uncertain: bool = False


SETTINGS: Final = OpcuaSettings


class OpcuaSource(LoopSource):
    """One session with one subscription."""

    def __init__(
        self,
        given: OpcuaSettings,
        tags: tuple[Address, ...],
        channels: tuple[Channel, ...],
        rate_hz: float,
        clock: Clock,
    ) -> None:
        super().__init__(f"opcua {given.url}", len(tags))
        self._given, self._tags, self._channels, self._clock = given, tags, channels, clock
        self._link = Link(given, "lanes.source", "source.failed")
        self._library = self._link.library
        self._period_ms = 1000 / rate_hz
        self._tick_s = min(TICK_S, self._period_ms / 1000)
        sourced = given.timestamps != "arrival"
        # A value comes one publishing interval after it was seen at worst, and needs a moment on the way.
        self._hold = Hold(
            f"opcua {given.url}",
            len(tags),
            rate_hz,
            round(2000 * given.publishing_ms) if sourced else 0,
            None if given.max_age_s is None else round(given.max_age_s * 1e6),
        )

    async def serve(self) -> None:
        """See ``LoopSource``."""
        try:
            await self._serve()
        except self._library.ua.UaError as error:
            raise PitheadError("source.failed", str(error) or type(error).__name__) from error

    async def _serve(self) -> None:
        async with self._connected() as client:
            subscription = await self._subscribed(client)
            self.inbox.up()
            consuming = asyncio.create_task(self._consume(subscription))
            try:
                while client.state.name == "CONNECTED" and not consuming.done():
                    await asyncio.wait({consuming}, timeout=self._tick_s)
                    due = self._hold.due(self._clock.wall())
                    if due.rows or due.lost:
                        self.inbox.put(due.rows, lost=due.lost, gap=due.gap)
            finally:
                consuming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await consuming
            raise PitheadError("source.failed", "connection lost")

    async def _consume(self, subscription: Any) -> None:
        async for event in subscription:
            self._take(event)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        client = await self._link.connected(watchdog_intervall=self._given.timeout_s)
        try:
            yield client
        finally:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), DISCONNECT_S)

    async def _subscribed(self, client: Any) -> Any:
        ua = self._library.ua
        parameters = ua.CreateSubscriptionParameters()
        parameters.RequestedPublishingInterval = self._given.publishing_ms
        parameters.RequestedLifetimeCount = 10_000
        parameters.RequestedMaxKeepAliveCount = max(1, round(5000 / self._given.publishing_ms))
        parameters.MaxNotificationsPerPublish = QUEUE
        subscription = await client.create_subscription(parameters, None, queue_maxsize=QUEUE)
        nodes = [await self._node(client, tag) for tag in self._tags]
        changes = ua.DataChangeFilter(Trigger=ua.DataChangeTrigger.StatusValueTimestamp)
        refused = await self._monitor(subscription, list(enumerate(nodes)), changes)
        again = [(place, nodes[place]) for place, status in refused if "Filter" in status]
        refused = [one for one in refused if "Filter" not in one[1]]
        if again:  # such a server tells of changed values only
            refused += await self._monitor(subscription, again, None)
        if refused:
            place, status = refused[0]
            tag = self._tags[place]
            raise PitheadError("source.failed", f"channel {tag.channel!r}: {tag.address}: {status}")
        return subscription

    async def _monitor(
        self, subscription: Any, nodes: list[tuple[int, Any]], changes: Any
    ) -> list[tuple[int, str]]:
        ua = self._library.ua
        sampling = self._given.sampling_ms if self._given.sampling_ms is not None else self._period_ms
        refused = []
        for first in range(0, len(nodes), ITEMS_A_CALL):
            some = nodes[first : first + ITEMS_A_CALL]
            requests = []
            for place, node in some:
                request = ua.MonitoredItemCreateRequest()
                request.ItemToMonitor.NodeId = node
                request.ItemToMonitor.AttributeId = ua.AttributeIds.Value
                request.MonitoringMode = ua.MonitoringMode.Reporting
                request.RequestedParameters.ClientHandle = place
                request.RequestedParameters.SamplingInterval = sampling
                request.RequestedParameters.QueueSize = 2 + math.ceil(
                    2 * self._given.publishing_ms / max(sampling, 1.0)
                )
                request.RequestedParameters.DiscardOldest = True
                request.RequestedParameters.Filter = changes
                requests.append(request)
            answers = await subscription.create_monitored_items(requests)
            refused += [
                (place, answer.name)
                for (place, _), answer in zip(some, answers, strict=True)
                if isinstance(answer, ua.StatusCode)
            ]
        return refused

    async def _node(self, client: Any, tag: Address) -> Any:
        try:
            return await self._link.node(client, tag.address)
        except (self._library.ua.UaStringParsingError, ValueError) as error:
            raise PitheadError(
                "source.failed", f"channel {tag.channel!r}: {tag.address!r} is no node here: {error}"
            ) from error

    def _take(self, event: Any) -> None:
        if not hasattr(event, "data"):  # the subscription itself has changed its state
            status = getattr(getattr(event, "notification", None), "Status", None)
            raise PitheadError("source.failed", f"subscription ended: {getattr(status, 'name', event)}")
        item = event.data.monitored_item
        place, found = item.ClientHandle, item.Value
        status = found.StatusCode or self._library.ua.StatusCode()
        usable = status.is_good() or (self._given.accept_uncertain and status.is_uncertain())
        if status.value & OVERFLOWED == OVERFLOWED:
            self._hold.miss(1)
        value = self._number(place, event.value) if usable else math.nan
        self._hold.put(place, value, self._time(found), self._clock.wall())

    def _number(self, place: int, value: Any) -> float:
        if (found := value_of(value, self._channels[place])) is not None:
            return found
        tag = self._tags[place]
        raise PitheadError(
            "source.failed",
            f"channel {tag.channel!r}: {tag.address} holds a {type(value).__name__}, no number",
        )

    def _time(self, found: Any) -> int | None:
        if self._given.timestamps == "arrival":
            return None
        taken = found.SourceTimestamp if self._given.timestamps == "source" else None
        taken = taken or found.ServerTimestamp
        if taken is None:
            return None
        passed: timedelta = taken.replace(tzinfo=taken.tzinfo or UTC) - EPOCH
        return passed // MICROSECOND


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Begin to connect; whether that works shows in ``poll``."""
    given = settings(table, OpcuaSettings)
    tags = tuple(addresses(given.tags))
    source = OpcuaSource(given, tags, pipeline.channels, sample_rate(given.rate_hz, pipeline), clock)
    source.start()
    return source
