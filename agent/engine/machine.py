"""Whether the machine that a lane watches runs, and what is muted while it does not.

A model of a machine at work says nothing of one that stands, is set up, or
has just begun. Rows of such times are left out of all windows, as rows with
missing samples are: nothing is scored, no alarm comes, no fit learns of it.

An unknown state is another thing than a stopped machine. By default it mutes
nothing, since a broken wire must not switch the watching off; but no fit is
made from it, since a fit lasts. At the very start the first state is waited
for, for as long as a state holds.
"""

import logging
from collections import deque
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from agent.core.machine import Machine, Value
from agent.engine import sources
from agent.engine.clock import Clock
from agent.engine.feed import Feed
from agent.engine.sources.base import Batch, Table
from agent.engine.sources.marks import Marks, Texts
from contract.manifest import Pipeline

log = logging.getLogger(__name__)

Flags = NDArray[np.bool_]
Reals = NDArray[np.float64]
Times = NDArray[np.int64]
State = Literal["runs", "stopped", "settling", "unknown"]
LONG_AGO: Final = -(2**62)
MOST_KEPT: Final = 4096
"""States of a source of their own that wait for the rows of their time."""
AT_ONCE: Final = 1024
LOOKS: Final = 16
"""Batches of states that are taken before the rows; a source that always has one must not hold the lane."""
JUMP_US: Final = 1_000_000
"""States that come in order are never so far back: the clock was set back."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a batch's rows are good for."""

    muted: Flags | None = None
    """Rows that no window may touch; None where nothing is known of any machine."""
    unfit: Flags | None = None
    """Rows that no calibration may touch: these, and those of an unknown state or a fresh start."""


UNJUDGED: Final = Judged()
"""Of rows of which nobody knows whether the machine ran."""


