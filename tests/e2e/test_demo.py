"""The main job, from a signed model to a bad canary that is caught: `pithead demo` with its own checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PITHEAD = Path(sys.executable).parent / "pithead"
TIMEOUT_S = 540


@pytest.mark.alone
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_the_demo_goes_to_its_end(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PITHEAD_")}
    picture = tmp_path / "demo.svg"
    done = subprocess.run(
        [PITHEAD, "demo", "--once", "--headless", "--data-dir", tmp_path / "demo", "--picture", picture],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "FAIL" not in done.stdout
    for chapter in ("Version 1.0.0", "Anomalies", "Version 2.0.0", "Version 3.0.0", "Version 4.0.0"):
        assert chapter in done.stdout
    assert picture.read_text().startswith("<svg")
    left_over = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert not left_over.stdout, "processes of the demo are still running"


@pytest.mark.alone
def test_a_data_directory_in_use_is_refused(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    done = subprocess.run(
        [PITHEAD, "demo", "--once", "--data-dir", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
