"""The alarm in nodes of an OPC UA server.

A node is named as in the source of this kind: ``ns=2;s=Press.Alarm``, or with
the namespace's own name, ``nsu=urn:plant:press;s=Alarm``. What is written has
the node's own datatype.
"""

import asyncio
import contextlib
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from agent.engine.links.opcua import Link, OpcuaServer
from agent.engine.sinks.base import (
    WHERE,
    Control,
    Factor,
    Outputs,
    Table,
    failed,
    invalid,
    refuse_zero,
    settings,
)

DISCONNECT_S: Final = 0.5
WHOLE: Final = {
    "SByte": (-(2**7), 2**7 - 1),
    "Byte": (0, 2**8 - 1),
    "Int16": (-(2**15), 2**15 - 1),
    "UInt16": (0, 2**16 - 1),
    "Int32": (-(2**31), 2**31 - 1),
    "UInt32": (0, 2**32 - 1),
    "Int64": (-(2**63), 2**63 - 1),
    "UInt64": (0, 2**64 - 1),
}
"""Ranges by the names of OPC UA's own datatypes."""
NODES: Final = ("alarm", "score", "quality", "heartbeat")


class OpcuaSettings(OpcuaServer, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's own keys."""

    kind: Literal["opcua"]
    alarm: Annotated[str, Meta(min_length=1)]
    """Node that gets ``on``, ``off`` or ``safe``."""
    score: str | None = None
    """Node that gets the score of the newest window."""
    score_scale: Factor = 1.0
    """The score is multiplied by it, and in a whole number rounded and kept within its range."""
    quality: str | None = None
    """Node that is true (1) while the alarm is a judgement made just now."""
    heartbeat: str | None = None
    """Node that counts the writes, 0 to 32767, as long as this device is alive and may write."""


SETTINGS: Final = OpcuaSettings
CONTROL: Final = True


class OpcuaSink:
    """One session. Its event loop runs while something is written, which is at least once a minute."""

    def __init__(self, given: OpcuaSettings) -> None:
        self._given = given
        self._name = f"opcua {given.url}"
        self._link = Link(given, WHERE, "sink.failed")
        self._ua = self._link.library.ua
        self._loop = asyncio.new_event_loop()
        self._nodes: dict[str, tuple[Any, Any]] = {}
        """Node and datatype of each output."""
        self._client: Any = None
        try:
            self._do(self._connect(), 4 * given.timeout_s)
        except BaseException:
            self.close()
            raise

    def accepts(self, values: Mapping[str, float]) -> None:
        """See ``ControlSink``: what the node would hold as another value would be another alarm."""
        datatype = self._nodes["alarm"][1].name
        for key, value in values.items():
            if datatype != "Boolean" and datatype not in WHOLE:
                continue
            low, high = WHOLE.get(datatype, (0, 1))
            if not low <= value <= high or value != int(value):
                where = f"alarm {self._given.alarm!r}"
                raise failed(self._name, f"{where} is a {datatype}, which cannot hold {key} = {value}")

    def write(self, outputs: Outputs) -> None:
        """See ``ControlSink``."""
        self._do(self._write(outputs), self._given.timeout_s)

    def close(self) -> None:
        """See ``ControlSink``."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(Exception):
            self._loop.run_until_complete(self._leave())
        self._loop.close()

    def _do(self, work: Any, timeout_s: float) -> None:
        try:
            self._loop.run_until_complete(asyncio.wait_for(work, timeout_s))
        except TimeoutError as error:
            raise failed(self._name, f"no answer in {timeout_s:g} s") from error
        except (self._ua.UaError, OSError) as error:
            raise failed(self._name, str(error) or type(error).__name__) from error

    async def _connect(self) -> None:
        given = self._given
        self._client = await self._link.connected()
        for key in NODES:
            if (address := getattr(given, key)) is not None:
                self._nodes[key] = await self._node(key, address)

    async def _node(self, key: str, address: str) -> tuple[Any, Any]:
        try:
            node = self._client.get_node(await self._link.node(self._client, address))
            return node, await node.read_data_type_as_variant_type()
        except (self._ua.UaError, ValueError) as error:
            raise failed(self._name, f"{key} {address!r} is no node here: {error}") from error

    async def _write(self, outputs: Outputs) -> None:
        values: dict[str, float] = {
            "alarm": outputs.alarm,
            "quality": float(outputs.quality),
            "heartbeat": outputs.heartbeat,
        }
        if outputs.score is not None and math.isfinite(outputs.score):
            values["score"] = outputs.score * self._given.score_scale
        keys = [key for key in NODES if key in self._nodes and key in values]
        results = await self._client.uaclient.write_attributes(
            [self._nodes[key][0].nodeid for key in keys],
            [self._value(key, values[key]) for key in keys],
            self._ua.AttributeIds.Value,
        )
        for key, result in zip(keys, results, strict=True):
            if not result.is_good():
                raise failed(self._name, f"{key} {getattr(self._given, key)!r}: {result.name}")

    def _value(self, key: str, value: float) -> Any:
        datatype = self._nodes[key][1]
        name, given = datatype.name, value
        if name == "Boolean":
            return self._ua.DataValue(self._ua.Variant(bool(given), datatype))
        if name in WHOLE:
            low, high = WHOLE[name]
            return self._ua.DataValue(self._ua.Variant(round(min(max(given, low), high)), datatype))
        if name in {"Float", "Double"}:
            return self._ua.DataValue(self._ua.Variant(float(given), datatype))
        raise failed(self._name, f"{key} {getattr(self._given, key)!r} holds a {name}, no number")

    async def _leave(self) -> None:
        if self._client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._client.disconnect(), DISCONNECT_S)
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check(table: Table, keys: Control) -> None:
    """Raise ``config.invalid`` for values that are no numbers, and for one node that two outputs have."""
    given = settings(table, OpcuaSettings)
    refuse_zero(given.score_scale)
    for key in ("on", "off", "safe"):
        if not math.isfinite(value := getattr(keys, key)):
            raise invalid(key, f"is {value}, no number")
    taken: dict[str, str] = {}
    for key in NODES:
        if (address := getattr(given, key)) is None:
            continue
        if address in taken:
            raise invalid(key, f"is {address!r}, which {taken[address]} is written to")
        taken[address] = key


def open_sink(table: Table) -> OpcuaSink:
    """Connect and look at the nodes; raises ``sink.failed``."""
    return OpcuaSink(settings(table, OpcuaSettings))
