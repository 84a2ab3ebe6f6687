"""Windows per second through a whole lane, beside a bare loop on the same runtime at the same batch.

The bare loop has its windows ready in memory, cut and normalised; it
quantises, calls the runtime, dequantises and scores. The lane starts at its
source: rows, unit and range checks, normalising, windowing, then the same,
then debounce, sketches, anomalies and summaries. Both score the very same
numbers, which is checked first.

Rates are medians of alternating runs; the ratio is the median of the pairs'
ratios, so that what else the machine does meets both alike. The ratio by
processor time leaves out when a thread had to wait for a core. MLPerf Tiny's
ad01 is taken from ``$PITHEAD_SHARED_DATA/models`` and left out where it is
not there.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from agent.engine.clock import Clock
from agent.engine.lane import Lane
from agent.engine.loading import Loader, load
from agent.engine.outlet import Outlet
from agent.engine.sources.base import Batch
from agent.ports import LaneSpec
from contract.manifest import (
    Channel,
    FileRef,
    Golden,
    Manifest,
    Pipeline,
    Provenance,
    Score,
    TensorSpec,
    Variant,
)
from inference.registry import open_session
from inference.scoring import BATCH
from models import onnx_builder, tflite_builder
from models.dense import Training, quantise_network, train_autoencoder

ROOT: Final = Path(__file__).parents[1]
AD01: Final = (
    Path(os.environ.get("PITHEAD_SHARED_DATA", ROOT.parent / "shared" / "data"))
    / "models"
    / "mlperf-tiny-ad01"
)
RATIO, ADDED_P50_US, ADDED_P99_US, CORE_SHARE = 0.8, 30.0, 200.0, 0.10
ROWS: Final = 4096
CLOCK: Final = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)


@dataclass(frozen=True)
class Case:
    """A model in a lane."""

    model: str
    content: bytes
    format: Any
    accelerator: str
    channels: int
    window: int
    input: TensorSpec
    output: TensorSpec

    @property
    def name(self) -> str:
        """As in the table."""
        return f"{self.model} {self.format}"

    def rows(self) -> Any:
        """Random rows, as the recording holds them."""
        return np.random.default_rng(0).normal(0, 2, size=(ROWS, self.channels)).round(3)

    def windows(self) -> Any:
        """Normalised and cut, as the lane has them before it quantises."""
        rows = self.rows().astype(np.float32)
        return np.stack([rows[i : i + self.window].reshape(-1) for i in range(ROWS - self.window + 1)])


def cases() -> Iterator[Case]:
    if AD01.is_dir():
        first = (AD01 / "ad01_int8.tflite").read_bytes()
        session = open_session(first, "tflite", "xnnpack")
        tensors = session.inputs[0], session.outputs[0]
        session.close()
        yield Case("ad01 5x128", first, "tflite", "xnnpack", 128, 5, *tensors)
        yield Case("ad01 5x128", (AD01 / "ad01_int8.onnx").read_bytes(), "onnx", "cpu", 128, 5, *tensors)
        yield Case("ad01 1x640", first, "tflite", "xnnpack", 640, 1, *tensors)
    else:
        print(f"no models at {AD01}: set PITHEAD_SHARED_DATA to measure MLPerf Tiny's ad01")
    for width in (8, 9):
        x = np.random.default_rng(1).normal(0, 2, size=(2048, width))
        integers = quantise_network(train_autoencoder(x, Training(hidden=(16, 4, 16), epochs=2)), x)
        for kind, accelerator, builder in (
            ("tflite", "xnnpack", tflite_builder),
            ("onnx", "cpu", onnx_builder),
        ):
            content = builder.build_int8(integers, "bench")
            session = open_session(content, kind, accelerator)
            tensors = session.inputs[0], session.outputs[0]
            session.close()
            yield Case(f"dense 1x{width}", content, kind, accelerator, width, 1, *tensors)


def package(case: Case, directory: Path, threshold: float, **source: Any) -> LaneSpec:
    """Write the case's package and recording; return its lane."""
    ref = FileRef(f"model.{case.format}", hashlib.sha256(case.content).hexdigest(), len(case.content))
    manifest = Manifest(
        format=1,
        name="bench",
        version="1.0.0",
        release_counter=1,
        summary="bench",
        licence="Apache-2.0",
        variants=(
            Variant(
                name="v",
                file=ref,
                format=case.format,
                quantisation="int8",
                inputs=(case.input,),
                outputs=(case.output,),
                golden=Golden(ref, 1, {}),
                accelerators=(case.accelerator,),
            ),
        ),
        provenance=Provenance(source="bench", data="random"),
        pipeline=Pipeline(
            channels=tuple(Channel(f"c{i}", minimum=-1e6, maximum=1e6) for i in range(case.channels)),
            window=case.window,
            stride=1,
            mean=(0.0,) * case.channels,
            scale=(1.0,) * case.channels,
            clip=1e6,
        ),
        score=Score(method="reconstruction_mse", threshold=threshold),
    )
    text = msgspec.json.encode(manifest)
    (directory / ref.path).write_bytes(case.content)
    (directory / "manifest.json").write_bytes(text)
    header = ",".join(f"c{i}" for i in range(case.channels))
    np.savetxt(directory / "rows.csv", case.rows(), fmt="%.3f", delimiter=",", header=header, comments="")
    return LaneSpec(
        lane="bench",
        model_name="bench",
        version="1.0.0",
        digest=hashlib.sha256(text).hexdigest(),
        manifest=str(directory / "manifest.json"),
        files={ref.path: str(directory / ref.path)},
        variant="v",
        accelerator=case.accelerator,
        source={"kind": "replay", "path": str(directory / "rows.csv"), **source},
    )


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

    def cpu_share(self, seconds: float) -> float:
        """Share of one core that the lane's thread takes."""
        began, before = time.perf_counter(), self.cpu_s
        time.sleep(seconds)
        return (self.cpu_s - before) / (time.perf_counter() - began)

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


