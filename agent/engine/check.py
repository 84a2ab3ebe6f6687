"""Watch a lane's source for a few seconds, as a person does who has just connected the wires.

What is shown is what the lane would get: after units are converted, and
judged by the ranges of the model's manifest.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from agent.core.machine import Machine
from agent.engine.clock import Clock
from agent.engine.feed import Feed
from agent.engine.machine import MachineFeed, Mask
from agent.engine.sources.base import Batch, Table
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

ROWS_AT_ONCE: Final = 1024
SHOW_US: Final = 500_000
SLOW: Final = 0.9
"""Of the wanted rate; a source below it is too slow, and above its inverse too fast."""


class ChannelSeen(Struct, frozen=True):
    """What came of one channel."""

    name: str
    unit: str
    value: float | None = None
    """The newest; None where it is missing."""
    low: float | None = None
    """Least of all values, in range or not."""
    high: float | None = None
    minimum: float | None = None
    """Of the manifest's range."""
    maximum: float | None = None
    missing: int = 0
    """Rows without a finite value."""
    outside: int = 0
    """Rows with a value out of the range."""
    result: str = "no value"
    """``ok``, or what is wrong."""


class MachineSeen(Struct, frozen=True):
    """What came of the machine's state."""

    tag: str
    value: str = "-"
    """The newest, with its name; ``-`` before any."""
    state: str = "unknown"
    """``runs``, ``stopped``, ``settling`` or ``unknown``."""
    muted: str = ""
    """Why a lane would score nothing now; empty where it would."""
    recipe: str | None = None
    missing: int = 0
    """Rows without a state."""
    result: str = "no value"
    """``ok``, or what is wrong."""


class SourceSeen(Struct, frozen=True):
    """What came of a source."""

    lane: str
    kind: str
    seconds: float
    rows: int
    rate_hz: float | None
    """Of the rows, by their times; None for fewer than two."""
    wanted_hz: float | None
    lost: int
    """Samples that should have come and did not."""
    gaps: int
    behind_s: float | None
    """Age of the newest row when it was taken."""
    channels: tuple[ChannelSeen, ...]
    code: str | None = None
    detail: str = ""
    """Why there are no rows, if that is so at the end."""
    machine: MachineSeen | None = None

    @property
    def good(self) -> bool:
        """Whether a model can work with it."""
        machine_ok = self.machine is None or self.machine.result == "ok"
        fine = machine_ok and all(c.result == "ok" for c in self.channels)
        return self.code is None and self.rows > 0 and fine and not self.pace

    @property
    def pace(self) -> str:
        """What is wrong with the rate; empty where nothing is, or nothing is known."""
        if self.rate_hz is None or self.wanted_hz is None or self.kind == "images":
            return ""
        if self.rate_hz < SLOW * self.wanted_hz:
            return "TOO SLOW"
        return "TOO FAST" if self.rate_hz > self.wanted_hz / SLOW else ""


class Tally:
    """Counts what comes. Holds no rows."""

    def __init__(self, lane: str, table: Table, pipeline: Pipeline, machine: Machine | None = None) -> None:
        self._machine = None if machine is None else MachineSeen(machine.tag)
        rate = table.get("rate_hz")
        self._lane, self._kind = lane, str(table.get("kind"))
        self._wanted = float(rate) if isinstance(rate, int | float) else pipeline.sample_rate_hz
        if self._wanted is not None and isinstance(speed := table.get("speed"), int | float):
            self._wanted *= speed  # a recording may be played faster than it was made
        self._channels = [
            ChannelSeen(c.name, c.unit, minimum=c.minimum, maximum=c.maximum) for c in pipeline.channels
        ]
        self._ranges = [_range(c) for c in pipeline.channels]
        self._rows = self._lost = self._gaps = 0
        self._first: int | None = None
        self._last = 0
        self._behind: float | None = None

    def add(self, batch: Batch, now: int) -> None:
        """Count a batch that was taken at ``now``, microseconds UTC."""
        self._lost += batch.lost
        if not len(batch.t):
            return
        self._gaps += not batch.continues and self._rows > 0
        self._rows += len(batch.t)
        self._first = int(batch.t[0]) if self._first is None else self._first
        self._last = int(batch.t[-1])
        self._behind = round((now - self._last) / 1e6, 3)
        for place, seen in enumerate(self._channels):
            self._channels[place] = _with(seen, batch.values[:, place], *self._ranges[place])

    def judged(self, batch: Batch, mask: Mask | None) -> None:
        """Note the machine's state at the end of ``batch``."""
        if self._machine is None or mask is None or batch.marks is None or not len(batch.t):
            return
        missing = self._machine.missing + int(np.isnan(batch.marks[:, 0]).sum())
        value = mask.shown()
        self._machine = replace(
            self._machine,
            value=value,
            state=mask.state,
            muted=mask.muted,
            recipe=mask.recipe(),
            missing=missing,
            result="no value" if value == "-" else "missing at times" if missing else "ok",
        )

    def seen(self, seconds: float, problem: PitheadError | None) -> SourceSeen:
        """Return the state after ``seconds``."""
        span = 0 if self._first is None else self._last - self._first
        rate = None if span <= 0 else round((self._rows - 1) * 1e6 / span, 3)
        return SourceSeen(
            lane=self._lane,
            kind=self._kind,
            seconds=round(seconds, 1),
            rows=self._rows,
            rate_hz=rate,
            wanted_hz=self._wanted,
            lost=self._lost,
            gaps=self._gaps,
            behind_s=self._behind,
            channels=tuple(self._channels),
            code=None if problem is None else problem.code,
            detail="" if problem is None else problem.detail,
            machine=self._machine,
        )


