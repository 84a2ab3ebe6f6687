"""The alarm in a coil or register of a controller, by Modbus TCP.

An address is ``coil:0`` or ``holding:100``, counted from 0 as on the wire;
``3/holding:100`` is in unit 3 behind a gateway.
"""

import math
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from agent.engine.links.modbus import FORMATS, HIGHEST, HIGHEST_UNIT, WRITES, Link, ModbusServer
from agent.engine.sinks.base import (
    Control,
    Factor,
    Outputs,
    Table,
    always,
    failed,
    invalid,
    refuse_zero,
    settings,
)

ADDRESS: Final = re.compile(r"(?:(\d{1,3})/)?(coil|holding):(\d{1,5})")


class ModbusSettings(ModbusServer, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's own keys."""

    kind: Literal["modbus"]
    alarm: str
    """Coil or register that gets ``on``, ``off`` or ``safe``."""
    score: str | None = None
    """Register that gets the score of the newest window."""
    score_scale: Factor = 1.0
    """The score is multiplied by it, and in a whole number rounded and kept within its range."""
    score_datatype: Literal["int16", "uint16", "int32", "uint32", "float32", "float64"] = "uint16"
    quality: str | None = None
    """Coil or register that is 1 while the alarm is a judgement made just now, else 0."""
    heartbeat: str | None = None
    """Register that counts the writes, 0 to 32767, as long as this device is alive and may write."""


SETTINGS: Final = ModbusSettings
CONTROL: Final = True


@dataclass(frozen=True, slots=True)
class Place:
    """Where one output goes."""

    unit: int
    coil: bool
    start: int

    def __str__(self) -> str:
        return f"{self.unit}/{'coil' if self.coil else 'holding'}:{self.start}"


def place(key: str, address: str, unit_id: int, *, coil_too: bool = True, registers: int = 1) -> Place:
    """Return where ``address`` is; ``config.invalid`` names the key."""
    match = ADDRESS.fullmatch(address)
    if match is None or (match[2] == "coil" and not coil_too):
        raise invalid(key, f"is {address!r}, not {'coil:N, ' if coil_too else ''}holding:N or UNIT/holding:N")
    found = Place(unit_id if match[1] is None else int(match[1]), match[2] == "coil", int(match[3]))
    if found.unit > HIGHEST_UNIT or found.start + registers > HIGHEST + 1:
        raise invalid(key, f"is {address!r}: beyond register {HIGHEST} or unit {HIGHEST_UNIT}")
    return found


def places(given: ModbusSettings) -> dict[str, Place]:
    """Return where each output goes; ``config.invalid`` for what is no place, or the place of two."""
    words = struct.calcsize(">" + FORMATS[given.score_datatype]) // 2
    found = {"alarm": place("alarm", given.alarm, given.unit_id)}
    if given.score is not None:
        found["score"] = place("score", given.score, given.unit_id, coil_too=False, registers=words)
    if given.quality is not None:
        found["quality"] = place("quality", given.quality, given.unit_id)
    if given.heartbeat is not None:
        found["heartbeat"] = place("heartbeat", given.heartbeat, given.unit_id, coil_too=False)
    taken: dict[Place, str] = {}
    for key, where in found.items():
        for n in range(words if key == "score" else 1):
            one = Place(where.unit, where.coil, where.start + n)
            if one in taken:
                raise invalid(key, f"is {getattr(given, key)!r}, which {taken[one]} is written to")
            taken[one] = key
    return found


def registers(value: float, datatype: str, word_order: str) -> list[int]:
    """Return ``value`` as registers; what is beyond a whole number's range becomes its end."""
    code = FORMATS[datatype]
    number: float = value
    largest = 3.4028234e38 if code == "f" else sys.float_info.max
    if code not in "fd":
        bits = 8 * struct.calcsize(code)
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if code.islower() else (0, 2**bits - 1)
        number = round(min(max(value, low), high))
    else:
        number = min(max(value, -largest), largest)
    data = struct.pack(">" + code, number)
    words = list(struct.unpack(f">{len(data) // 2}H", data))
    return words if word_order == "big" else words[::-1]


class ModbusSink:
    """One connection; each output is written by a request of its own, the alarm first."""

    def __init__(self, given: ModbusSettings) -> None:
        self._given, self._places = given, places(given)
        self._name = f"modbus {given.host}:{given.port}"
        self._link = Link(given, "sink.failed")
        self._client, _ = self._link.connected()
        self._may_write: Callable[[], bool] = always

    def write(self, outputs: Outputs) -> None:
        """See ``ControlSink``."""
        self._may_write = outputs.may_write
        self._put("alarm", outputs.alarm)
        self._put("quality", float(outputs.quality))
        if outputs.score is not None and math.isfinite(outputs.score) and "score" in self._places:
            given, where = self._given, self._places["score"]
            words = registers(outputs.score * given.score_scale, given.score_datatype, given.word_order)
            self._ask("score", self._client.write_registers, where, words)
        self._put("heartbeat", outputs.heartbeat)

    def close(self) -> None:
        """See ``ControlSink``."""
        self._client.close()

    def _put(self, key: str, value: float) -> None:
        if (where := self._places.get(key)) is None:
            return
        if where.coil:
            self._ask(key, self._client.write_coil, where, bool(value))
        else:
            self._ask(key, self._client.write_register, where, int(value) % (HIGHEST + 1))

    def _ask(self, key: str, write: Callable[..., Any], where: Place, value: object) -> None:
        if not self._may_write():  # each request may take its time
            raise failed(self._name, "the bypass was switched on")
        try:
            answer = write(where.start, value, device_id=where.unit)
        except self._link.error as error:
            raise failed(self._name, f"{key} {where}: {self._link.told(error)}") from error
        if answer.isError():
            raise failed(self._name, f"{key} {where}: refused, exception {answer.exception_code}")
        if (
            answer.function_code
            != WRITES["coil" if where.coil else "several" if key == "score" else "holding"]
        ):
            raise failed(self._name, f"{key} {where}: the answer is of function {answer.function_code}")


def check(table: Table, keys: Control) -> None:
    """Raise ``config.invalid`` for addresses that are none, and values that a register cannot hold."""
    given = settings(table, ModbusSettings)
    coil = places(given)["alarm"].coil
    refuse_zero(given.score_scale)
    for key in ("on", "off", "safe"):
        value = getattr(keys, key)
        if coil and value not in (0, 1):
            raise invalid(key, f"is {value}; a coil holds true or false")
        if not -(2**15) <= value <= HIGHEST or value != int(value):
            raise invalid(key, f"is {value}; a register holds whole numbers from -32768 to {HIGHEST}")


def open_sink(table: Table) -> ModbusSink:
    """Connect; raises ``OSError`` when nobody answers, ``sink.failed`` when pymodbus is missing."""
    return ModbusSink(settings(table, ModbusSettings))
