"""Where and when a model runs: at once on the event loop, or in a thread of its own; alone or in batches.

A thread costs two switches, some 50 us; a small model less than ten. So what
was measured to be short runs *inline*, on the loop, and everything else in
one *worker* thread for each session, since a session is not made for two.

Batching is opportunistic. Inline, the requests that came in one turn of the
loop run together at its end; in the worker, those that came while it was
busy. Neither ever waits when there is nobody to wait for (``max_delay_us``
can ask for it). What cannot be run in time is refused at once.

All methods belong to the loop's thread.
"""

import asyncio
import logging
import math
import time
from bisect import insort
from collections.abc import Callable
from typing import Final, TypeAlias

from msgspec import Struct

from agent.engine.serve.admission import Admission, Verdict
from agent.engine.serve.aimd import BatchLimit
from agent.engine.serve.jobs import MIDDLE, Job, Outputs, Result, Worker, cut, run_batch
from contract.errors import PitheadError
from inference.session import Session

log = logging.getLogger(__name__)

INLINE_S: Final = 200e-6
"""Up to this much a run may take on the loop."""
INLINE_BATCH_S: Final = 250e-6
"""And a batch of them."""
STALL_S: Final = 0.05
"""An inline run that takes longer keeps everybody waiting..."""
STALLS: Final = 3
"""...and after so many the model has its runs in a thread."""
LONELY: Final = 8
"""After so many turns with one request each, inline runs are not put off to the turn's end..."""
LONELY_FOR: Final = 32
"""...for so many requests."""
BATCH_S: Final = 0.1
"""A batch is to take no longer, where nobody has said so."""
_SMOOTH: Final = 0.1
_OUTLIER: Final = 4.0
_NS: Final = 1e-9


class Policy(Struct, frozen=True):
    """What a model's runs may take, and how much may wait for them."""

    max_batch: int = 64
    """Rows; 1 does not batch."""
    objective_s: float | None = None
    """An answer is to take no longer; None: nobody has said so."""
    preferred: tuple[int, ...] = ()
    """Batch sizes that are worth cutting to, where so many wait."""
    max_delay_us: int = 0
    """How long a request may be kept for the sake of a larger batch."""
    max_queue: int = 512
    """Requests that may wait."""
    max_wait_s: float | None = None
    """A request is refused when those before it are expected to take longer; None: see ``Admission``."""
    timeout_s: float = 30.0
    """From the request to its answer."""
    hang_s: float = 60.0
    """A run that takes longer has hung, and its session is lost."""


class Profile(Struct, frozen=True):
    """What warm-up measured of a session."""

    run_s: float
    """Median of one row; infinite where it could not be run."""
    row_s: float | None = None
    """What one more row adds to a run; None: as much as the first."""
    steady: bool = True
    """The time of a run does not depend on the values of its inputs, as far as is known."""
    batches: bool = False
    """Rows do not depend on each other, and running eight together pays."""


Finish: TypeAlias = Callable[[Job, "Outputs | PitheadError", int, int], None]
"""job, outputs or error, start and end of its run in ns of the monotonic clock."""
Ran: TypeAlias = Callable[[int, int], None]
"""rows of one run, and its ns."""


