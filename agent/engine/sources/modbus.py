"""Registers of a controller by Modbus TCP, read at the manifest's rate.

An address is ``holding:100``, ``input:3``, ``coil:0`` or ``discrete:7``,
counted from 0 as on the wire; ``holding:100.5`` is one bit of a register, and
``3/holding:100`` asks unit 3 behind a gateway. Neighbours are read at once.

A controller that is busy, or a unit behind a gateway that is silent, gives
missing samples; an address that it does not have ends the connection, since
nothing but another address will mend it.
"""

import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from msgspec import Meta

from agent.engine.clock import Clock
from agent.engine.links.modbus import FORMATS, HIGHEST, HIGHEST_UNIT, READS, Link, ModbusServer
from agent.engine.sources.base import Source, Table, sample_rate, settings
from agent.engine.sources.inbox import ThreadedSource
from agent.engine.sources.tags import Address, addresses
from contract.errors import PitheadError
from contract.manifest import Pipeline

Kind = Literal["holding", "input", "coil", "discrete"]

ADDRESS: Final = re.compile(r"(?:(\d{1,3})/)?(holding|input|coil|discrete):(\d{1,5})(?:\.(\d{1,2}))?")
MAX_REGISTERS: Final = 125
"""In one request, by the protocol."""
MAX_BITS: Final = 2000
BITS: Final = 16
CATCH_UP: Final = 4
"""Periods that a slow answer may delay the next reads, which then follow at once; more are lost."""
ILLEGAL: Final = {1: "function", 2: "address", 3: "value"}
"""Exception codes that will come again however often one asks."""


