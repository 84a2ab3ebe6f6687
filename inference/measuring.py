"""What one run of a model costs: time, memory, and energy where the host counts it."""

import os
import time
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from inference.reports import Limits
from inference.session import Session

MIN_RUNS, MAX_RUNS = 10, 100
"""In one round of measuring."""
MIN_ROUNDS, MAX_ROUNDS = 3, 10
MEASURE_MOST_S: Final = 2.0
"""No further run begins after this: a slow model is known well enough by few runs."""
_WARM_UP: Final = 3
POWERCAP: Final = Path("/sys/class/powercap")


class Timing(Struct, frozen=True):
    """Of single runs, in microseconds; energy in microjoules."""

    p50_us: float
    p99_us: float
    runs: int
    energy_uj: float | None = None


class Energy:
    """The host's energy counters of whole processor packages (RAPL, through the kernel's powercap).

    Opened before a sandbox closes, and read through the descriptors. Newer
    kernels let only root read them.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones: list[tuple[int, int]] = []
        # `intel-rapl:0` is a package, `intel-rapl:0:1` a part of it; AMD's have the same names.
        for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
            if zone.name.count(":") > 1:
                continue
            try:
                span = int((zone / "max_energy_range_uj").read_text("ascii"))
                self._zones.append((os.open(zone / "energy_uj", os.O_RDONLY | os.O_CLOEXEC), span))
            except (OSError, ValueError):
                continue

    def read(self) -> tuple[int, ...]:
        """Return each counter in microjoules; empty where the host has none."""
        return tuple(int(os.pread(zone, 64, 0) or b"0") for zone, _ in self._zones)

    def since(self, before: tuple[int, ...]) -> int | None:
        """Return the microjoules used since ``before``; a counter may have begun anew once."""
        if not before:
            return None
        spans = [span for _, span in self._zones]
        return sum((b - a) % span for a, b, span in zip(before, self.read(), spans, strict=True))


class Memory:
    """This process's memory in MB, through a descriptor that the sandbox leaves open."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self.before = self.read("VmRSS")

    def read(self, key: str) -> float:
        """Return ``VmRSS``, ``VmHWM`` or another figure of ``/proc/self/status``."""
        for line in os.pread(self._file, 8192, 0).decode("ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) / 1024
        return 0.0


def measure(session: Session, feed: Any, limits: Limits, energy: Energy | None = None) -> Timing:
    """Return what one run takes: p50 and p99 of the calmest round.

    Where twenty agents probe on two cores, what the others take is not this model's cost.
    """
    began = time.perf_counter()
    for _ in range(_WARM_UP):
        session.run(feed)
        if time.perf_counter() > began + MEASURE_MOST_S:
            break
    counters = energy.read() if energy is not None else ()
    rounds: list[tuple[float, float]] = []
    runs = 0
    end = time.perf_counter() + limits.measure_s
    last = max(end, began + MEASURE_MOST_S)
    while not rounds or time.perf_counter() < (last if len(rounds) < MIN_ROUNDS else end):
        times = _round(session, feed, limits.measure_s / MIN_ROUNDS, last)
        rounds.append((times[int(len(times) * 0.99)], times[len(times) // 2]))
        runs += len(times)
        hopeless = limits.enough_us is not None and rounds[-1][1] > limits.enough_us
        if hopeless or len(rounds) == MAX_ROUNDS:
            break
    used = energy.since(counters) if energy is not None else None
    p99, p50 = min(rounds)
    return Timing(p50, p99, runs, None if used is None else used / runs)


def _round(session: Session, feed: Any, share_s: float, last: float) -> list[float]:
    """Return what some runs took, in microseconds, from the shortest on."""
    times: list[float] = []
    until = time.perf_counter() + share_s
    while len(times) < MAX_RUNS:
        start = time.perf_counter()
        if times and start > (last if len(times) < MIN_RUNS else until):
            break
        session.run(feed)
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times)
