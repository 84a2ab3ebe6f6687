"""``python -m agent.engine.backtest``: a recording through a lane, at once instead of at its own pace.

It is the device's lane, with its source, windows, model, calibration and
debounce; only time stands in for itself, and what the lane reports is kept
instead of sent. One msgpack request on standard input; scores go into a file,
a short answer to standard output.
"""

import logging
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from agent.engine.clock import Clock
from agent.engine.lane import Lane
from agent.engine.loading import Loader, Served
from agent.engine.outlet import Outlet
from agent.engine.report import Reporter
from agent.engine.sources import open_source
from agent.engine.sources.base import Batch
from agent.engine.window import Windows
from agent.ports import LaneSpec
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from inference.scoring import Scored

STEP_US: Final = 10**12
"""From one look at the clock to the next, so that every row is due."""
RATE_HZ: Final = 1e6
BUFFER_S: Final = 86_400.0
MOST_ROWS: Final = 4096


class Request(Struct, frozen=True):
    """What to replay, through what."""

    spec: dict[str, Any]
    """A ``LaneSpec`` without its source."""
    path: str
    columns: list[str] | None
    label: str | None
    """Column that is not 0 where something is wrong; a window is labelled by the largest of its rows."""
    rate_hz: float | None
    """The manifest's sample rate."""
    out: str
    """Where the arrays ``row``, ``score``, ``alarm`` and, with a label, ``label`` go."""


class Answer(Struct, frozen=True):
    """How it went; ``code`` is None when ``out`` is there."""

    code: str | None = None
    detail: str = ""
    threshold: float = 0.0
    rows: int = 0
    missing: int = 0
    """Rows that are in no window: values missing or out of their range."""
    calibrated_on: int = 0
    """Windows that a device of its own would have been fitted on, and that were not scored."""


class Recorder(Reporter):
    """Keeps what a lane found."""

    def __init__(self, outlet: Outlet, clock: Clock) -> None:
        super().__init__("backtest", BUFFER_S, outlet, clock)
        self.found: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]] = []
        self.missed = 0

    def scored(
        self,
        served: Served,
        batch: Batch,
        windows: Windows,
        scored: Scored,
        latency_us: NDArray[np.float64],  # noqa: ARG002 - time means nothing here
    ) -> None:
        """Take one batch's windows; the alarms are found as for a device."""
        assert batch.refs is not None
        alarms = self.alarms(served, windows, scored)
        self.found.append((batch.refs[windows.ends], scored.scores, alarms))

    def left_out(self, samples: int, windows: int = 0) -> None:  # noqa: ARG002 - nothing mutes a recording
        """Count the samples."""
        self.missed += samples


class Immediate(Loader):
    """Loads and fits at once: nobody waits."""

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job``."""
        job()


def all_due() -> Clock:
    """Return a clock that runs ahead of every recording."""
    ticks = count(0, STEP_US)
    return Clock(wall=lambda: 0, mono=lambda: next(ticks))


def run(request: Request) -> Answer:
    """Write ``out``; raises as a lane would fail."""
    clock = all_due()
    table: dict[str, Any] = {"kind": "replay", "path": request.path, "loop": False, "buffer_s": BUFFER_S}
    if request.rate_hz is None:
        table["rate_hz"] = RATE_HZ
    else:
        table["speed"] = min(RATE_HZ, RATE_HZ / request.rate_hz)
    if request.columns is not None:
        table["columns"] = request.columns
    spec = msgspec.convert(request.spec | {"source": table}, LaneSpec)
    outlet = Outlet(clock, lambda: None)
    recorder = Recorder(outlet, clock)
    lane = Lane(spec, BUFFER_S, outlet, Immediate(), clock, recorder)
    lane.replay()
    served = lane.served
    parts = recorder.found or [(np.empty(0, np.int64), np.empty(0), np.empty(0, np.bool_))]
    row, score, alarm = (np.concatenate([part[i] for part in parts]) for i in range(3))
    arrays: dict[str, NDArray[Any]] = {"row": row, "score": score, "alarm": alarm}
    if request.label is not None:
        arrays["label"] = _labels(request.path, request.label, row, served.pipeline.window, clock)
    with Path(request.out).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    return Answer(
        threshold=served.threshold,
        rows=lane.rows,
        missing=recorder.missed,
        calibrated_on=0 if served.fit is None or spec.fit is not None else served.fit.samples,
    )


def _labels(path: str, column: str, row: NDArray[np.int64], window: int, clock: Clock) -> NDArray[np.bool_]:
    """Return for the window that ends at each row whether something is wrong in it."""
    pipeline = Pipeline((Channel(column),), 1, 1, (0.0,), (1.0,), sample_rate_hz=RATE_HZ)
    table: dict[str, Any] = {
        "kind": "replay",
        "path": path,
        "loop": False,
        "buffer_s": BUFFER_S,
        "columns": [column],
    }
    source = open_source(table, pipeline, clock)
    parts = []
    while (batch := source.poll(MOST_ROWS)) is not None:
        parts.append(batch.values[:, 0])
    wrong = np.concatenate(parts) != 0
    before = np.concatenate([[0], np.cumsum(wrong)])
    found: NDArray[np.bool_] = before[row + 1] > before[row + 1 - window]
    return found


def main() -> None:
    """Answer one request."""
    logging.disable(logging.CRITICAL)
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Request)
    try:
        answer = run(request)
    except PitheadError as error:
        answer = Answer(error.code, error.detail[:1500])
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
