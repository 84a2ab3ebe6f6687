"""The README's walk through a site of one's own, typed as it stands there."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parents[2]
HEADING = "## A site of your own"
TIMEOUT_S = 300


def block() -> str:
    """The first block of commands below the heading."""
    return (HERE / "README.md").read_text().split(HEADING)[1].split("```\n")[1]


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[subprocess.CompletedProcess[str]]:
    """A shell that went through the block in an empty directory, with the processes that it left running."""
    (tmp_path / "docs").symlink_to(HERE / "docs")
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    log = tmp_path / "said.txt"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PITHEAD_")} | {
        "HOME": str(tmp_path)
    }
    with log.open("w") as said:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", waiting(block())],
            cwd=tmp_path, env=environment, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            code = shell.wait(TIMEOUT_S)
            yield subprocess.CompletedProcess(shell.args, code, log.read_text())
        finally:
            end_group(shell.pid)


def waiting(commands: str) -> str:
    """The commands, with the pause that a person makes after starting the control plane."""
    ready = "timeout 60 bash -c 'until pithead devices list; do sleep 0.5; done' > /dev/null 2>&1"
    serve = next(line for line in commands.splitlines() if line.startswith("pithead serve"))
    return commands.replace(serve, f"{serve}\n{ready}")


def end_group(group: int) -> None:
    """End the supervisor first, which ends its engine, then all that is left of the shell's session."""

    def left() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if _session(p) == group]

    for process in left():
        process.send_signal(signal.SIGTERM)
    _, stuck = psutil.wait_procs(left(), timeout=20)
    for process in stuck:
        process.kill()


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_the_readme_s_walk_ends_with_a_model_in_service(
    walk: subprocess.CompletedProcess[str], tmp_path: Path
):
    assert walk.returncode == 0, walk.stdout[-4000:]
    assert "succeeded" in walk.stdout, walk.stdout[-20000:]
    assert "my-first-device" in walk.stdout
    assert "BECAUSE OF" in walk.stdout or "No anomalies" in walk.stdout
    status = [sys.executable, "-m", "agent", "status", "--json", "--root", tmp_path / "device"]
    found = json.loads(subprocess.run(status, capture_output=True, text=True, check=True).stdout)
    assert "host-health" in json.dumps(found)
