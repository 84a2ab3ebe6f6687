"""`host-health` on this very machine: a short calibration, then real load, then an alarm."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent.engine.calibration import Calibration
from agent.engine.clock import Clock
from agent.engine.sources.system import open_source
from agent.engine.window import Windower, Windows
from contract.manifest import Manifest
from inference.registry import open_session
from inference.scoring import Scorer

Built = Callable[[str, str], tuple[Path, Manifest]]
CALIBRATION_S, LOAD_S = 60.0, 30.0
MEMORY_SHARE = 0.1
"""Of what is free: a part of the load that shows even where the processors are busy with other tests."""


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


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.xdist_group("host-health")
def test_real_load_raises_an_alarm(built: Built, tmp_path: Path):
    directory, manifest = built("host-health", "baseline")
    variant = manifest.variants[0]
    session = open_session(directory / variant.file.path, variant.format, variant.accelerators[0])
    pipeline = manifest.pipeline
    clock = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)
    source = open_source({"kind": "system"}, pipeline, clock)
    windower = Windower(pipeline.window, pipeline.stride, len(pipeline.channels))
    scorer = Scorer(session, pipeline, manifest.score, variant.inputs, variant.outputs)
    calibration = Calibration(pipeline.fit, pipeline.window)

    def windows() -> Windows | None:
        time.sleep(source.wait_s())
        batch = source.poll(16)
        if batch is None:
            return None
        return windower.push(batch.values, np.ones(len(batch.values), bool), continues=batch.continues)

    end = time.monotonic() + CALIBRATION_S
    while not calibration.complete:
        assert time.monotonic() < end, calibration.progress
        if (cut := windows()) is not None:
            calibration.add(cut)
    fit = calibration.result(scorer, 0)
    low, high = pipeline.fit.threshold_range
    assert low <= fit.threshold <= high

    count = 2 * (os.cpu_count() or 1)
    memory = int(psutil.virtual_memory().available * MEMORY_SHARE) // count
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=burn, args=(str(tmp_path), memory)) for _ in range(count)]
    for worker in workers:
        worker.start()
    seen: list[float] = []
    end = time.monotonic() + LOAD_S
    try:
        while not seen or max(seen) <= fit.threshold:
            assert time.monotonic() < end, (
                f"highest score {max(seen, default=0):.3f}, threshold {fit.threshold:.3f}"
            )
            if (cut := windows()) is not None and len(cut.starts):
                seen.extend(scorer.run(cut).scores.tolist())
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert max(seen) > fit.threshold
