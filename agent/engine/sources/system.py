"""The device's own vital signs, by psutil and ``/proc/pressure``.

Byte rates are given as log10(1 + bytes per second) since the reading before,
since they span nine decades and a pipeline can only shift and scale. What a
kernel or a container does not show reads as 0, so that one model fits all.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
import psutil
from msgspec import Meta, Struct

from agent.engine.clock import Clock
from agent.engine.sources.base import Batch, Source, Table, sample_rate, settings
from contract.errors import PitheadError
from contract.manifest import Pipeline

PRESSURE: Final = Path("/proc/pressure")
DEFAULT_RATE_HZ: Final = 1.0
MOST_MISSING: Final = 4
"""Periods in a row without a reading that a window may bridge."""


class SystemSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The lane's ``source`` table."""

    kind: Literal["system"]
    rate_hz: Annotated[float, Meta(gt=0, le=20)] | None = None


SETTINGS: Final = SystemSettings


class Counters:
    """Rates from counters that only rise; a first reading and a counter that was reset give 0."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last: dict[str, tuple[int, int]] = {}

    def log_rate(self, name: str, count: int) -> float:
        """Return log10(1 + growth per second) since the call before."""
        now = self._clock.mono()
        before, at = self._last.get(name, (count, now))
        self._last[name] = count, now
        if now <= at or count <= before:
            return 0.0
        return math.log10(1 + (count - before) / (now - at) * 1e6)


def pressure(resource: str) -> float:
    """Return ``some avg10`` of a resource in percent, 0 where the kernel has none."""
    try:
        text = (PRESSURE / resource).read_text(encoding="ascii")
    except OSError:
        return 0.0
    for word in text.split():
        if word.startswith("avg10="):
            return float(word.removeprefix("avg10="))
    return 0.0


def _received_and_sent() -> int:
    nics = psutil.net_io_counters(pernic=True)
    return sum(n.bytes_recv + n.bytes_sent for name, n in nics.items() if name != "lo")


class Readings:
    """How to read each channel."""

    def __init__(self, clock: Clock) -> None:
        self._counters = Counters(clock)
        self._cores = os.cpu_count() or 1
        self.channels: dict[str, Callable[[], float]] = {
            "cpu_percent": lambda: min(100.0, psutil.cpu_percent(interval=None)),
            "memory_percent": lambda: psutil.virtual_memory().percent,
            "disk_read_log": lambda: self._disk("read_bytes"),
            "disk_write_log": lambda: self._disk("write_bytes"),
            "net_log": lambda: self._counters.log_rate("net", _received_and_sent()),
            "pressure_cpu": lambda: pressure("cpu"),
            "pressure_io": lambda: pressure("io"),
            "pressure_memory": lambda: pressure("memory"),
            "load_per_core": lambda: os.getloadavg()[0] / self._cores,
        }

    def _disk(self, field: str) -> float:
        total = psutil.disk_io_counters(perdisk=False)
        return 0.0 if total is None else self._counters.log_rate(field, getattr(total, field))


class SystemSource:
    """One row each period.

    A late reading is a reading: a machine that struggles wakes its processes
    late, and that is when its windows matter. What was missed is counted.
    """

    def __init__(self, channels: tuple[str, ...], rate_hz: float, clock: Clock) -> None:
        readings = Readings(clock).channels
        for name in channels:
            if name not in readings:
                raise PitheadError(
                    "config.invalid",
                    f"lanes.source.kind system has no channel {name!r}; it has {', '.join(readings)}",
                    key="kind",
                )
        self._channels, self._clock = [readings[name] for name in channels], clock
        self._period = round(1e6 / rate_hz)
        self._read()  # what counts since the reading before starts here
        self._due = clock.mono() + self._period

    def poll(self, limit: int) -> Batch | None:  # noqa: ARG002 - there is never more than one row
        """See ``Source``."""
        now = self._clock.mono()
        if now < self._due:
            return None
        late = (now - self._due) // self._period
        self._due += (late + 1) * self._period
        return Batch(
            values=np.array([self._read()]),
            t=np.array([self._clock.wall()], np.int64),
            lost=late,
            continues=late <= MOST_MISSING,
        )

    def wait_s(self) -> float:
        """See ``Source``."""
        return max(0.0, (self._due - self._clock.mono()) / 1e6)

    def backlog(self) -> int:
        """See ``Source``."""
        return 0

    def close(self) -> None:
        """See ``Source``."""

    def _read(self) -> list[float]:
        try:
            return [float(read()) for read in self._channels]
        except (OSError, psutil.Error) as error:
            raise PitheadError("source.failed", f"system: {error}") from error


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """See ``sources.SOURCES``."""
    given = settings(table, SystemSettings)
    rate = sample_rate(given.rate_hz, pipeline, DEFAULT_RATE_HZ)
    return SystemSource(tuple(c.name for c in pipeline.channels), rate, clock)