class Mask:
    """Judges rows by the state that came with them. Used by one thread."""

    def __init__(self, machine: Machine, texts: Texts) -> None:
        self.texts = texts
        self.state: State = "unknown"
        self.muted = ""
        """Why the newest row is muted; empty where it is not."""
        self._newest: float | None = None
        """The last state that came, and when."""
        self._newest_t = LONG_AGO
        self._recipe: float | None = None
        self._ran: bool | None = None
        """In the row before; None before the first, and while the first state is waited for."""
        self._since = LONG_AGO
        """When the machine last began to run, or to make something else."""
        self._began: int | None = None
        self.become(machine)

    def become(self, machine: Machine) -> None:
        """Judge by ``machine`` from the next row on; what came before is not forgotten."""
        self._machine = machine
        self._names = machine.numbers()
        numbers = {name: number for number, name in self._names.items()}
        self._runs = [_interval(value, numbers, self.texts) for value in machine.runs]

    def runs(self, state: Reals) -> Flags:
        """Return which states are running; an unknown one is not."""
        found = np.zeros(len(state), np.bool_)
        for low, high in self._runs:
            found |= (state >= low) & (state <= high)
        return found

    def judge(self, t: Times, marks: Reals) -> Judged:
        """Return what rows of the times ``t`` (microseconds UTC) are good for.

        ``marks`` are (rows, 1 or 2): state and recipe, NaN where missing.
        """
        if not len(t):
            return Judged(np.zeros(0, np.bool_), np.zeros(0, np.bool_))
        self._follow_jumps(int(t[0]))
        settle, machine = round(self._machine.settle_s * 1e6), self._machine
        self._began = int(t[0]) if self._began is None else self._began
        waits = np.zeros(len(t), np.bool_) if self._ran is not None else self._waits(t, marks[:, 0])
        state = self._held(t, marks[:, 0])
        unknown = np.isnan(state)
        runs = (self.runs(state) | (unknown if machine.unknown == "runs" else False)) & ~waits
        first = int(np.count_nonzero(waits))
        before = np.concatenate([[runs[0] if self._ran is None else self._ran], runs[:-1]])
        if 0 < first < len(t):
            before[first] = runs[first]
        began = runs & ~before
        if marks.shape[1] > 1:
            began |= self._changes(marks[:, 1])
        since = np.maximum.accumulate(np.where(began, t, LONG_AGO))
        since = np.maximum(since, self._since)
        settling = runs & (t < since + settle)
        muted = ~runs | settling
        unfit = muted | unknown | (t < self._began + settle)
        self._ran, self._since = None if waits[-1] else bool(runs[-1]), int(since[-1])
        self._say(float(state[-1]), runs=bool(runs[-1]), settling=bool(settling[-1]))
        return Judged(muted, unfit)

    def _follow_jumps(self, t: int) -> None:
        """A clock that was set back must not mute for as long as it was wrong."""
        self._since, self._newest_t = min(self._since, t), min(self._newest_t, t)
        self._began = None if self._began is None else min(self._began, t)

    def _waits(self, t: Times, state: Reals) -> Flags:
        """Return the rows at the start that come before any state, for ``hold_s``."""
        assert self._began is not None
        never = np.logical_and.accumulate(np.isnan(state))
        found: Flags = never & (t < self._began + round(self._machine.hold_s * 1e6))
        return found

    def _held(self, t: Times, state: Reals) -> Reals:
        """Return the states, with the last one in place of those that are missing, for ``hold_s``."""
        if not np.isnan(state).any():
            self._newest, self._newest_t = float(state[-1]), int(t[-1])
            return state
        before = np.nan if self._newest is None else self._newest
        filled, at = _last_known(np.concatenate([[before], state]), np.concatenate([[self._newest_t], t]))
        held: Reals = np.where(t - at > round(self._machine.hold_s * 1e6), np.nan, filled)
        if not np.isnan(filled[-1]):
            self._newest, self._newest_t = float(filled[-1]), int(at[-1])
        return held

    def _changes(self, recipe: Reals) -> Flags:
        """Return where another recipe begins; one that is missing is the one before."""
        before = np.nan if self._recipe is None else self._recipe
        filled, _ = _last_known(np.concatenate([[before], recipe]), np.zeros(len(recipe) + 1, np.int64))
        all_of_it = np.concatenate([[before], filled])
        if not np.isnan(filled[-1]):
            self._recipe = float(filled[-1])
        found: Flags = (all_of_it[1:] != all_of_it[:-1]) & ~np.isnan(all_of_it[:-1])
        return found

    def _say(self, state: float, *, runs: bool, settling: bool) -> None:
        """Put the newest row into words that stay the same while nothing changes."""
        unknown = bool(np.isnan(state))
        kind: State = "settling" if settling else "runs" if runs else "stopped"
        self.state = "unknown" if unknown and not settling else kind
        if settling:
            self.muted = f"the machine settles for {self._machine.settle_s:g} s"
        elif runs:
            self.muted = ""
        elif unknown:
            self.muted = "the state of the machine is unknown"
        else:
            named = self._names.get(state) or self.texts.text(state)
            self.muted = f"the machine does not run: {named}" if named else "the machine does not run"

    def shown(self) -> str:
        """Return the newest state for people: its name and number, or its text."""
        if self._newest is None:
            return "-"
        if (text := self.texts.text(self._newest)) is not None:
            return text
        name = self._names.get(self._newest)
        return f"{self._newest:g}" + (f" ({name})" if name else "")

    def recipe(self) -> str | None:
        """Return the newest recipe for people."""
        if self._recipe is None:
            return None
        return self.texts.text(self._recipe) or f"{self._recipe:g}"


def _interval(value: Value, numbers: dict[str, float], texts: Texts) -> tuple[float, float]:
    if isinstance(value, tuple):
        return value
    if isinstance(value, str):
        value = numbers[value] if value in numbers else texts.number(value)
    return float(value), float(value)


def _last_known(values: Reals, t: Times) -> tuple[Reals, Times]:
    """Return for each value but the first, which is the one before, the last that is no NaN, and its time."""
    place = np.maximum.accumulate(np.where(np.isnan(values), 0, np.arange(len(values))))[1:]
    return values[place], t[place]


def check(table: Table, machine: Machine | None) -> None:
    """Raise ``config.invalid`` for what is wrong with a lane's sources as far as one sees without opening."""
    if machine is None:
        sources.check(table)
        return
    marks = Marks(machine.tags, Texts())
    if machine.source is None:
        sources.check(table, marks)
    else:
        sources.check(table)
        sources.check(machine.source, marks)