def alone_latency(case: Case, rows: int = 4000) -> tuple[float, float]:
    """Return p50 and p99 in us of what the lane adds to the model, one row at a time."""
    with tempfile.TemporaryDirectory() as name:
        running = Running(package(case, Path(name), 1e9, rate_hz=1.0))
        served = running.lane._serving  # noqa: SLF001 - the lane's own path, without its pauses
        running.stop()
        assert served is not None
        served = load(served.spec)
        values, added, run_us, inner = case.rows(), [], 0.0, served.scorer.run

        def timed(windows: Any) -> Any:
            nonlocal run_us
            scored = inner(windows)
            run_us = float(scored.run_us[0])
            return scored

        served.scorer.run = timed  # type: ignore[method-assign]
        for i in range(rows):
            at = i % ROWS
            batch = Batch(values[at : at + 1], np.array([CLOCK.wall()]), np.array([at]))
            began = time.perf_counter_ns()
            running.lane._score(served, batch)  # noqa: SLF001 - as above
            added.append((time.perf_counter_ns() - began) / 1000 - run_us)
        served.session.close()
    found = np.quantile(added[rows // 10 :], (0.5, 0.99))
    return float(found[0]), float(found[1])


def live(case: Case, seconds: float) -> dict[str, float]:
    """What 1 kHz costs, and what the lane adds to the model's time there, as gathered and row by row."""
    seen: list[Any] = []
    with tempfile.TemporaryDirectory() as name:
        running = Running(package(case, Path(name), 1e9, rate_hz=1000.0))
        report = running.lane._report  # noqa: SLF001 - to see each window's latency and not its sketch
        inner = report.scored

        def scored(served: Any, batch: Any, windows: Any, result: Any, latency: Any) -> None:
            seen.append(latency - result.run_us)
            inner(served, batch, windows, result, latency)

        report.scored = scored  # type: ignore[method-assign]
        share = running.cpu_share(seconds)
        running.stop()
    p50, p99 = np.quantile(np.concatenate(seen), (0.5, 0.99))
    alone = alone_latency(case)
    return {
        "core_share": round(share, 4),
        "added_p50_us": round(float(p50), 1),
        "added_p99_us": round(float(p99), 1),
        "alone_added_p50_us": round(alone[0], 1),
        "alone_added_p99_us": round(alone[1], 1),
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
        found = lives[case.name] = live(case, 5 * given.seconds)
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
