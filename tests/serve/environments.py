"""Environments of other people's clients, each made once below ``.venvs`` from pinned requirements.

``python tests/serve/environments.py client-triton`` makes one and prints its interpreter.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venvs"


class NotInstallableError(Exception):
    """pip says why."""


def environment(name: str) -> Path:
    """Return the interpreter of an environment with ``requirements/<name>.txt``."""
    requirements = ROOT / "requirements" / f"{name}.txt"
    directory = ENVIRONMENTS / name
    executable, stamp = directory / "bin" / "python", directory / ".installed"
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    ENVIRONMENTS.mkdir(exist_ok=True)
    with (ENVIRONMENTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one process makes it
        if stamp.is_file() and stamp.read_text() == digest:
            return executable
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True, capture_output=True)
        done = subprocess.run(
            [
                *(str(executable), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
                *("--require-hashes", "-r", str(requirements)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise NotInstallableError(done.stderr.strip()[-500:])
        stamp.write_text(digest)
    return executable


if __name__ == "__main__":
    sys.stdout.write(f"{environment(sys.argv[1])}\n")
