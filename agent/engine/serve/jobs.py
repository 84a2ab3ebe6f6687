"""Requests on their way through a session: which run together, and what each gets of it."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from contract.errors import PitheadError
from inference.session import Array, Session

log = logging.getLogger(__name__)

MIDDLE: Final = 2**31
"""The priority that stands for 0, the default."""


class Job:
    """A request on its way through a session."""

    __slots__ = ("context", "deadline", "inputs", "key", "large", "priority", "queued", "rows")

    def __init__(
        self, inputs: dict[str, Array], rows: int, key: Any, priority: int, deadline: int, context: Any
    ) -> None:
        self.inputs = inputs
        self.rows = rows
        self.key = key
        """Jobs with equal keys fit into one batch."""
        self.priority = priority or MIDDLE
        self.deadline = deadline
        """In ns of the monotonic clock."""
        self.queued = 0
        self.large = False
        """Its run may take much longer than what was measured: its shape is open, and its inputs larger."""
        self.context = context
        """Its owner's."""


Outputs: TypeAlias = dict[str, Array]
Result: TypeAlias = "Sequence[Outputs | PitheadError]"


def cut(waiting: Sequence[Job], rows: int, preferred: Sequence[int] = ()) -> list[Job]:
    """Return the jobs that run next: the first one, and what fits to it up to ``rows``, in their order.

    Where more than a preferred size waits, the largest such size that can be filled is the limit.
    """
    first = waiting[0]
    alike = [job for job in waiting if job.key == first.key and job.key is not None] or [first]
    if preferred:
        there = min(rows, sum(job.rows for job in alike))
        rows = max((size for size in preferred if size <= there), default=rows)
    batch: list[Job] = []
    left = rows
    for job in alike:
        if batch and job.rows > left:
            break
        batch.append(job)
        left -= job.rows
    return batch


def run_batch(session: Session, batch: Sequence[Job]) -> Result:
    """Return the outputs of each job, or what went wrong with it; never raises."""
    if len(batch) == 1:
        return (_run(session, batch[0].inputs),)
    names = batch[0].inputs
    try:
        together = {name: np.concatenate([job.inputs[name] for job in batch]) for name in names}
    except MemoryError:
        return [_run(session, job.inputs) for job in batch]
    outputs = _run(session, together)
    rows = sum(job.rows for job in batch)
    if isinstance(outputs, PitheadError) or any(len(array) != rows for array in outputs.values()):
        # One client's values must not be another's error.
        return [_run(session, job.inputs) for job in batch]
    shares: list[Outputs | PitheadError] = []
    at = 0
    for job in batch:
        end = at + job.rows
        shares.append({name: array[at:end] for name, array in outputs.items()})
        at = end
    return shares


def _run(session: Session, inputs: dict[str, Array]) -> "Outputs | PitheadError":
    try:
        return session.run(inputs)
    except PitheadError as error:
        return error
    except MemoryError as error:
        return PitheadError("inference.out_of_memory", str(error)[:500])
    except Exception as error:
        log.exception("model.run_failed")
        return PitheadError("inference.run_failed", f"{type(error).__name__}: {error}"[:500])


class Worker:
    """One thread, which dies with the process: a run may never end."""

    def __init__(
        self,
        name: str,
        session: Session,
        loop: asyncio.AbstractEventLoop,
        returned: Callable[[int, Result, int, int], None],
    ) -> None:
        self._session, self._loop, self._returned = session, loop, returned
        self._work: queue.SimpleQueue[tuple[int, list[Job]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"model-{name}", daemon=True).start()

    def put(self, number: int, batch: list[Job]) -> None:
        """Run a batch after those that were given before."""
        self._work.put((number, batch))

    def stop(self) -> None:
        """End after those that were given."""
        self._work.put(None)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            number, batch = work
            start = time.monotonic_ns()
            result = run_batch(self._session, batch)
            try:
                self._loop.call_soon_threadsafe(self._returned, number, result, start, time.monotonic_ns())
            except RuntimeError:  # the loop has ended; nobody waits
                return
