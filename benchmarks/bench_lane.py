"""Windows per second through a whole lane, beside a bare loop on the same runtime at the same batch.

The bare loop has its windows ready in memory, cut and normalised; it
quantises, calls the runtime, dequantises and scores. The lane starts at its
source: rows, unit and range checks, normalising, windowing, then the same,
then debounce, sketches, anomalies and summaries. Both score the very same
numbers, which is checked first.

Two more figures: what a lane at 1 kHz x 8 channels takes of a core, in a real
engine process and all of it; and what the lane adds to the model's time, for
windows as they are gathered and for a row that comes alone, from the hand of
its source to its report.

Rates are medians of alternating runs; the ratio is the median of the pairs'
ratios, so that what else the machine does meets both alike. The ratio by
processor time leaves out when a thread had to wait for a core.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from lane_cases import ROOT, Case, cases, package

from agent.core.frames import FrameReader, frame
from agent.engine.clock import Clock
from agent.engine.lane import Lane
from agent.engine.loading import Loader, load
from agent.engine.outlet import Outlet
from agent.engine.sources.base import Batch
from agent.ports import Configure, FromEngine, LaneSpec, LaneState, socket_address
from inference.scoring import BATCH

RATIO, ADDED_P50_US, ADDED_P99_US, CORE_SHARE = 0.8, 30.0, 200.0, 0.10
ALONE: Final = 1000
"""Rows that come alone in one run."""
PROCESS_CLOCK: Final = 2
"""With a process's id, Linux's clock of the processor time of all its threads (clock_getcpuclockid(3))."""
CLOCK: Final = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)


class Rate(NamedTuple):
    """Windows per second by the clock, and per second of its thread's processor time."""

    wall: float
    cpu: float


class Running:
    """A lane at work, without a process of its own."""

    def __init__(self, spec: LaneSpec) -> None:
        self.outlet, self.loader = Outlet(CLOCK, lambda: None), Loader()
        self.loader.start()
        self.lane = Lane(spec, 60.0, self.outlet, self.loader, CLOCK)
        self.lane.start()
        while self.lane.windows == 0:
            time.sleep(0.001)

    def rate(self, seconds: float) -> Rate:
        """By what the lane itself reports, once it need not wait for rows any more."""
        while self.lane._feed.wait_s() > 0:  # noqa: SLF001 - nobody else asks
            time.sleep(0.01)
        began, before, cpu = time.perf_counter(), self.lane.windows, self.cpu_s
        time.sleep(seconds)
        done = self.lane.windows - before
        return Rate(done / (time.perf_counter() - began), done / (self.cpu_s - cpu))

    @property
    def cpu_s(self) -> float:
        """What the lane's thread has taken so far."""
        thread = self.lane._thread.ident  # noqa: SLF001 - as above
        return time.clock_gettime(time.pthread_getcpuclockid(thread or 0))

    def stop(self) -> None:
        """End the lane."""
        self.lane.stop()
        self.lane.join(5)
        self.loader.stop(5)


def bare_run(case: Case) -> Callable[[Any], Any]:
    """Return what scores normalised windows with nothing but numpy and the runtime."""
    scale, zero = np.float32(case.input.scale or 1), np.float32(case.input.zero_point or 0)
    out_scale, out_zero = np.float32(case.output.scale or 1), np.float32(case.output.zero_point or 0)
    integers = case.input.datatype == "INT8"
    if case.format == "tflite":
        from ai_edge_litert.interpreter import Interpreter  # noqa: PLC0415 - each peer loads its runtime alone

        interpreter = Interpreter(model_content=case.content, num_threads=1)
        given, got = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
        interpreter.resize_tensor_input(given, (BATCH, case.window * case.channels))
        interpreter.allocate_tensors()

        def call(feed: Any) -> Any:
            interpreter.set_tensor(given, feed)
            interpreter.invoke()
            return interpreter.get_tensor(got)
    else:
        import onnxruntime  # noqa: PLC0415 - as above

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(case.content, options, providers=["CPUExecutionProvider"])

        def call(feed: Any) -> Any:
            return session.run(None, {case.input.name: feed})[0]

    def run(x: Any) -> Any:
        feed = np.clip(np.rint(x / scale) + zero, -128, 127).astype(np.int8) if integers else x
        y = call(feed)
        if integers:
            y = (y.astype(np.float32) - out_zero) * out_scale
        return np.square(x - y).mean(axis=1)

    return run


