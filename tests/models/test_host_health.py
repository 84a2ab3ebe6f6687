"""`host-health`: a short calibration, then load of one kind or of every kind, then an alarm.

With made-up readings of a machine first, where every kind of load can be
told apart; then on this very machine.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from agent.engine.calibration import Calibration
from agent.engine.clock import Clock
from agent.engine.sources.system import open_source
from agent.engine.window import Rows, Windower, Windows
from agent.ports import FitResult
from contract.manifest import Manifest
from inference.registry import open_session
from inference.scoring import Scorer
from models.host_health import CHANNELS

Built = Callable[[str, str], tuple[Path, Manifest]]
CALIBRATION_S, LOAD_S = 180.0, 30.0
MEMORY_SHARE = 0.1
"""Of what is free: a part of the load that shows even where the processors are busy with other tests."""


CALM_PERCENT = 70.0
"""Above this the processors are busy with other things, so that work on them alone need not stand out."""

CALM_THRESHOLD = 3.0
"""Above this the calibration saw work of the same kind come and go."""


def spin() -> None:
    """Work on the CPU alone, until killed, or for half a minute at most."""
    end = time.monotonic() + LOAD_S
    while time.monotonic() < end:
        sum(i * i for i in range(100_000))


def burn(folder: str, memory: int) -> None:
    """Work on the CPU and on the disk, and hold memory, until killed, or for half a minute at most."""
    end = time.monotonic() + LOAD_S
    held = np.ones(memory, np.uint8)
    assert held[-1] == 1
    block = os.urandom(1 << 20)
    with (Path(folder) / f"load-{os.getpid()}").open("wb") as file:
        while time.monotonic() < end:
            sum(i * i for i in range(100_000))
            file.seek(0)
            file.write(block)
            file.flush()
            os.fsync(file.fileno())


# ---- made-up readings


class Machine:
    """Readings of a machine at so much work, with the noise of an idle one."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def rows(self, n: int, **load: float) -> Rows:
        idle = {"cpu_percent": 5.0, "memory_percent": 40.0, "disk_read_log": 1.0, "disk_write_log": 3.0}
        idle |= {"net_log": 3.0, "pressure_cpu": 0.5, "pressure_io": 0.3, "load_per_core": 0.1}
        noise = {"cpu_percent": 4.0, "disk_read_log": 0.5, "disk_write_log": 0.8, "net_log": 0.5}
        noise |= {"pressure_cpu": 0.5, "pressure_io": 0.3, "memory_percent": 0.3, "load_per_core": 0.05}
        level, width = idle | load, [noise.get(c.name, 0.0) for c in CHANNELS]
        base = np.array([level.get(c.name, 0.0) for c in CHANNELS])
        rows = base + self._random.normal(size=(n, len(CHANNELS))) * width
        return np.clip(rows, 0.0, [100.0 if c.unit == "%" else 10_000.0 for c in CHANNELS])

    def burst(self, n: int) -> Rows:
        """Two seconds of an update that installs, and the pressure averages that forget it slowly."""
        rows = self.rows(n)
        rows[10:14] = self.rows(4, cpu_percent=95.0, disk_read_log=6.0, disk_write_log=7.0, pressure_cpu=15.0)
        pressure = [c.name for c in CHANNELS].index("pressure_cpu")
        rows[14:34, pressure] = 15.0 * np.exp(-np.arange(20) / 20)
        return rows


SINGLE_LOADS: dict[str, dict[str, float]] = {
    "cpu": {"cpu_percent": 100.0, "pressure_cpu": 20.0, "load_per_core": 0.4},
    "one core of four": {"cpu_percent": 30.0, "pressure_cpu": 3.0, "load_per_core": 0.3},
    "disk": {"disk_read_log": 7.0, "disk_write_log": 8.0, "pressure_io": 50.0, "load_per_core": 0.6},
    "memory": {"memory_percent": 90.0},
}


