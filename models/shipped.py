"""The models that ship with the project, each with the module that makes it."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from msgspec import Struct

from contract.errors import PitheadError
from models.recipes import Recipe

SHIPPED: Final[Mapping[str, str]] = {
    "shuttle": "models.shuttle.build",
    "host-health": "models.host_health.build",
}
"""Each module has ``RECIPES`` and ``build(directory, version=, release_counter=, recipe=, settings=)``."""


class Order(Struct, frozen=True):
    """What to build."""

    name: str
    recipe: str
    version: str
    release_counter: int
    settings: dict[str, str]

    def directory(self, out: Path) -> Path:
        """Return where the package goes below ``out``."""
        return out / self.name / self.version


def order(
    name: str,
    *,
    recipe: str | None = None,
    version: str | None = None,
    release_counter: int | None = None,
    settings: Mapping[str, str] | None = None,
) -> Order:
    """Return the order for one package; raises ``config.invalid`` for an unknown model or recipe."""
    recipes = recipes_of(name)
    chosen = recipe or next(iter(recipes))
    if chosen not in recipes:
        raise PitheadError("config.invalid", f"{name} has no recipe {chosen!r}, but {', '.join(recipes)}")
    return Order(
        name,
        chosen,
        version or recipes[chosen].version,
        release_counter or recipes[chosen].release_counter,
        dict(settings or {}),
    )


def recipes_of(name: str) -> Mapping[str, Recipe]:
    """Return a shipped model's recipes, the default first."""
    recipes: Mapping[str, Recipe] = _module(name).RECIPES
    return recipes


def build_apart(wanted: Order, out: Path) -> Path:
    """Build in a process of its own, with one thread of arithmetic, and return the package's directory.

    Small matrices gain nothing from threads, and lose much where other
    processes want the same cores. Raises the build's own error.
    """
    directory = wanted.directory(out)
    one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    arguments = {
        "name": wanted.name,
        "directory": str(directory),
        "recipe": wanted.recipe,
        "version": wanted.version,
        "release_counter": wanted.release_counter,
        "settings": wanted.settings,
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", "models.shipped", json.dumps(arguments)],
        env=os.environ | one_thread,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        code, _, detail = last.rpartition("PitheadError: ")[2].partition(": ")
        if "PitheadError" not in last:
            raise PitheadError("internal.error", f"building {wanted.name}: {last}")
        raise PitheadError(code, detail)
    return directory


def _module(name: str) -> ModuleType:
    if name not in SHIPPED:
        raise PitheadError("config.invalid", f"{name!r} is no shipped model; there are {', '.join(SHIPPED)}")
    return importlib.import_module(SHIPPED[name])


def _main() -> None:
    arguments: dict[str, Any] = json.loads(sys.argv[1])
    _module(arguments.pop("name")).build(Path(arguments.pop("directory")), **arguments)


if __name__ == "__main__":
    _main()