def bare(run: Callable[[Any], Any], windows: Any, threshold: float, seconds: float) -> Rate:
    """The loop that the lane is held against."""
    done, alarms, began, cpu = 0, 0, time.perf_counter(), time.thread_time()
    last = len(windows) // BATCH
    while time.perf_counter() - began < seconds:
        start = done // BATCH % last * BATCH
        alarms += int((run(windows[start : start + BATCH]) > threshold).sum())
        done += BATCH
    return Rate(done / (time.perf_counter() - began), done / (time.thread_time() - cpu))


def throughput(case: Case, seconds: float, runs: int) -> dict[str, float]:
    """Return medians of ``runs`` alternating runs."""
    windows, run = case.windows(), bare_run(case)
    scores = np.concatenate([run(windows[i : i + BATCH]) for i in range(0, len(windows) - BATCH, BATCH)])
    threshold = float(np.quantile(scores, 0.999))
    with tempfile.TemporaryDirectory() as name:
        spec = package(case, Path(name), threshold, rate_hz=1e6, speed=100.0, buffer_s=86400)
        check_same(case, spec, windows, scores)
        pairs = []
        for _ in range(runs):
            alone = bare(run, windows, threshold, seconds)
            running = Running(spec)
            pairs.append((running.rate(seconds), alone))
            running.stop()
    return {
        "lane": round(statistics.median(a.wall for a, _ in pairs)),
        "bare": round(statistics.median(b.wall for _, b in pairs)),
        "ratio": round(statistics.median(a.wall / b.wall for a, b in pairs), 3),
        "cpu_ratio": round(statistics.median(a.cpu / b.cpu for a, b in pairs), 3),
    }


def check_same(case: Case, spec: LaneSpec, windows: Any, scores: Any) -> None:
    """Both must do the same work, or the ratio says nothing."""
    served = load(spec)
    x = windows[: len(scores)].reshape(-1, case.window, case.channels)
    np.testing.assert_allclose(served.scorer.run_cut(x).scores, scores, rtol=1e-4)
    served.session.close()


class OneByOne:
    """A source that has one more row at each poll."""

    def __init__(self, rows: Any) -> None:
        now = CLOCK.wall()
        self._batches = [Batch(rows[i : i + 1], np.array([now]), np.array([i])) for i in range(len(rows))]
        self._done = 0

    def poll(self, limit: int) -> Batch:  # noqa: ARG002 - as every source
        """See ``Source``."""
        self._done += 1
        return self._batches[self._done % len(self._batches)]

    def wait_s(self) -> float:
        """See ``Source``."""
        return 0.0

    def backlog(self) -> int:
        """See ``Source``."""
        return 1

    def close(self) -> None:
        """See ``Source``."""


def alone_latency(case: Case, runs: int) -> list[tuple[float, float]]:
    """Return p50 and p99 in us of what the lane adds to the model for one row, of each run."""
    found, run_us = [], 0.0
    with tempfile.TemporaryDirectory() as name:
        spec = package(case, Path(name), 1e9, rate_hz=1.0)
        running = Running(spec)
        running.stop()
        # The lane's own path, without its thread and its pauses.
        lane, served = running.lane, load(spec)
        lane._serving = served  # noqa: SLF001 - nobody else asks
        lane._pump(spec)  # noqa: SLF001 - as above; opens the source, in whose place comes another
        lane._feed._source = OneByOne(case.rows())  # noqa: SLF001 - as above
        inner = served.scorer.run

        def timed(windows: Any) -> Any:
            nonlocal run_us
            scored = inner(windows)
            run_us = scored.model_us
            return scored

        served.scorer.run = timed  # type: ignore[method-assign]
        for run in range(runs + 1):
            added = []
            for _ in range(ALONE):
                began = time.perf_counter_ns()
                lane._pump(spec)  # noqa: SLF001 - as above
                added.append((time.perf_counter_ns() - began) / 1000 - run_us)
            p50, p99 = np.quantile(added, (0.5, 0.99))
            if run:  # the first is for the caches
                found.append((float(p50), float(p99)))
        served.session.close()
    return found


