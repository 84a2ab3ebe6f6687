"""How the machine is, from /proc and /sys. psutil would tell as much and cost 5 MB in a process of 30."""

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")


class CpuMeter:
    """Share of all processors that was busy between two looks."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._busy, self._total = self._read()

    def percent(self) -> float:
        """Return the percentage since the last call, 0 to 100."""
        busy, total = self._read()
        spent, passed = busy - self._busy, total - self._total
        self._busy, self._total = busy, total
        return round(100.0 * spent / passed, 1) if passed > 0 else 0.0

    def _read(self) -> tuple[int, int]:
        """Return (busy, all) in ticks; ``guest`` is part of ``user`` already."""
        with contextlib.suppress(OSError, ValueError):
            line = (self._proc / "stat").read_text(encoding="ascii").split("\n", 1)[0]
            ticks = [int(word) for word in line.split()[1:9]]
            idle = ticks[3] + ticks[4]
            return sum(ticks) - idle, sum(ticks)
        return 0, 0


def memory_percent(proc: Path = PROC) -> float:
    """Return how much of the memory is not available to new programs, 0 to 100."""
    sizes = _fields(proc / "meminfo", ("MemTotal", "MemAvailable"))
    total = sizes.get("MemTotal", 0)
    return round(100.0 * (total - sizes.get("MemAvailable", 0)) / total, 1) if total else 0.0


def pss(pids: Iterable[int], proc: Path = PROC) -> int:
    """Return the proportional set size of some processes together, in bytes; of the dead it is 0."""
    return sum(_fields(proc / str(pid) / "smaps_rollup", ("Pss",)).get("Pss", 0) for pid in pids) * 1024


def temperature(sys: Path = SYS) -> float | None:
    """Return the highest temperature in degrees Celsius; None where there is no sensor."""
    found = []
    for path in (*sys.glob("class/thermal/thermal_zone*/temp"), *sys.glob("class/hwmon/hwmon*/temp*_input")):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text(encoding="ascii")) / 1000)
    return max(found, default=None)


def load_1() -> float | None:
    """Return the load average of the last minute."""
    with contextlib.suppress(OSError):
        return round(os.getloadavg()[0], 2)
    return None


def _fields(path: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Return numbers of lines like ``Name:   123 kB``."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name in names:
                found[name] = int(rest.split()[0])
    return found
