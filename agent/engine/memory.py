"""Keep a process that runs models within its memory: set its limit, and offer it to the kernel first."""

import contextlib
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.core import memory

log = logging.getLogger(__name__)
PROC: Final = Path("/proc")
CGROUPS: Final = Path("/sys/fs/cgroup")


def machine_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Return how much memory this process could have at all: the machine's, or its container's; else 0."""
    found = [number for number in (_total(proc), *_allowed(proc, cgroups)) if number > 0]
    return min(found, default=0)


def keep_within(limit_bytes: int, proc: Path = PROC) -> None:
    """Let requests for memory fail somewhat above ``limit_bytes`` (0: never), and be the first to be killed.

    ``RLIMIT_DATA`` counts private writable pages, not what a driver only
    reserves or a file that is mapped (setrlimit(2), Linux 4.7 and later).
    """
    if limit_bytes:
        most = memory.asked_at_most(limit_bytes)
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        held = [value for value in (soft, hard) if value != resource.RLIM_INFINITY]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (min([most, *held]), hard))
    path = proc / "self" / "oom_score_adj"
    # Anybody may raise his own; a person who has raised it further knows why.
    with contextlib.suppress(OSError, ValueError):
        if int(path.read_text(encoding="ascii")) < memory.FIRST_TO_GO:
            path.write_text(str(memory.FIRST_TO_GO), encoding="ascii")


def _total(proc: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    return 0


def _allowed(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield the limits of this process's control group and of those above it (cgroups(7), version 2)."""
    path = ""
    with contextlib.suppress(OSError, ValueError):
        for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            if line.startswith("0::"):
                path = line.removeprefix("0::").strip("/")
    here = cgroups / path
    for directory in (here, *here.parents):
        if not directory.is_relative_to(cgroups):
            return
        with contextlib.suppress(OSError, ValueError):
            yield int((directory / "memory.max").read_text(encoding="ascii"))


def held(pid: int | None = None, proc: Path = PROC) -> int:
    """Return the private memory of a process (this one, if none is named), swapped out or not, in bytes.

    Of one that is dead it is 0.
    """
    found = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        path = proc / ("self" if pid is None else str(pid)) / "status"
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("RssAnon:", "VmSwap:")):
                found += int(line.split()[1]) * 1024
    return found
