"""What a lane tells the supervisor: its state, its alarms, and one summary per bucket."""

import logging
from typing import Final

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from agent.engine.clock import Clock
from agent.engine.loading import Served
from agent.engine.outlet import Outlet
from agent.engine.sinks.tray import Tray
from agent.engine.sources.base import Batch
from agent.engine.summary import Bucket, TokenBucket, bucket_start
from agent.engine.window import Windows
from agent.ports import LaneSpec, LaneState
from contract.messages import Anomaly, ModelSummary
from inference.scoring import Scored

log = logging.getLogger(__name__)

STATE_US: Final = 1_000_000
"""A lane's state is sent at least this often."""
ANOMALIES_PER_S: Final = 20.0
ANOMALIES_AT_ONCE: Final = 200
MOST_EMPTY: Final = 60
"""Buckets that passed while the lane was busy and are reported as empty; more means that time jumped."""


class Reporter:
    """Used by the lane's thread alone."""

    def __init__(
        self, lane: str, bucket_s: float, outlet: Outlet, clock: Clock, sinks: Tray | None = None
    ) -> None:
        """``sinks`` get what is found and how the lane is, beside the supervisor."""
        self._lane = lane
        self._sinks = sinks or Tray(lane, clock)
        self._outlet, self._clock = outlet, clock
        self._bucket_s = bucket_s
        self._start = bucket_start(clock.wall(), bucket_s)
        self._bucket = Bucket()
        self._tokens = TokenBucket(ANOMALIES_PER_S, ANOMALIES_AT_ONCE, clock.mono())
        self._state: LaneState | None = None
        self._state_at = 0

    def scored(
        self,
        served: Served,
        batch: Batch,
        windows: Windows,
        scored: Scored,
        latency_us: NDArray[np.float64],
    ) -> None:
        """Count what became of some windows, and send an anomaly for each alarm."""
        bucket = self._bucket
        if scored.error is None:
            bucket.add(scored.scores, latency_us)
        else:
            good = scored.good
            bucket.errors += len(good) - int(np.count_nonzero(good))
            bucket.add(scored.scores[good], latency_us[good])
        judged = self.alarms(served, windows, scored)
        self._sinks.scored(served, batch, windows, scored, judged)
        if not np.count_nonzero(judged):
            return
        alarms = judged.nonzero()[0]
        bucket.alarms += len(alarms)
        sent = self._tokens.take(self._clock.mono(), len(alarms))
        anomalies: list[Anomaly | ModelSummary] = [
            self._anomaly(served, batch, windows, scored, i) for i in alarms[:sent].tolist()
        ]
        bucket.suppressed += len(alarms) - sent
        if anomalies:
            self._outlet.products(anomalies)

    @staticmethod
    def alarms(served: Served, windows: Windows, scored: Scored) -> NDArray[np.bool_]:
        """Return which windows are alarms; what has no score is not above the threshold."""
        return served.debounce.alarms(scored.scores > served.threshold, windows.ordinals)

    def left_out(self, samples: int, windows: int = 0) -> None:
        """Count samples that did not come or cannot be used, and windows that are muted."""
        self._bucket.missing += samples
        self._bucket.muted += windows

    def tick(self, wanted: LaneSpec, serving: Served | None, bucket_s: float, queue: int) -> None:
        """Close the bucket when its time is over."""
        now = self._clock.wall()
        start = bucket_start(now, bucket_s)
        if start == self._start and bucket_s == self._bucket_s:
            return
        self._close_bucket(wanted, serving, queue)
        width = round(self._bucket_s * 1e6)
        skipped = (start - self._start) // width - 1 if bucket_s == self._bucket_s else 0
        if 0 < skipped <= MOST_EMPTY:
            for _ in range(skipped):
                self._start += width
                self._close_bucket(wanted, serving, queue)
        elif skipped:
            log.warning("lane.time_jumped", extra={"facts": {"lane": self._lane, "buckets": skipped}})
        self._start, self._bucket_s = start, bucket_s

    def swapped(self, wanted: LaneSpec, old: Served, queue: int) -> None:
        """Report what ``old`` did in the bucket at hand; the rest of it is another version's."""
        self._close_bucket(wanted, old, queue)

    def close(self, wanted: LaneSpec, serving: Served | None) -> None:
        """The lane ends: report what is left."""
        self._close_bucket(wanted, serving, 0)

    def state(self, state: LaneState) -> None:
        """Send ``state`` if it says something new, or if it is time."""
        self._sinks.state(state)
        now = self._clock.mono()
        if now - self._state_at < STATE_US and self._state is not None:
            quiet = replace(
                state, windows=self._state.windows, errors=self._state.errors, progress=self._state.progress
            )
            if quiet == self._state:
                return
        if self._state is None or (state.state, state.code) != (self._state.state, self._state.code):
            facts = {"lane": self._lane, "state": state.state, "digest": state.digest, "code": state.code}
            log.info("lane.state", extra={"facts": facts | {"detail": state.detail}})
        self._state, self._state_at = state, now
        self._outlet.state(replace(state, sinks=self._sinks.states()))

    def wait_s(self) -> float:
        """Return how long until something is due to be sent."""
        end = self._start + round(self._bucket_s * 1e6)
        bucket = (end - self._clock.wall()) / 1e6
        state = (self._state_at + STATE_US - self._clock.mono()) / 1e6
        return max(0.0, min(bucket, state))

    def _close_bucket(self, wanted: LaneSpec, serving: Served | None, queue: int) -> None:
        spec = wanted if serving is None else serving.spec
        head = ModelSummary(
            model_name=spec.model_name,
            version=spec.version,
            bucket_start=self._start,
            bucket_s=self._bucket_s,
            count=0,
            activation=spec.activation,
            variant=None if serving is None else spec.variant,
            accelerator=None if serving is None else serving.session.accelerator,
        )
        self._outlet.products([self._bucket.summary(head, queue)])
        self._bucket = Bucket()

    @staticmethod
    def _anomaly(served: Served, batch: Batch, windows: Windows, scored: Scored, i: int) -> Anomaly:
        spec, row = served.spec, int(windows.ends[i])
        return Anomaly(
            model_name=spec.model_name,
            version=spec.version,
            t=int(batch.t[row]),
            score=float(scored.scores[i]),
            threshold=served.threshold,
            variant=spec.variant,
            source=str(spec.source.get("kind", "")),
            source_ref=None if batch.refs is None else str(int(batch.refs[row])),
            contributions=served.scorer.shares(scored, i),
        )
