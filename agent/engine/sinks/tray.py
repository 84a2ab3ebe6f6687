"""All sinks of one lane. The lane hands over what it found, and never waits.

A change of the configuration leaves alone what did not change: a sink whose
table stays the same goes on, with what waits in it. One that goes is ended,
and one that comes in its place begins after that, so that the safe value of
the old never overwrites the state of the new.
"""

import logging
import math
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.engine.clock import Clock
from agent.engine.loading import Served
from agent.engine.sinks import plan
from agent.engine.sinks.base import Message, Table, When
from agent.engine.sinks.worker import ControlWorker, MessageWorker, Worker, worker
from agent.engine.sources.base import Batch
from agent.engine.window import Windows
from agent.ports import LaneState, SinkState
from contract.errors import PitheadError
from inference.scoring import Scored

log = logging.getLogger(__name__)

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MOST_AT_ONCE: Final = 200
"""Messages made of one batch, the newest; more would hold the lane, so the others count as lost."""


class Tray:
    """``configure`` and ``stop*`` may come from the server's thread, the rest from the lane's."""

    def __init__(self, lane: str, clock: Clock) -> None:
        self._lane, self._clock = lane, clock
        self._lock = threading.Lock()
        self._open: tuple[tuple[Table, Worker], ...] = ()
        self._refused: tuple[SinkState, ...] = ()
        self._wanted: tuple[tuple[Table, ...], str] = ((), "")
        self._ending: list[Worker] = []
        self._stopped = False
        self._alarm: bool | None = None
        """State of the alarm in the newest window."""

    # ---- from the server's thread

    def configure(self, tables: Sequence[Table], bypass: str) -> None:
        """Become ``tables``; ``bypass`` is the file that stops all writes to controls while it exists."""
        wanted = (tuple(tables), bypass)
        with self._lock:
            if self._stopped or wanted == self._wanted:
                return
            kept, going, fresh = [], [], list(tables)
            for table, one in self._open:
                if table in fresh and bypass == self._wanted[1]:
                    fresh.remove(table)
                    kept.append((table, one))
                else:
                    going.append(one)
            for one in going:
                one.stop()
            self._ending = [w for w in [*self._ending, *going] if not w.join(0)]
            opened, self._refused = self._planned(fresh, bypass)
            self._open = (*kept, *opened)
            self._wanted = wanted

    def _planned(
        self, tables: Sequence[Table], bypass: str
    ) -> tuple[list[tuple[Table, Worker]], tuple[SinkState, ...]]:
        opened, refused = [], []
        for table in tables:
            try:
                one = worker(self._lane, plan(table), self._clock, bypass, self._ending)
            except PitheadError as error:
                name, kind = str(table.get("name") or table.get("kind")), str(table.get("kind"))
                facts = {"lane": self._lane, "sink": name, "code": error.code, "detail": error.detail}
                log.warning("sink.refused", extra={"facts": facts})
                refused.append(SinkState(name, kind, "failed", code=error.code, detail=error.detail[:500]))
            else:
                one.start()
                opened.append((table, one))
        return opened, tuple(refused)

    def stop_controls(self) -> None:
        """Leave every control at its safe value, whatever the lane's thread does."""
        for _, one in self._open:
            if isinstance(one, ControlWorker):
                one.stop()

    def stop(self) -> None:
        """The lane has ended: no more messages come."""
        with self._lock:
            self._stopped = True
            for _, one in self._open:
                one.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the ends after ``stop``; return whether all have ended."""
        until = self._clock.mono() + round(timeout_s * 1e6)
        workers = [one for _, one in self._open] + self._ending
        ended = [w.join((until - self._clock.mono()) / 1e6) for w in workers]
        return all(ended)

    # ---- from the lane's thread

    def states(self) -> tuple[SinkState, ...]:
        """Return how each sink is."""
        return (*(one.state() for _, one in self._open), *self._refused)

    def state(self, state: LaneState) -> None:
        """Take the lane's own state: what a lane said before it failed does not count any more.

        A version that could not be loaded is no failure of the one that still serves.
        """
        if state.state == "failed" and state.wanted_digest is None:
            for _, one in self._open:
                if isinstance(one, ControlWorker):
                    one.distrust()

    def scored(
        self, served: Served, batch: Batch, windows: Windows, scored: Scored, alarms: NDArray[np.bool_]
    ) -> None:
        """Hand over what became of some windows."""
        workers, before = self._open, self._alarm
        if not len(alarms):
            return
        self._alarm = bool(alarms[-1])
        if not workers:
            return
        found = Found(self._lane, served, batch, windows, scored, alarms)
        for _, one in workers:
            if isinstance(one, ControlWorker):
                if (score := found.newest_score()) is not None:
                    one.judged(score, alarm=bool(alarms.any()))
            elif isinstance(one, MessageWorker):
                places = which(one.keys.when, alarms, before=before)
                if (more := len(places) - MOST_AT_ONCE) > 0:
                    one.queue.lose(more)
                    places = places[more:]
                if len(places):
                    shares = one.keys.contributions
                    one.queue.put([found.message(i, shares=shares) for i in places.tolist()])


class Found:
    """What one batch gave; a message is made once, however many sinks send it."""

    def __init__(
        self,
        lane: str,
        served: Served,
        batch: Batch,
        windows: Windows,
        scored: Scored,
        alarms: NDArray[np.bool_],
    ) -> None:
        self._lane, self._served, self._batch = lane, served, batch
        self._windows, self._scored, self._alarms = windows, scored, alarms
        self._made: dict[tuple[int, bool], Message] = {}

    def newest_score(self) -> float | None:
        """Return the score of the newest window that has one."""
        judged = np.flatnonzero(self._scored.good)
        return float(self._scored.scores[judged[-1]]) if len(judged) else None

    def message(self, i: int, *, shares: bool) -> Message:
        """Return what goes out for the ``i``-th window, with each channel's share or without."""
        if (i, shares) not in self._made:
            self._made[i, shares] = self._message(i, shares=shares)
        return self._made[i, shares]

    def _message(self, i: int, *, shares: bool) -> Message:
        served, score = self._served, float(self._scored.scores[i])
        good = math.isfinite(score)
        return Message(
            lane=self._lane,
            model=served.spec.model_name,
            version=served.spec.version,
            time=iso(int(self._batch.t[int(self._windows.ends[i])])),
            score=score if good else None,
            threshold=served.threshold,
            alarm=bool(self._alarms[i]),
            contributions=served.scorer.shares(self._scored, i) if shares and good else {},
        )


def which(when: When, alarms: NDArray[np.bool_], *, before: bool | None) -> NDArray[np.int64]:
    """Return the windows that ``when`` asks for; ``before`` is the state before them, if there was one.

    The first window of a lane is a change: from nothing known.
    """
    if when == "every window":
        return np.arange(len(alarms))
    if when == "anomalies":
        return np.flatnonzero(alarms)
    first = before is None or bool(alarms[0]) != before
    return np.flatnonzero(np.concatenate([[first], alarms[1:] != alarms[:-1]]))


def iso(t: int) -> str:
    """Return microseconds UTC as ISO 8601."""
    return (EPOCH + timedelta(microseconds=t)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
