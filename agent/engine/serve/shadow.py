"""Ask a second version the same, beside the answer that was given, and count how far they lie apart.

The client has its answer before its shadow is thought of. A shadow run never
waits for anything, and nothing waits for it but a request to the shadow
version itself: when requests wait, when the loop has little time left, when a
shadow run is under way or the budget is used up, it is dropped and counted.

An answer that was kept is not compared: nothing ran for it, so it says
nothing of a version's time, and its question was compared when it was new.

What it costs is measured as the CPU time of the whole process from its start
to the end of the comparison: never less than its own, whatever threads the
runtime has, and hardly more where little else goes on.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from agent.engine.serve.compare import Difference, compare
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.routing import Done
from agent.engine.serve.served import Live
from agent.engine.serve.shadow_settings import Shadow
from agent.engine.serve.split import Random
from contract.errors import PitheadError
from inference.session import Array

log = logging.getLogger(__name__)

DELAY_S: Final = 0.001
"""From an answer to its shadow run: what has arrived meanwhile goes first."""
BUSY: Final = 0.7
"""A loop that computes for more than this share of its time has none for shadows."""
LAST: Final = 2**62
"""The priority of shadow runs: behind everything."""
BURST_S: Final = 1.0
"""A budget that was not used is kept for so long."""


class Budget:
    """CPU time that may be spent: a bucket that fills at ``share`` seconds a second. Pure."""

    def __init__(self, share: float, now: float) -> None:
        self._share, self._at = share, now
        self._left = share * BURST_S

    def allows(self, now: float) -> bool:
        """Whether anything is left; one run may overdraw it, and is waited off by the next."""
        self._left = min(self._left + (now - self._at) * self._share, self._share * BURST_S)
        self._at = now
        return self._left > 0

    def charge(self, seconds: float) -> None:
        """Take what was spent."""
        self._left -= seconds


class Counts:
    """What came of it."""

    def __init__(self) -> None:
        self.sampled = self.compared = self.agreed = 0
        self.dropped = dict.fromkeys(("load", "budget", "busy", "absent", "cached"), 0)
        self.failed = self.incomparable = 0
        self.flips = self.rows = self.values = 0
        self.largest = self.total = 0.0
        self.cpu_s = 0.0
        self.primary_ns = self.shadow_ns = 0
        """Time to answer the requests that were compared."""
        self.largest_primary_ns = self.largest_shadow_ns = 0

    def add(self, found: Difference) -> None:
        """Count a comparison."""
        self.compared += 1
        self.agreed += found.agrees
        self.largest = max(self.largest, found.largest)
        self.total += found.total
        self.values += found.values
        self.flips += found.flips
        self.rows += found.rows

    def document(self) -> dict[str, Any]:
        """Return it as the protocol's documents are; null where there is nothing to say."""
        n = self.compared

        def share(a: float, b: int) -> float | None:
            return a / b if b else None

        return {
            "sampled": self.sampled,
            "dropped": dict(self.dropped),
            "failed": self.failed,
            "incomparable": self.incomparable,
            "compared": n,
            "agreed": self.agreed,
            "agreement": share(self.agreed, n),
            "max_difference": self.largest if n else None,
            "mean_difference": share(self.total, self.values),
            "class_flips": self.flips,
            "classified_rows": self.rows,
            "cpu_s": round(self.cpu_s, 6),
            "latency_us": {
                "primary": {"mean": share(self.primary_ns / 1e3, n), "max": self.largest_primary_ns / 1e3},
                "shadow": {"mean": share(self.shadow_ns / 1e3, n), "max": self.largest_shadow_ns / 1e3},
            },
        }


class Shadowing:
    """The shadow of one model. On the loop's thread only."""

    def __init__(
        self,
        name: str,
        given: Shadow,
        route: Callable[[str], object],
        waiting: Callable[[], bool],
        random: Random,
    ) -> None:
        """``route`` returns what serves a version now, ``waiting`` whether any request waits for a run."""
        self._name, self.given = name, given
        self._route, self._waiting, self._random = route, waiting, random
        self._loop = asyncio.get_running_loop()
        self._budget = Budget(given.cpu, time.monotonic())
        self._under_way = False
        self._seen = (time.monotonic(), time.thread_time())
        self._usage = 0.0
        self.counts = Counts()

    def tick(self) -> None:
        """Measure how busy the loop is; call it a few times a second."""
        now, used = time.monotonic(), time.thread_time()
        before, used_before = self._seen
        if now > before:
            self._usage = (used - used_before) / (now - before)
        self._seen = (now, used)

    def watch(self, request: InferRequest, done: Done) -> Done:
        """Return ``done`` or, for the share that is sampled, what asks the shadow after it."""
        if self._random() >= self.given.sample:
            return done
        self.counts.sampled += 1
        began = time.monotonic_ns()

        def finish(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                done(answer)
                return
            outputs, took = answer.outputs, time.monotonic_ns() - began
            done(answer)
            if answer.cached:
                self.counts.dropped["cached"] += 1
                return
            self._offer(request, outputs, took)

        return finish

    def _offer(self, request: InferRequest, outputs: Mapping[str, Array], took: int) -> None:
        why = "busy" if self._under_way else self._hindrance()
        if why:
            self.counts.dropped[why] += 1
            return
        self._under_way = True
        self._loop.call_later(DELAY_S, self._run, request, outputs, took)

    def _hindrance(self) -> str:
        """Return why nothing may be run now; empty where it may."""
        if self._usage > BUSY or self._waiting():
            return "load"
        return "" if self._budget.allows(time.monotonic()) else "budget"

    def _run(self, request: InferRequest, outputs: Mapping[str, Array], took: int) -> None:
        live = self._route(self.given.version)
        why = self._hindrance()
        if not isinstance(live, Live):
            why = "absent"
        elif live.runner.busy:
            why = "busy"
        if why or not isinstance(live, Live):
            self._under_way = False
            self.counts.dropped[why] += 1
            return
        asked = InferRequest(
            self._name,
            request.inputs,
            self.given.version,
            request.id,
            request.outputs,
            request.parameters,
            priority=LAST,
        )
        cpu_ns, began = time.process_time_ns(), time.monotonic_ns()

        def done(answer: InferResponse | PitheadError) -> None:
            spent = time.monotonic_ns() - began
            self._under_way = False
            try:
                self._compare(outputs, answer, took, spent)
            except Exception:
                log.exception("shadow.failed")
                self.counts.failed += 1
            cost_s = (time.process_time_ns() - cpu_ns) * 1e-9
            self.counts.cpu_s += cost_s
            self._budget.charge(cost_s)

        try:
            live.submit(asked, done)
        except PitheadError as error:
            done(error)

    def _compare(
        self, primary: Mapping[str, Array], answer: InferResponse | PitheadError, took: int, spent: int
    ) -> None:
        counts, given = self.counts, self.given
        if isinstance(answer, PitheadError):
            counts.failed += 1
            return
        if answer.cached:
            counts.dropped["cached"] += 1
            return
        found = compare(primary, answer.outputs, given.tolerance, given.classes)
        if found is None:
            counts.incomparable += 1
            return
        counts.add(found)
        counts.primary_ns += took
        counts.shadow_ns += spent
        counts.largest_primary_ns = max(counts.largest_primary_ns, took)
        counts.largest_shadow_ns = max(counts.largest_shadow_ns, spent)