def gathered_latency(case: Case, seconds: float) -> tuple[float, float]:
    """Return p50 and p99 in us of what the lane adds to the model for windows gathered at 1 kHz."""
    seen: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        running = Running(package(case, Path(name), 1e9, rate_hz=1000.0))
        report = running.lane._report  # noqa: SLF001 - to see each window's latency and not its sketch
        inner = report.scored

        def scored(served: Any, batch: Any, windows: Any, result: Any, latency: Any) -> None:
            seen.append(latency - result.run_us)
            inner(served, batch, windows, result, latency)

        report.scored = scored  # type: ignore[method-assign]
        time.sleep(seconds)
        running.stop()
    p50, p99 = np.quantile(np.concatenate(seen), (0.5, 0.99))
    return float(p50), float(p99)


def core_shares(case: Case, seconds: float, runs: int) -> list[float]:
    """Return what a whole engine process with the lane at 1 kHz takes of a core, ``runs`` times."""
    with tempfile.TemporaryDirectory() as name:
        spec, path = package(case, Path(name), 1e9, rate_hz=1000.0), Path(name) / "engine.sock"
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.engine", "--socket", path], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        try:
            while not path.exists():
                time.sleep(0.01)
            with socket.socket(socket.AF_UNIX) as supervisor, socket_address(path) as address:
                supervisor.settimeout(30)
                supervisor.connect(address)
                supervisor.sendall(frame(msgspec.msgpack.encode(Configure(lanes=(spec,)))))
                reader, decoder, windows = FrameReader(), msgspec.msgpack.Decoder(FromEngine), 0
                while not windows:
                    said = [decoder.decode(text) for text in reader.feed(supervisor.recv(1 << 16))]
                    windows = max((m.windows for m in said if isinstance(m, LaneState)), default=0)
                return [_core_share(process.pid, seconds) for _ in range(runs)]
        finally:
            process.terminate()
            process.wait(10)


def _core_share(pid: int, seconds: float) -> float:
    clock = ~pid << 3 | PROCESS_CLOCK
    began, before = time.perf_counter(), time.clock_gettime(clock)
    time.sleep(seconds)
    return (time.clock_gettime(clock) - before) / (time.perf_counter() - began)


def live(case: Case, seconds: float, runs: int) -> dict[str, float]:
    """What 1 kHz costs, and what the lane adds to the model's time, as gathered and row by row: medians."""
    gathered = [gathered_latency(case, seconds) for _ in range(runs)]
    alone = alone_latency(case, runs)

    def middle(values: list[tuple[float, float]], which: int) -> float:
        return round(statistics.median(value[which] for value in values), 1)

    return {
        "core_share": round(statistics.median(core_shares(case, 2 * seconds, runs)), 4),
        "added_p50_us": middle(gathered, 0),
        "added_p99_us": middle(gathered, 1),
        "alone_added_p50_us": middle(alone, 0),
        "alone_added_p99_us": middle(alone, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    given = parser.parse_args()
    chosen = [case for case in cases() if given.only in case.name]
    rates, lives = {}, {}
    print(
        f"{'model':<20}{'lane windows/s':>16}{'bare windows/s':>16}"
        f"{'lane/bare':>11}{'by CPU':>8}{'wanted':>8}"
    )
    for case in chosen:
        found = rates[case.name] = throughput(case, given.seconds, given.runs)
        wanted = RATIO if case.model.startswith("ad01") else None
        print(
            f"{case.name:<20}{found['lane']:>16,.0f}{found['bare']:>16,.0f}{found['ratio']:>11.2f}"
            f"{found['cpu_ratio']:>8.2f}"
            f"{'' if wanted is None else f'{wanted:.2f}':>8}"
        )
    print(
        f"\n{'1 kHz x 8 channels':<20}{'core':>8}{'added p50':>11}{'p99 us':>9}"
        f"{'one by one p50':>16}{'p99 us':>9}"
    )
    for case in [case for case in chosen if case.channels == 8]:
        found = lives[case.name] = live(case, given.seconds, given.runs)
        print(
            f"{case.name:<20}{found['core_share']:>8.1%}{found['added_p50_us']:>11.1f}{found['added_p99_us']:>9.1f}"
            f"{found['alone_added_p50_us']:>16.1f}{found['alone_added_p99_us']:>9.1f}"
        )
    print(f"{'wanted at most':<20}{CORE_SHARE:>8.1%}{ADDED_P50_US:>11.1f}{ADDED_P99_US:>9.1f}")
    print(
        json.dumps(
            {"bench": "lane", "batch": BATCH, "runs": given.runs, "windows_per_s": rates, "live": lives}
        )
    )


if __name__ == "__main__":
    main()
