"""Rows on their way from a source's own thread to the lane's, so that no network ever holds a lane.

The thread connects and waits; the lane only takes what is there. When the
thread ends, the lane hears why, and opens another source after a while.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import Final

import numpy as np

from agent.engine.sources.base import TICK_S, Batch
from contract.errors import PitheadError

log = logging.getLogger(__name__)

MAX_WAITING: Final = 20_000
"""Rows that wait to be taken; older ones are lost, and counted."""
CLOSE_S: Final = 2.0
"""How long ``close`` waits for the thread; after that it ends by itself."""


class Inbox:
    """A bounded queue of rows. One thread puts, another takes."""

    def __init__(self, name: str, width: int, limit: int = MAX_WAITING) -> None:
        self._name, self._width, self._limit = name, width, limit
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, Sequence[float], bool]] = deque()
        self._lost = 0
        self._up = False
        self._problem: str | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def room(self) -> int:
        """How many rows may be put before the oldest is lost."""
        return max(0, self._limit - len(self._waiting))

    def put(self, rows: Sequence[tuple[int, Sequence[float]]], *, lost: int = 0, gap: bool = False) -> None:
        """Add ``(time, row)`` pairs; ``lost`` samples, or a ``gap``, lie before the first."""
        with self._lock:
            self._lost += lost
            for t, row in rows:
                self._waiting.append((t, row, gap))
                gap = False
            excess = len(self._waiting) - self._limit
            if excess > 0:
                for _ in range(excess):
                    self._waiting.popleft()
                self._lost += excess
                t, row, _ = self._waiting.popleft()
                self._waiting.appendleft((t, row, True))

    def miss(self, samples: int) -> None:
        """Count samples that did not come."""
        with self._lock:
            self._lost += samples

    def up(self) -> None:
        """Say that the sensor answers, though it may have no rows yet."""
        self._up = True

    def fail(self, problem: str) -> None:
        """Say why no more rows will come; the first reason stands."""
        self._problem = self._problem or problem

    def take(self, limit: int) -> Batch | None:
        """Return what is there by now; raises ``source.failed`` when nothing is and nothing will be."""
        with self._lock:
            problem = self._problem
            gap = bool(self._waiting) and self._waiting[0][2]
            rows: list[tuple[int, Sequence[float], bool]] = []
            while self._waiting and len(rows) < limit and (not rows or not self._waiting[0][2]):
                rows.append(self._waiting.popleft())
            lost, self._lost = self._lost, 0
        if rows or lost:
            return Batch(
                values=np.array([row for _, row, _ in rows], np.float64).reshape(-1, self._width),
                t=np.array([t for t, _, _ in rows], np.int64),
                lost=lost,
                continues=not gap,
            )
        if problem is not None:
            raise PitheadError("source.failed", f"{self._name}: {problem}")
        return Batch(np.empty((0, self._width)), np.empty(0, np.int64)) if self._up else None


class ThreadedSource(ABC):
    """A ``Source`` whose rows come on a thread of its own. Call ``start`` when all is set."""

    def __init__(self, name: str, width: int) -> None:
        self.inbox = Inbox(name, width)
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"source-{name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        return self.inbox.take(limit)

    def wait_s(self) -> float:
        """See ``Source``."""
        return TICK_S

    def backlog(self) -> int:
        """See ``Source``."""
        return len(self.inbox)

    def close(self) -> None:
        """See ``Source``."""
        self.stopping.set()
        self.interrupt()
        self._thread.join(CLOSE_S)

    @abstractmethod
    def work(self) -> None:
        """Put rows into the inbox until ``stopping`` is set or the sensor is gone. Runs on the own thread.

        ``OSError``, ``TimeoutError`` and ``PitheadError`` say that the sensor is gone; it must give back all
        that it holds.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """Wake ``work`` from whatever it waits for. Runs on the lane's thread."""

    def _run(self) -> None:
        try:
            self.work()
        except PitheadError as error:
            self.inbox.fail(error.detail)
        except (OSError, TimeoutError) as error:
            self.inbox.fail(str(error) or type(error).__name__)
        except Exception as error:
            # Whatever ends this thread ends the source: said here, since nobody else sees it.
            log.exception("source.broke", extra={"facts": {"source": self._thread.name}})
            self.inbox.fail(f"{type(error).__name__}: {error}")
        else:
            self.inbox.fail("it has ended")