class ModbusSettings(ModbusServer, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The lane's ``source`` table."""

    kind: Literal["modbus"]
    tags: tuple[Address, ...] | None = None
    rate_hz: Annotated[float, Meta(gt=0, le=100)] | None = None
    max_gap: Annotated[int, Meta(ge=0, le=120)] = 0
    """Registers or bits that nobody wants and that may be read along, to save a request."""


SETTINGS: Final = ModbusSettings


@dataclass(frozen=True, slots=True)
class Point:
    """Where the value of one channel lies."""

    place: int
    """Index of the channel."""
    unit: int
    kind: Kind
    start: int
    count: int
    """Registers, or 1 bit."""
    format: str
    """Of ``struct``; empty for a bit."""
    bit: int = 0

    @property
    def end(self) -> int:
        """The first register behind."""
        return self.start + self.count


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbours that one request reads."""

    unit: int
    kind: Kind
    start: int
    count: int
    points: tuple[Point, ...]

    def __str__(self) -> str:
        return f"{self.unit}/{self.kind}:{self.start}..{self.start + self.count - 1}"

    def values(self, answer: Any, word_order: str) -> Iterator[tuple[int, float]]:
        """Return ``(channel, value)`` from the answer to this request."""
        if self.kind in {"coil", "discrete"}:
            for point in self.points:
                yield point.place, float(answer.bits[point.start - self.start])
            return
        for point in self.points:
            words = answer.registers[point.start - self.start : point.end - self.start]
            yield point.place, decoded(words, point, word_order)


def decoded(words: Sequence[int], point: Point, word_order: str) -> float:
    """Return the value of ``words``, 16 bits each."""
    if not point.format:
        return float(words[0] >> point.bit & 1)
    ordered = words if word_order == "big" else words[::-1]
    (value,) = struct.unpack(">" + point.format, struct.pack(f">{len(words)}H", *ordered))
    return float(value)


def parsed(tags: Sequence[Address], unit_id: int) -> tuple[Point, ...]:
    """Return where each tag lies; ``config.invalid`` names the tag that says nothing."""
    return tuple(_point(place, tag, unit_id) for place, tag in enumerate(tags))


def _point(place: int, tag: Address, unit_id: int) -> Point:
    match = ADDRESS.fullmatch(tag.address)
    if match is None:
        raise _invalid(tag, "is none of holding:N, input:N, coil:N, discrete:N (N from 0), unit/holding:N")
    unit, kind, start, bit = match[1], match[2], int(match[3]), match[4]
    digital = kind in {"coil", "discrete"}
    datatype = tag.datatype or ("bit" if digital or bit is not None else "uint16")
    if (datatype == "bit") != (digital or bit is not None):
        raise _invalid(
            tag, f"does not go with datatype {datatype!r}: a bit is a coil, a discrete or holding:N.bit"
        )
    if datatype != "bit" and datatype not in FORMATS:
        raise _invalid(tag, f"has datatype {datatype!r}, not one of {', '.join(FORMATS)}, bit")
    if bit is not None and (digital or int(bit) >= BITS):
        raise _invalid(tag, "names a bit that is not one of 0 to 15 of a register")
    code = FORMATS.get(datatype, "")
    point = Point(
        place=place,
        unit=unit_id if unit is None else int(unit),
        kind=kind,  # type: ignore[arg-type]  # the expression allows no other
        start=start,
        count=max(1, struct.calcsize(">" + code) // 2),
        format=code,
        bit=int(bit or 0),
    )
    if point.unit > HIGHEST_UNIT or point.end > HIGHEST + 1:
        raise _invalid(tag, "lies beyond register 65535 or unit 255")
    return point


def _invalid(tag: Address, problem: str) -> PitheadError:
    return PitheadError(
        "config.invalid",
        f"lanes.source.tags: channel {tag.channel!r}: address {tag.address!r} {problem}",
        key="tags",
    )


def grouped(points: Sequence[Point], max_gap: int) -> tuple[Block, ...]:
    """Return as few requests as ``max_gap`` and the protocol's limits allow."""
    blocks: list[Block] = []
    for point in sorted(points, key=lambda p: (p.unit, p.kind, p.start, p.end)):
        last = blocks[-1] if blocks else None
        limit = MAX_BITS if point.kind in {"coil", "discrete"} else MAX_REGISTERS
        if (
            last is not None
            and (last.unit, last.kind) == (point.unit, point.kind)
            and point.start <= last.start + last.count + max_gap
            and point.end - last.start <= limit
        ):
            count = max(last.count, point.end - last.start)
            blocks[-1] = Block(last.unit, last.kind, last.start, count, (*last.points, point))
        else:
            blocks.append(Block(point.unit, point.kind, point.start, point.count, (point,)))
    return tuple(blocks)


class ModbusSource(ThreadedSource):
    """One connection, one row each period."""

    def __init__(
        self, given: ModbusSettings, points: tuple[Point, ...], rate_hz: float, clock: Clock
    ) -> None:
        super().__init__(f"modbus {given.host}:{given.port}", len(points))
        self._given, self._clock = given, clock
        self._period = round(1e6 / rate_hz)
        self._blocks = grouped(points, given.max_gap)
        self._width = len(points)
        self._socket: socket.socket | None = None
        self._link = Link(given, "source.failed")

    def interrupt(self) -> None:
        """See ``ThreadedSource``."""
        if (held := self._socket) is not None:
            try:
                held.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already, or was never connected

    def work(self) -> None:
        """See ``ThreadedSource``."""
        with self._connected() as client:
            due = self._clock.mono()
            lost = 0
            while not self.stopping.wait(max(0, due - self._clock.mono()) / 1e6):
                t = self._clock.wall()
                row = self._read(client)
                self.inbox.put([(t, row)], lost=lost, gap=lost > 0)
                self.inbox.up()
                due += self._period
                behind = max(0, (self._clock.mono() - due) // self._period)
                lost = behind if behind > CATCH_UP else 0
                due += lost * self._period

    def _read(self, client: Any) -> list[float]:
        row = [float("nan")] * self._width
        for block in self._blocks:
            answer = self._ask(client, block)
            if not answer.isError():
                for place, value in block.values(answer, self._given.word_order):
                    row[place] = value
            elif answer.exception_code in ILLEGAL:
                raise PitheadError(
                    "source.failed",
                    f"{block}: illegal {ILLEGAL[answer.exception_code]} (exception {answer.exception_code})",
                )
        return row

    def _ask(self, client: Any, block: Block) -> Any:
        read = {
            "holding": client.read_holding_registers,
            "input": client.read_input_registers,
            "coil": client.read_coils,
            "discrete": client.read_discrete_inputs,
        }[block.kind]
        try:
            answer = read(block.start, count=block.count, device_id=block.unit)
        except self._link.error as error:
            raise PitheadError("source.failed", f"{block}: {self._link.told(error)}") from error
        if not answer.isError():
            got = len(answer.bits) if block.kind in {"coil", "discrete"} else len(answer.registers)
            if answer.function_code != READS[block.kind]:
                raise PitheadError(
                    "source.failed", f"{block}: the answer is of function {answer.function_code}"
                )
            if got < block.count or (block.kind in {"holding", "input"} and got > block.count):
                raise PitheadError("source.failed", f"{block}: {got} values came for {block.count}")
        return answer

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        client, self._socket = self._link.connected()
        with closing(client):
            yield client


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Begin to connect; whether that works shows in ``poll``."""
    given = settings(table, ModbusSettings)
    points = parsed(addresses(given.tags), given.unit_id)
    rate = sample_rate(given.rate_hz, pipeline)
    source = ModbusSource(given, points, rate, clock)
    source.start()
    return source