class Runner:
    """Runs one session."""

    def __init__(
        self,
        name: str,
        session: Session,
        profile: Profile,
        policy: Policy,
        finish: Finish,
        ran: Ran,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._ran = ran
        self._name, self._session, self._policy = name, session, policy
        self._finish, self._loop = finish, loop
        self.inline = profile.run_s <= INLINE_S and profile.steady
        self._stalls = 0
        self.batches = profile.batches and policy.max_batch > 1
        self._row_s = profile.run_s if math.isfinite(profile.run_s) else 0.0
        row_s = self._row_s if profile.row_s is None or not self.batches else profile.row_s
        self._admission = Admission(self._row_s, row_s, policy.objective_s, policy.max_wait_s)
        self._limit = BatchLimit(policy.objective_s or BATCH_S, policy.max_batch if self.batches else 1)
        self._queue: list[Job] = []
        self._queued_rows = self._running_rows = 0
        self._flush_at: asyncio.Handle | None = None
        self._lonely = 0
        self._worker: Worker | None = None
        self._running: dict[int, tuple[list[Job], int]] = {}
        self._batch_number = 0
        self._prioritised = False
        """Requests of other priorities than the usual have come: some may pass others."""
        self.lost = False
        """A run has hung: nothing runs here any more, and the session cannot be closed."""

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether any job waits or runs."""
        return bool(self._queue or self._running)

    @property
    def batch_limit(self) -> int:
        """Rows that may run together just now."""
        return self._limit.rows

    def submit(self, job: Job) -> None:
        """Run ``job`` and call ``finish``, perhaps before this returns.

        Raises ``serve.overloaded`` when it would not be answered in time.
        """
        queue_ = self._queue
        short = (
            self.inline and not self._running and not job.large and job.rows * self._row_s <= INLINE_BATCH_S
        )
        if short and not queue_ and (not self.batches or self._alone()):
            self._run_inline([job])
            return
        job.queued = time.monotonic_ns()
        if queue_ or self._running:
            self._admit(job)
            queue_ = self._queue
        if job.priority != MIDDLE:
            self._prioritised = True
        if not queue_ or queue_[-1].priority <= job.priority:
            queue_.append(job)
        else:
            insort(queue_, job, key=_priority)
        self._queued_rows += job.rows
        if self._running:
            self._prefetch()
        elif self._flush_at is None:
            self._flush_soon()

    def crowded(self) -> PitheadError | None:
        """Return why a request would be refused that nobody has looked into yet; None: look into it."""
        if self._prioritised or (not self._queue and len(self._running) < 2):  # noqa: PLR2004 - and the next
            return None
        now = time.monotonic_ns()
        wait = self._wait_s(self._queued_rows, now)
        return _late(wait) if self._admission.hopeless(wait, now * _NS) else None

    def tick(self, now: int) -> None:
        """Tell those whose time is over, and find out whether a run hangs; call it a few times a second."""
        if self._queue:
            late = [job for job in self._queue if job.deadline < now]
            if late:
                self._queue = [job for job in self._queue if job.deadline >= now]
                self._queued_rows = sum(job.rows for job in self._queue)
                for job in late:
                    self._refuse(job, PitheadError("serve.timeout", "it did not begin in time"))
        if not self._running:
            return
        for number, (jobs, start) in list(self._running.items()):
            if jobs and all(job.deadline < now for job in jobs):
                self._running[number] = ([], start)
                for job in jobs:
                    self._refuse(job, PitheadError("serve.timeout", "it was not ready in time"))
        if now - min(start for _, start in self._running.values()) > self._policy.hang_s * 1e9:
            self._lose()

    def close(self) -> None:
        """End the worker's thread after what it runs; the session is the caller's to close."""
        if self._worker is not None:
            self._worker.stop()

    # ---- inline

    def _alone(self) -> bool:
        """Whether it is not worth the wait to see if another request comes in this turn."""
        if self._lonely < LONELY:
            return False
        self._lonely += 1
        if self._lonely > LONELY + LONELY_FOR:
            self._lonely = LONELY - 1
        return True

    def _flush_soon(self) -> None:
        delay_us = self._policy.max_delay_us
        if delay_us and self.batches:
            self._flush_at = self._loop.call_later(delay_us * 1e-6, self._flush)
        else:
            self._flush_at = self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_at = None
        if len(self._queue) > 1:
            self._lonely = 0
        else:
            self._lonely += 1
        while self._queue and not self._running:
            batch = self._cut()
            if not batch:
                continue
            rows = sum(job.rows for job in batch)
            if self.inline and not batch[0].large and rows * self._row_s <= INLINE_BATCH_S:
                taken = self._run_inline(batch)
                if len(batch) > 1:
                    self._admission.saw(rows, taken)
            else:
                self._hand_over(batch)
                self._prefetch()

    def _run_inline(self, batch: list[Job]) -> float:
        """Return the seconds that it took."""
        start = time.monotonic_ns()
        result = run_batch(self._session, batch)
        end = time.monotonic_ns()
        if end - start > STALL_S * 1e9:
            self._stalls += 1
            if self._stalls >= STALLS:
                self.inline = False
                log.warning("model.leaves_the_loop", extra={"facts": {"model": self._name}})
        self._deliver(batch, result, start, end)
        return (end - start) * _NS

    # ---- worker

    def _hand_over(self, batch: list[Job]) -> None:
        if self._worker is None:
            self._worker = Worker(self._name, self._session, self._loop, self._returned)
        self._batch_number += 1
        self._running[self._batch_number] = (batch, time.monotonic_ns())
        self._running_rows += sum(job.rows for job in batch)
        self._worker.put(self._batch_number, batch)

    def _prefetch(self) -> None:
        """Give the worker its next batch while it runs one, if that batch would not grow by waiting."""
        if len(self._running) == 1 and self._queue:
            full = not self.batches or self._queued_rows >= self._limit.rows
            if full and (batch := self._cut()):
                self._hand_over(batch)

    def _returned(self, number: int, result: Result, start: int, end: int) -> None:
        if self.lost:
            return
        batch, _ = self._running.pop(number)
        if batch:
            self._admission.saw(sum(job.rows for job in batch), (end - start) * _NS)
        self._running_rows = sum(job.rows for jobs, _ in self._running.values() for job in jobs)
        for n, (jobs, _) in self._running.items():
            self._running[n] = (jobs, end)
        if batch:
            self._deliver(batch, result, start, end)
        if not self._queue:
            return
        if self._running:
            self._prefetch()
        else:
            self._flush()

    def _lose(self) -> None:
        self.lost = True
        hung = PitheadError("serve.model_lost", f"a run takes more than {self._policy.hang_s} s")
        jobs = [job for batch, _ in self._running.values() for job in batch] + self._queue
        self._queue, self._running = [], {}
        self._queued_rows = self._running_rows = 0
        log.error("model.hangs", extra={"facts": {"model": self._name, "requests": len(jobs)}})
        for job in jobs:
            self._refuse(job, hung)

    # ---- both

    def _admit(self, job: Job) -> None:
        policy = self._policy
        if len(self._queue) >= policy.max_queue:
            raise PitheadError("serve.overloaded", f"{len(self._queue)} requests wait", retry_after_s=1)
        admission = self._admission
        if not self._queue and len(self._running) == 1 and admission.derived:
            return  # one may always wait, so that the worker goes on without a pause
        passes = self._queue and job.priority < self._queue[0].priority
        wait = self._wait_s(0 if passes else self._queued_rows, job.queued)
        verdict = admission.ask(wait, job.rows, job.queued * _NS)
        if verdict is Verdict.TAKEN:
            return
        if verdict is Verdict.SHED:
            self._shed(job.queued)
        raise _late(wait)

    def _wait_s(self, queued_rows: int, now: int) -> float:
        """Return by how much so many rows before it are expected to make an answer later."""
        admission, wait = self._admission, 0.0
        if self._running:
            _, start = next(iter(self._running.values()))
            wait = max(0.0, admission.takes_s(self._running_rows, len(self._running)) - (now - start) * _NS)
        if not self.batches:
            return wait + admission.takes_s(queued_rows, queued_rows)
        limit = self._limit.rows
        runs, beside = divmod(queued_rows, limit)
        return wait + admission.takes_s(runs * limit, runs) + beside * admission.row_s

    def _shed(self, now: int) -> None:
        """Refuse those that wait and would wait for too long, since what seemed to be a burst goes on."""
        ahead = 0
        kept: list[Job] = []
        late: list[tuple[Job, float]] = []
        for job in self._queue:
            wait = self._wait_s(ahead, now)
            if kept and wait > self._admission.allowed_s(job.rows):
                late.append((job, wait))
            else:
                kept.append(job)
                ahead += job.rows
        self._queue = kept
        self._queued_rows = sum(job.rows for job in kept)
        for job, wait in late:
            self._refuse(job, _late(wait))

    def _cut(self) -> list[Job]:
        now = time.monotonic_ns()
        waiting = self._queue
        if len(waiting) == 1:
            batch = waiting
            self._queue = []
        else:
            batch = cut(waiting, self._limit.rows if self.batches else 1, self._policy.preferred)
            taken = set(map(id, batch))
            self._queue = [job for job in waiting if id(job) not in taken]
        self._queued_rows -= sum(job.rows for job in batch)
        alive = [job for job in batch if job.deadline >= now]
        if len(alive) != len(batch):
            for job in batch:
                if job.deadline < now:
                    self._refuse(job, PitheadError("serve.timeout", "it did not begin in time"))
            return alive
        return batch

    def _deliver(self, batch: list[Job], result: Result, start: int, end: int) -> None:
        rows = batch[0].rows if len(batch) == 1 else sum(job.rows for job in batch)
        seconds = (end - start) * _NS
        # What took much longer was kept from the processor, most likely: it counts, but not in full.
        row_s = min(seconds / (rows or 1), _OUTLIER * self._row_s) if self._row_s else seconds / (rows or 1)
        self._row_s += _SMOOTH * (row_s - self._row_s)
        if self.batches:
            self._limit.saw(rows, seconds)
        self._ran(rows, end - start)
        for job, outputs in zip(batch, result, strict=True):
            self._tell(job, outputs, start, end)

    def _refuse(self, job: Job, error: PitheadError) -> None:
        now = time.monotonic_ns()
        self._tell(job, error, now, now)

    def _tell(self, job: Job, result: Outputs | PitheadError, start: int, end: int) -> None:
        try:
            self._finish(job, result, start, end)
        except Exception:  # who cannot take an answer must not take those of others along
            log.exception("serving.answer_lost", extra={"facts": {"model": self._name}})


def _late(wait_s: float) -> PitheadError:
    return PitheadError("serve.overloaded", f"it would wait for {wait_s:.3f} s", retry_after_s=wait_s)


def _priority(job: Job) -> int:
    return job.priority
