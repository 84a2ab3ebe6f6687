"""One lane: source -> window -> features -> session -> score -> sink, in a thread of its own.

A batch of rows is taken at each wake-up. Between two batches the session may
be swapped: the rows before went through the old one, the rows after go
through the new one, and the windower goes on where it was.

Latency of a window: how long its last row lay in the queue beyond the
``GATHER_US`` that a lane may gather rows, plus an equal share of what its
batch cost around the model, plus its own run of the model (an equal share,
where one run takes many windows). The pause between two wake-ups is left
out, since no model changes it; a model that cannot keep up shows at once.
"""

import logging
import threading
from collections import deque
from typing import Final

import numpy as np
from msgspec.structs import replace

from agent.engine.clock import Clock
from agent.engine.feed import Feed, needs
from agent.engine.loading import Loader, Served, key, load
from agent.engine.machine import UNJUDGED, Judged, MachineFeed
from agent.engine.outlet import Outlet
from agent.engine.report import Reporter
from agent.engine.sinks.tray import Tray
from agent.engine.sources.base import TICK_S, Batch
from agent.engine.summary import latencies
from agent.ports import FitResult, Fitted, LaneSpec, LaneState
from contract.errors import PitheadError
from inference.scoring import BATCH

log = logging.getLogger(__name__)

MOST_ROWS: Final = 1024
MOST_VALUES: Final = 2**17
"""Wide rows are taken fewer at a time, though never fewer than the model takes at once: caches are small."""
SLICE_US: Final = 100_000.0
"""A batch should take about this long at most, so that the lane can answer."""
GATHER_US: Final = 2 * TICK_S * 1e6
LONGEST_PAUSE_S: Final = 1.0
LOAD_AGAIN_US: Final = 30_000_000
"""After this, what could not be loaded is tried again: the reason may have passed."""


