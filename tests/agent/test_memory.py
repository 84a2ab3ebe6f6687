"""How much an engine may hold, and when it holds too much."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from agent.core import memory
from agent.core.memory import Scales
from agent.engine.memory import held, machine_bytes
from agent.service.engine_process import how_it_ended

MB = 1024 * 1024


def test_only_what_stays_above_the_limit_is_outgrown():
    scales = Scales(100 * MB)
    assert not scales.outgrown(101 * MB, 0.0)
    assert not scales.outgrown(99 * MB, 4.0)
    assert not scales.outgrown(150 * MB, 5.0)
    assert not scales.outgrown(150 * MB, 5.0 + memory.OUTGROWN_S - 0.1)
    assert (
        scales.outgrown(150 * MB, 5.0 + memory.OUTGROWN_S) == "it held 150 MB of memory, and may hold 100 MB"
    )
    scales.forget()
    assert not scales.outgrown(150 * MB, 20.0)
    assert not Scales(0).outgrown(2**50, 0.0)


@pytest.mark.parametrize(
    ("said", "machine", "wanted"), [(None, 4096, 3072), (512, 4096, 512), (0, 4096, 0), (None, 0, 0)]
)
def test_the_limit_is_what_is_said_or_three_quarters(said: int | None, machine: int, wanted: int):
    assert memory.limit(said, machine * MB) == wanted * MB


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8192),
        ({"a/memory.max": "max"}, 8192),
        ({"a/memory.max": str(512 * MB), "a/b/memory.max": "max"}, 512),
        ({"a/memory.max": str(512 * MB), "a/b/memory.max": str(256 * MB)}, 256),
        ({"a/b/memory.max": "nonsense"}, 8192),
    ],
)
def test_a_container_s_limit_counts_where_it_is_the_smaller(
    tmp_path: Path, files: dict[str, str], wanted: int
):
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {8192 * 1024} kB\n")
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (cgroups / "a" / "b").mkdir(parents=True)
    for name, text in files.items():
        (cgroups / name).write_text(text)
    assert machine_bytes(proc, cgroups) == wanted * MB


def test_a_process_is_held_to_its_limit_and_goes_first():
    script = (
        "import resource; from agent.engine.memory import keep_within; keep_within(200 * 2**20)\n"
        "print(resource.getrlimit(resource.RLIMIT_DATA)[0])\n"
        "print(open('/proc/self/oom_score_adj').read().strip())\n"
        "try: bytearray(2**30)\n"
        "except MemoryError: print('refused')"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == [str(memory.asked_at_most(200 * MB)), "500", "refused"]
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_what_is_held_is_private_and_of_the_dead_nothing():
    before = held()
    kept = bytearray(64 * MB)
    kept[::4096] = bytes([1]) * len(kept[::4096])
    assert 48 * MB < held() - before < 96 * MB
    assert held(2**22 + 1) == 0


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, ""),
        (0, "ended with status 0"),
        (-11, "died of SIGSEGV"),
        (-9, "died of SIGKILL, as the kernel"),
    ],
)
def test_an_exit_status_in_words(status: int | None, words: str):
    assert how_it_ended(status).startswith(words)
