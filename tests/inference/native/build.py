"""Build the external TFLite delegate of the tests."""

import shutil
import subprocess
from pathlib import Path


def build(directory: Path) -> Path:
    """Return the library, built in ``directory``."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "install gcc: the tests build a delegate"
    built = directory / "libdense.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror"]
    source = Path(__file__).with_name("delegate.c")
    subprocess.run([compiler, *flags, "-o", str(built), str(source)], check=True)
    return built
