"""The linter of our layers really catches a breach: each is tried on a copy of the tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("agent", "contract", "control_plane", "inference", "models", "provisioning", "simulator")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [command, "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tree_as_it_is_passes(tree: Path):
    done = lint(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("breach", "line"),
    [
        ("agent/link/breach.py", "import fastapi"),
        ("agent/store/breach.py", "from agent.link import mqtt"),
        ("agent/core/breach.py", "import time"),
        ("contract/breach.py", "import socket"),
        ("control_plane/core/breach.py", "import sqlalchemy"),
        ("control_plane/services/breach.py", "from control_plane.api import app"),
        ("control_plane/services/breach.py", "import onnxruntime"),
        ("inference/breach.py", "import models.package"),
        ("control_plane/cli/breach.py", "import simulator"),
    ],
)
def test_a_deliberate_breach_is_caught(tree: Path, breach: str, line: str):
    (tree / breach).write_text(f"{line}\n")
    done = lint(tree)
    assert done.returncode != 0, f"{line!r} in {breach} was not caught"
    assert Path(breach).stem in done.stdout
