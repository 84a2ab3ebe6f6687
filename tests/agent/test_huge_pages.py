"""Processes that load models ask for large pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.huge_pages import VARIABLE, environment


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "glibc.malloc.hugetlb=1"),
        ({VARIABLE: ""}, "glibc.malloc.hugetlb=1"),
        ({VARIABLE: "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
        ({VARIABLE: "glibc.malloc.check=3"}, "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
    ],
)
def test_what_a_person_has_said_stands(before: dict[str, str], after: str):
    assert environment(before) == {VARIABLE: after}
    assert environment(environment(before)) == {VARIABLE: after}


def test_serve_becomes_itself_with_large_pages(tmp_path: Path):
    command = [sys.executable, "-m", "agent", "serve", str(tmp_path), "--http-port", "0"]
    before = {k: v for k, v in os.environ.items() if k != VARIABLE}
    with subprocess.Popen(command, env=before, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "://" in process.stdout.readline(), "it listens"
        seen = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
        assert f"{VARIABLE}=glibc.malloc.hugetlb=1".encode() in seen
        process.terminate()
        assert process.wait(20) == 0