def _range(channel: Channel) -> tuple[float, float]:
    low = -math.inf if channel.minimum is None else channel.minimum
    return low, math.inf if channel.maximum is None else channel.maximum


def _with(
    seen: ChannelSeen, values: np.ndarray[tuple[int], np.dtype[np.float64]], low: float, high: float
) -> ChannelSeen:
    finite = values[np.isfinite(values)]
    missing = seen.missing + len(values) - len(finite)
    if not len(finite):
        return replace(seen, value=None, missing=missing, result=_result(seen.high, missing, seen.outside))
    outside = seen.outside + int(((finite < low) | (finite > high)).sum())
    least, most = float(finite.min()), float(finite.max())
    newest = float(values[-1])
    return replace(
        seen,
        value=newest if math.isfinite(newest) else None,
        low=least if seen.low is None else min(seen.low, least),
        high=most if seen.high is None else max(seen.high, most),
        missing=missing,
        outside=outside,
        result=_result(most, missing, outside),
    )


def _result(any_value: float | None, missing: int, outside: int) -> str:
    if any_value is None:
        return "no value"
    if outside:
        return "out of range"
    return "missing at times" if missing else "ok"


def watch(
    lane: str,
    table: Table,
    pipeline: Pipeline,
    clock: Clock,
    *,
    seconds: float,
    sleep: Callable[[float], object],
    show: Callable[[SourceSeen], None],
    machine: Machine | None = None,
) -> SourceSeen:
    """Return what came within ``seconds``; ``show`` gets the state twice a second meanwhile."""
    feed, tally = Feed(lane, clock), Tally(lane, table, pipeline, machine)
    both = MachineFeed(lane, clock, feed)
    began = clock.mono()
    end, shown = began + round(seconds * 1e6), began
    try:
        while (now := clock.mono()) < end:
            batch = both.poll(table, pipeline, ROWS_AT_ONCE, machine)
            if batch is not None:
                tally.add(batch, clock.wall())
                both.judge(batch)
                tally.judged(batch, both.mask)
            if now - shown >= SHOW_US:
                shown = now
                show(tally.seen((now - began) / 1e6, feed.problem))
            sleep(min(max(feed.wait_s(), 0.001), 0.1))
        return tally.seen(seconds, feed.problem)
    finally:
        both.close()


def render(seen: SourceSeen) -> str:
    """Return a table for people."""
    lines = [_head(seen)]
    if seen.code is not None:
        lines.append(f"{seen.code}: {seen.detail}")
    rows = [("channel", "value", "unit", "seen", "range", "missing", "outside", "result")]
    for c in seen.channels:
        between = "" if c.low is None else f"{_short(c.low)} .. {_short(c.high)}"
        bounds = (
            "" if c.minimum is None and c.maximum is None else f"{_short(c.minimum)} .. {_short(c.maximum)}"
        )
        counts = str(c.missing or ""), str(c.outside or "")
        rows.append((c.name, _short(c.value), c.unit, between, bounds, *counts, c.result))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    if seen.machine is not None:
        lines.append(_machine(seen.machine))
    return "\n".join(lines) + "\n"


def _machine(seen: MachineSeen) -> str:
    parts = [f"machine {seen.tag} = {seen.value}"]
    if seen.recipe is not None:
        parts.append(f"recipe {seen.recipe}")
    parts.append(f"muted: {seen.muted}" if seen.muted else "runs" if seen.state == "runs" else seen.state)
    if seen.missing:
        parts.append(f"{seen.missing} missing")
    if seen.result == "no value":
        parts.append("NO VALUE")
    return ", ".join(parts)


def _head(seen: SourceSeen) -> str:
    parts = [f"lane {seen.lane}: {seen.kind}, {seen.rows} rows in {seen.seconds:g} s"]
    if seen.rate_hz is not None:
        parts.append(f"{seen.rate_hz:g} a second")
        if seen.pace:
            parts.append(f"{seen.pace}, the model wants {seen.wanted_hz:g}")
    if seen.lost:
        parts.append(f"{seen.lost} lost")
    if seen.gaps:
        parts.append(f"{seen.gaps} gaps")
    if seen.behind_s is not None:
        parts.append(f"the newest {seen.behind_s:.1f} s old")
    return ", ".join(parts)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