class Lane:
    """The model, fitted to what it is given."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        assert manifest.pipeline is not None
        assert manifest.pipeline.fit is not None
        assert manifest.score is not None
        variant = manifest.variants[0]
        session = open_session(directory / variant.file.path, variant.format, variant.accelerators[0])
        self.pipeline, self.fit = manifest.pipeline, manifest.pipeline.fit
        self.scorer = Scorer(session, self.pipeline, manifest.score, variant.inputs, variant.outputs)
        self.needed = (self.fit.samples - 1) * self.pipeline.stride + self.pipeline.window
        """Rows of a calibration."""

    def windows(self, rows: Rows) -> Windows:
        windower = Windower(self.pipeline.window, self.pipeline.stride, len(self.pipeline.channels))
        return windower.push(rows, np.ones(len(rows), bool))

    def fitted(self, rows: Rows) -> FitResult:
        calibration = Calibration(self.fit, self.pipeline.window)
        calibration.add(self.windows(rows))
        assert calibration.complete
        return calibration.result(self.scorer, 0)

    def scores(self, rows: Rows) -> np.ndarray[Any, Any]:
        return self.scorer.run(self.windows(rows)).scores


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("calibrated", ["rows", "burst"])
def test_each_kind_of_load_stands_out_whatever_happened_during_calibration(
    built: Built, seed: int, calibrated: str
):
    lane, machine = Lane(*built("host-health", "baseline")), Machine(seed)
    fit = lane.fitted(getattr(machine, calibrated)(lane.needed))
    assert fit.threshold < 1.2, "near its floor of 0.6, also after a busy moment"
    for kind, load in SINGLE_LOADS.items():
        assert lane.scores(machine.rows(20, **load)).max() > fit.threshold, kind
    idle = lane.scores(machine.rows(4000))
    assert (idle > fit.threshold).mean() < 0.001


# ---- this machine


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.alone
def test_real_load_raises_an_alarm(built: Built, tmp_path: Path):
    lane = Lane(*built("host-health", "baseline"))
    pipeline = lane.pipeline
    clock = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)
    source = open_source({"kind": "system"}, pipeline, clock)
    windower = Windower(pipeline.window, pipeline.stride, len(pipeline.channels))
    calibration = Calibration(lane.fit, pipeline.window)

    def windows() -> Windows | None:
        time.sleep(source.wait_s())
        batch = source.poll(16)
        if batch is None:
            return None
        return windower.push(batch.values, np.ones(len(batch.values), bool), continues=batch.continues)

    def until_alarm(threshold: float, what: str) -> None:
        highest, end = 0.0, time.monotonic() + LOAD_S
        while highest <= threshold:
            assert time.monotonic() < end, f"{what}: highest {highest:.3f}, threshold {threshold:.3f}"
            if (cut := windows()) is not None and len(cut.starts):
                highest = max(highest, float(lane.scorer.run(cut).scores.max()))

    end = time.monotonic() + CALIBRATION_S
    while not calibration.complete:
        assert time.monotonic() < end, calibration.progress
        if (cut := windows()) is not None:
            calibration.add(cut)
    fit = calibration.result(lane.scorer, 0)
    low, high = lane.fit.threshold_range
    assert low <= fit.threshold <= high

    count = 2 * (os.cpu_count() or 1)
    memory = int(psutil.virtual_memory().available * MEMORY_SHARE) // count
    cpu = [c.name for c in pipeline.channels].index("cpu_percent")
    if fit.mean[cpu] < CALM_PERCENT and fit.threshold < CALM_THRESHOLD:
        with at_work(spin, count=count):
            until_alarm(fit.threshold, "CPU alone")
    with at_work(burn, str(tmp_path), memory, count=count):
        until_alarm(fit.threshold, "every kind of load")


@contextmanager
def at_work(work: Callable[..., None], *arguments: object, count: int) -> Iterator[None]:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