class Lane:
    """Runs what it was last told to; ``configure`` and ``stop`` may come from another thread."""

    def __init__(
        self,
        spec: LaneSpec,
        bucket_s: float,
        outlet: Outlet,
        loader: Loader,
        clock: Clock,
        report: Reporter | None = None,
    ) -> None:
        """``report`` takes the place of what reports to ``outlet``."""
        self.name = spec.lane
        self._wanted, self._bucket_s = spec, bucket_s
        self._outlet, self._loader, self._clock = outlet, loader, clock
        self._wake = threading.Event()
        self._stopping = False
        self._loaded: deque[tuple[LaneSpec, Served | PitheadError]] = deque()
        self._fits: deque[tuple[Served, FitResult | PitheadError]] = deque()
        self._serving: Served | None = None
        self._candidate: Served | None = None
        """Loaded, and calibrating before it may serve."""
        self._fitting = False
        self._loading: LaneSpec | None = None
        self._refused: tuple[LaneSpec, PitheadError] | None = None
        """What was wanted and could not be loaded; it stands until a later try succeeds."""
        self._refused_at = 0
        self._broken: PitheadError | None = None
        """An error of the lane itself."""
        self._feed = Feed(spec.lane, clock)
        self._machine = MachineFeed(spec.lane, clock, self._feed)
        self._sinks = Tray(spec.lane, clock)
        self._report = report or Reporter(spec.lane, bucket_s, outlet, clock, self._sinks)
        self.rows = 0
        """Taken from the source so far."""
        self._thread = threading.Thread(target=self._run, name=f"lane-{spec.lane}", daemon=True)

    # ---- from the server's thread

    def start(self) -> None:
        """Begin."""
        self._sinks.configure(self._wanted.sinks, self._wanted.bypass)
        self._thread.start()

    def configure(self, spec: LaneSpec, bucket_s: float) -> None:
        """Become ``spec`` as soon as possible."""
        self._wanted, self._bucket_s = spec, bucket_s
        self._sinks.configure(spec.sinks, spec.bypass)
        self._wake.set()

    def stop(self) -> None:
        """End after the batch at hand; ``join`` waits for it."""
        self._stopping = True
        self._sinks.stop_controls()
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Return whether the lane has ended; its sinks get what is left of the time."""
        until = self._clock.mono() + round(timeout_s * 1e6)
        self._thread.join(timeout_s)
        self._sinks.join((until - self._clock.mono()) / 1e6)
        return not self._thread.is_alive()

    @property
    def windows(self) -> int:
        """Scored since the serving session began."""
        return 0 if (served := self._serving) is None else served.windows

    # ---- without a thread

    def replay(self) -> None:
        """Do all that there is to do, and come back when the source has no more rows.

        Needs a loader that works at once. Raises what the lane fails with.
        """
        wanted = self._wanted
        while True:
            before = self.rows
            self._advance(wanted)
            problem = self._broken or self._feed.problem or (self._refused[1] if self._refused else None)
            if problem is not None:
                raise problem
            if self.rows == before and (self._serving or self._candidate):
                break
        if self._serving is None:
            raise PitheadError("source.failed", f"{self.rows} rows are not enough for the calibration")

    @property
    def served(self) -> Served:
        """What serves at the end of a ``replay``."""
        assert self._serving is not None
        return self._serving

    # ---- the lane's own thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._step()
                self._broken = None
            except Exception as error:
                log.exception("lane.failed", extra={"facts": {"lane": self.name}})
                code = "inference.out_of_memory" if isinstance(error, MemoryError) else "internal.error"
                self._broken = PitheadError(code, f"{type(error).__name__}: {error}")
                self._report.state(self._state(self._wanted))
                self._wake.wait(LONGEST_PAUSE_S)
        self._machine.close()
        self._report.close(self._wanted, self._serving)
        self._sinks.stop()
        for served in (self._serving, self._candidate):
            if served is not None:
                self._loader.submit(served.session.close)

    def _step(self) -> None:
        self._wake.clear()
        wanted = self._wanted
        self._advance(wanted)
        self._report.tick(wanted, self._serving, self._bucket_s, self._feed.backlog())
        self._report.state(self._state(wanted))
        pause = min(self._report.wait_s(), LONGEST_PAUSE_S)
        if self._serving is not None or self._candidate is not None:
            pause = min(pause, self._feed.wait_s())
        self._wake.wait(pause)

    def _advance(self, wanted: LaneSpec) -> None:
        self._take_loaded(wanted)
        self._take_fits(wanted)
        self._leave_source(wanted)
        self._load_if_needed(wanted)
        self._pump(wanted)

    # ---- versions

    def _leave_source(self, wanted: LaneSpec) -> None:
        """What is fitted to one source must not judge another."""
        if self._candidate is not None and self._candidate.fits_another_source(wanted):
            self._drop_candidate()
        if self._serving is not None and self._serving.fits_another_source(wanted):
            self._retire(self._serving)

    def _load_if_needed(self, wanted: LaneSpec) -> None:
        if self._candidate is not None and not self._candidate.serves(wanted):
            self._drop_candidate()
        if self._serving is not None and self._serving.serves(wanted):
            self._refused = None
            if wanted.fit is not None:
                self._outlet.forget_fit(self.name)
            return
        if self._candidate is not None:
            return
        if self._loading is not None and key(self._loading) == key(wanted):
            return
        if self._refused is not None and key(self._refused[0]) != key(wanted):
            self._refused = None
        if self._refused is not None and self._clock.mono() - self._refused_at < LOAD_AGAIN_US:
            return
        self._loading = wanted
        self._loader.submit(lambda: self._load(wanted))

    def _load(self, spec: LaneSpec) -> None:
        """Runs in the loader's thread."""
        try:
            self._loaded.append((spec, load(spec)))
        except PitheadError as error:
            self._loaded.append((spec, error))
        except Exception as error:
            log.exception("lane.load_failed", extra={"facts": {"lane": self.name}})
            failure = PitheadError("inference.load_failed", f"{type(error).__name__}: {error}")
            self._loaded.append((spec, failure))
        self._wake.set()

    def _take_loaded(self, wanted: LaneSpec) -> None:
        while self._loaded:
            spec, result = self._loaded.popleft()
            if self._loading is not None and key(spec) == key(self._loading):
                self._loading = None
            done = any(v is not None and v.serves(spec) for v in (self._serving, self._candidate))
            if key(spec) != key(wanted) or done:
                if isinstance(result, Served):
                    self._loader.submit(result.session.close)
            elif isinstance(result, PitheadError):
                self._refuse(spec, result)
            elif result.calibration is None:
                self._swap(result)
            else:
                self._calibrate(result)

    def _calibrate(self, fresh: Served) -> None:
        """Fit ``fresh`` on the live rows, beside the version that serves on the same rows.

        A version that needs another source ends the serving of the old one.
        """
        self._drop_candidate()
        self._candidate, self._refused = fresh, None
        self._outlet.forget_fit(self.name)
        old = self._serving
        if old is not None and not _same_rows(old, fresh):
            self._retire(old)

    def _retire(self, old: Served) -> None:
        """End the serving of ``old`` with nothing in its place yet."""
        self._report.swapped(old.spec, old, self._feed.backlog())
        self._serving = None
        self._loader.submit(old.session.close)

    def _fit(self, served: Served) -> None:
        """Runs in the loader's thread."""
        assert served.calibration is not None
        try:
            self._fits.append((served, served.calibration.result(served.scorer, self._clock.wall())))
        except PitheadError as error:
            self._fits.append((served, error))
        except Exception as error:
            log.exception("lane.fit_failed", extra={"facts": {"lane": self.name}})
            self._fits.append((served, PitheadError("internal.error", f"{type(error).__name__}: {error}")))
        self._wake.set()

    def _take_fits(self, wanted: LaneSpec) -> None:
        while self._fits:
            served, result = self._fits.popleft()
            if served is not self._candidate:
                continue
            if not served.serves(wanted):
                # It was calibrated for an order that does not stand any more.
                self._drop_candidate()
                continue
            if isinstance(result, PitheadError):
                self._drop_candidate()
                self._refuse(wanted, result)
                continue
            result = replace(result, binding=served.spec.binding)
            self._candidate, self._fitting = None, False
            served.apply(result)
            self._swap(served)
            self._outlet.fitted(Fitted(lane=self.name, digest=served.spec.digest, fit=result))

    def _refuse(self, spec: LaneSpec, error: PitheadError) -> None:
        self._refused, self._refused_at = (spec, error), self._clock.mono()

    def _swap(self, fresh: Served) -> None:
        """Serve with ``fresh`` from the next row on."""
        self._drop_candidate()
        self._refused = None
        old, self._serving = self._serving, fresh
        facts = {"lane": self.name, "version": fresh.spec.version, "activation": fresh.spec.activation}
        log.info("lane.swapped", extra={"facts": facts})
        if old is None:
            return
        if _same_rows(old, fresh) and old.windower.geometry == fresh.windower.geometry:
            fresh.windower = old.windower
        self._report.swapped(old.spec, old, self._feed.backlog())
        self._loader.submit(old.session.close)

    def _drop_candidate(self) -> None:
        if self._candidate is not None:
            # Queued behind a fit that may still run on it.
            self._loader.submit(self._candidate.session.close)
        self._candidate, self._fitting = None, False

    # ---- rows

    def _pump(self, wanted: LaneSpec) -> None:
        leader = self._serving or self._candidate
        if leader is None:
            return
        batch = self._machine.poll(wanted.source, leader.pipeline, _limit(leader), wanted.machine)
        if batch is None:
            return
        self.rows += len(batch.t)
        judged = self._machine.judge(batch)
        if self._candidate is not None:
            self._collect(self._candidate, batch, judged)
        if self._serving is not None:
            self._score(self._serving, batch, judged)

    def _collect(self, served: Served, batch: Batch, judged: Judged) -> None:
        usable = served.bounds.usable(batch.values)
        windows = served.windower.push(batch.values, usable, continues=batch.continues, muted=judged.unfit)
        if self._fitting or served.calibration is None:
            return
        if self._serving is None:
            self._report.left_out(batch.lost + windows.unusable)
        served.calibration.add(windows)
        if served.calibration.complete:
            self._fitting = True
            self._loader.submit(lambda: self._fit(served))

    def _score(self, served: Served, batch: Batch, judged: Judged = UNJUDGED) -> None:
        began = self._clock.mono()
        usable = served.bounds.usable(batch.values)
        windows = served.windower.push(batch.values, usable, continues=batch.continues, muted=judged.muted)
        self._report.left_out(batch.lost + windows.unusable, windows.muted)
        n = len(windows.starts)
        if not n:
            return
        gathered = self._clock.wall() - GATHER_US
        scored = served.scorer.run(windows)
        around = max(0.0, self._clock.mono() - began - scored.model_us) / n
        latency = latencies(gathered, batch.t[windows.ends], scored.run_us, around)
        served.windows += n
        if scored.error is not None:
            failed = n - int(np.count_nonzero(scored.good))
            served.windows -= failed
            served.errors += failed
            served.last_error = scored.error, began
        self._report.scored(served, batch, windows, scored, latency)

    # ---- state

    def _state(self, wanted: LaneSpec) -> LaneState:
        serving, candidate = self._serving, self._candidate
        settled = serving is not None and serving.serves(wanted)
        state = LaneState(lane=self.name, model_name=wanted.model_name, state="running")
        source = self._feed.problem
        problem = self._broken
        if self._refused is not None:
            state, problem = replace(state, state="failed"), self._refused[1]
        elif problem is not None or (source is not None and (settled or candidate is not None)):
            state, problem = replace(state, state="failed"), problem or source
        elif candidate is not None:
            progress = 1.0 if candidate.calibration is None else candidate.calibration.progress
            state = replace(state, state="calibrating", progress=progress)
        elif not settled:
            state = replace(state, state="loading")
        elif serving is not None:
            problem = serving.recent_error(self._clock.mono())
        if serving is not None:
            state = replace(
                state,
                digest=serving.spec.digest,
                activation=serving.spec.activation,
                accelerator=serving.session.accelerator,
                windows=serving.windows,
                errors=serving.errors,
            )
        if not settled:
            state = replace(state, wanted_digest=wanted.digest, wanted_activation=wanted.activation)
        state = replace(state, **self._machine.said())
        if problem is not None:
            state = replace(state, code=problem.code, detail=problem.detail[:2000])
        return state


def _same_rows(old: Served, fresh: Served) -> bool:
    """Whether both take the rows of one and the same source."""
    return needs(old.pipeline, fresh.spec.source) == needs(fresh.pipeline, fresh.spec.source)


def _limit(served: Served) -> int:
    windows = max(1, int(SLICE_US / max(served.scorer.window_us, 1.0)))
    rows = min(MOST_ROWS, max(BATCH, MOST_VALUES // len(served.pipeline.channels)))
    return min(rows, windows * served.pipeline.stride)
