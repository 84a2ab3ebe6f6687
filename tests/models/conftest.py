"""Shipped packages, built once for all tests."""

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.manifest import Manifest
from models import package, shipped


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Manifest]]:
    """Return a shipped package by model and recipe; test processes share what was built."""
    root = tmp_path_factory.getbasetemp()
    # With xdist each process has a directory of its own inside the common one.
    common = (root.parent if root.name.startswith("popen-") else root) / "shipped"

    def get(name: str, recipe: str) -> tuple[Path, Manifest]:
        common.mkdir(exist_ok=True)
        with (common / f"{name}-{recipe}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            wanted = shipped.order(name, recipe=recipe)
            directory = wanted.directory(common)
            if not (directory / "manifest.json").is_file():
                shipped.build_apart(wanted, common)
        return directory, package.read_manifest(directory)

    return get