class MachineFeed:
    """Brings a lane's rows, and says what they are good for. Used by the lane's thread alone."""

    def __init__(self, lane: str, clock: Clock, feed: Feed) -> None:
        """``feed`` is the lane's own; a source of the state alone has another."""
        self._lane, self._clock, self._feed = lane, clock, feed
        self._aside = Feed(f"{lane}: machine", clock)
        self._kept: deque[tuple[int, tuple[float, ...]]] = deque()
        self._machine: Machine | None = None
        self._marks: Marks | None = None
        self.mask: Mask | None = None

    def poll(self, table: Table, pipeline: Pipeline, limit: int, machine: Machine | None) -> Batch | None:
        """Return rows as ``Feed.poll`` does, with the marks that ``machine`` asks for."""
        if machine is not self._machine:
            self._become(machine)
        if machine is None or self._marks is None:
            return self._feed.poll(table, pipeline, limit)
        if machine.source is None:
            return self._feed.poll(table, pipeline, limit, self._marks)
        self._look_aside(machine.source, self._marks)
        batch = self._feed.poll(table, pipeline, limit)
        return None if batch is None else replace(batch, marks=self._at(batch.t, len(machine.tags)))

    def said(self) -> dict[str, str]:
        """Return what a lane's state says of the machine."""
        return {} if self.mask is None else {"machine": self.mask.state, "muted": self.mask.muted}

    def judge(self, batch: Batch) -> Judged:
        """Return what the rows of ``batch`` are good for."""
        if self.mask is None or batch.marks is None:
            return UNJUDGED
        before = self.mask.state, self.mask.muted
        judged = self.mask.judge(batch.t, batch.marks)
        if (self.mask.state, self.mask.muted) != before:
            facts = {"lane": self._lane, "state": self.mask.state, "value": self.mask.shown()}
            level = logging.WARNING if self.mask.state == "unknown" else logging.INFO
            log.log(level, "machine.state", extra={"facts": facts | {"muted": self.mask.muted}})
        return judged

    def close(self) -> None:
        """Give back the sources."""
        self._feed.close()
        self._aside.close()

    def _become(self, machine: Machine | None) -> None:
        before, self._machine = self._machine, machine
        if machine is None:
            self._marks, self.mask = None, None
            self._aside.close()
            return
        same = before is not None and (before.tags, before.source) == (machine.tags, machine.source)
        if same and self.mask is not None:
            self.mask.become(machine)
            return
        self._aside.close()
        self._kept.clear()
        texts = Texts()
        self._marks, self.mask = Marks(machine.tags, texts), Mask(machine, texts)

    # ---- a source of the state alone

    def _look_aside(self, table: Table, marks: Marks) -> None:
        for _ in range(LOOKS):
            batch = self._aside.poll(table, sources.NOTHING, AT_ONCE, marks)
            if batch is None or not len(batch.t):
                break
            assert batch.marks is not None
            for t, values in zip(batch.t.tolist(), batch.marks.tolist(), strict=True):
                self._keep(t, tuple(values))
        if self._aside.problem is not None:
            # What stood last is not known to stand any more.
            self._keep(self._clock.wall(), (float("nan"),) * len(marks.tags))

    def _keep(self, t: int, values: tuple[float, ...]) -> None:
        """Remember a change; what repeats the one before says nothing new."""
        if self._kept and self._kept[-1][0] - t > JUMP_US:
            self._kept = deque((min(at, t), kept) for at, kept in self._kept)
        if self._kept and str(self._kept[-1][1]) == str(values):  # so that NaN is equal to NaN
            return
        self._kept.append((max(t, self._kept[-1][0]) if self._kept else t, values))
        if len(self._kept) > MOST_KEPT:
            self._kept.popleft()

    def _at(self, t: Times, width: int) -> Reals:
        """Return what stood at each of the times ``t``; NaN before anything did."""
        if not self._kept or not len(t):
            return np.full((len(t), width), np.nan)
        times = np.array([at for at, _ in self._kept], np.int64)
        values = np.array([(np.nan,) * width, *(value for _, value in self._kept)], np.float64)
        place = np.searchsorted(times, t, side="right")
        while len(self._kept) > 1 and self._kept[1][0] <= int(t[-1]):
            self._kept.popleft()
        return values[place]
