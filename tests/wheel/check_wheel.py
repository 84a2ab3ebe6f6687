"""Build the wheel, install it with only the ``agent`` extra, and import what runs on a device.

Run by ``make check``. Nothing of the control plane may be loaded, or even be
installed, on a device.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORTS = """
import importlib, importlib.util, pkgutil, sys
optional = ("agent.engine.serve.", "agent.engine.sources.")
extras = {"asyncua", "google", "hpack", "httptools", "PIL", "pyarrow", "pymodbus", "uvloop"}
for room in ("agent", "contract", "inference"):
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(package.__path__, room + "."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            # Serving and some sources have extras of their own.
            if not module.name.startswith(optional) or error.name.partition(".")[0] not in extras:
                raise
heavy = {"fastapi", "starlette", "pydantic", "sqlmodel", "sqlalchemy", "nicegui", "typer", "uvicorn"}
loaded = heavy & set(sys.modules)
installed = {name for name in heavy if importlib.util.find_spec(name)}
assert not loaded, f"loaded on a device: {loaded}"
assert not installed, f"installed on a device: {installed}"
rooms = {"agent", "contract", "control_plane", "inference", "models", "provisioning", "simulator"}
assert all(importlib.util.find_spec(room) for room in rooms)
where = importlib.util.find_spec("agent").origin
assert "site-packages" in where, where
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run a step and end with its output when it fails."""
    done = subprocess.run(list(command), cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def main() -> None:
    """Do the steps in a temporary directory."""
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp, ROOT, cwd=tmp)
        (wheel,) = tmp.glob("*.whl")
        venv.create(tmp / "env", with_pip=True)
        python = tmp / "env" / "bin" / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, "--require-hashes", "-r", ROOT / "requirements" / "agent.txt", cwd=tmp)
        run(*pip, "--no-deps", wheel, cwd=tmp)
        run(python, "-m", "pip", "check", cwd=tmp)
        run(python, "-c", IMPORTS, cwd=tmp)
        run(tmp / "env" / "bin" / "pithead-agent", "--help", cwd=tmp)
        print(f"{wheel.name}: installs and imports with the agent extra alone")


if __name__ == "__main__":
    main()
