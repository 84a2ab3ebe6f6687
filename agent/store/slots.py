"""Slots on disk: one small JSON file for each model, replaced whole."""

import logging
from pathlib import Path
from typing import Final

import msgspec

from agent.core.slots import Slots
from agent.store import durable
from contract.errors import PitheadError
from contract.messages import Name

log = logging.getLogger(__name__)
SUFFIX: Final = ".json"
RESERVE: Final = 128 * 1024
"""Bytes set aside, so that a rollback can be written when the disk is full."""


class SlotStore:
    """All models' slots, read once and kept in memory; every change is durable before it is seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._reserve = directory / ".reserve"
        self._slots = read_all(directory)
        self._foreign: set[Path] = set()
        """Files that cannot be read: nobody knows what is in them, so they are not replaced."""
        if directory.is_dir():
            self._put_aside_unreadable()
            durable.set_reserve(self._reserve, RESERVE)

    def all(self) -> dict[Name, Slots]:
        """Return the slots of every model by name."""
        return dict(self._slots)

    def get(self, model_name: Name) -> Slots:
        """Return a model's slots; empty ones when it has none yet."""
        return self._slots.get(model_name, Slots(model_name))

    def save(self, slots: Slots) -> None:
        """Store a model's slots. Raises ``storage.*``; then nothing has changed."""
        if self._slots.get(slots.model_name) == slots:
            return
        path, data = self._path(slots.model_name), msgspec.json.encode(slots)
        if path in self._foreign:
            raise PitheadError("storage.failed", f"{path} cannot be read, and is not replaced")
        try:
            durable.write(path, data)
        except PitheadError as error:
            if error.code != "storage.full":
                raise
            self._reserve.unlink(missing_ok=True)
            durable.write(path, data)
        durable.set_reserve(self._reserve, RESERVE)
        self._slots[slots.model_name] = slots

    def remove(self, model_name: Name) -> None:
        """Forget a model. Raises ``storage.*``."""
        durable.remove(self._path(model_name))
        self._slots.pop(model_name, None)

    def _put_aside_unreadable(self) -> None:
        """Keep files that are damaged for a person to look at, under another name."""
        known = {self._path(name) for name in self._slots}
        for path in files(self.directory):
            if path in known:
                continue
            try:
                path.read_bytes()
                path.rename(path.with_name(f"{path.name}.damaged"))
            except OSError:
                self._foreign.add(path)

    def _path(self, model_name: Name) -> Path:
        return self.directory / f"{model_name}{SUFFIX}"


def files(directory: Path) -> list[Path]:
    """Return the models' files."""
    found = sorted(directory.glob(f"*{SUFFIX}")) if directory.is_dir() else []
    return [path for path in found if not path.name.startswith(durable.TEMPORARY)]


def read_all(directory: Path) -> dict[Name, Slots]:
    """Return the slots of every model; a file that cannot be read is reported and left alone."""
    found: dict[Name, Slots] = {}
    for path in files(directory):
        try:
            slots = msgspec.json.decode(path.read_bytes(), type=Slots)
        except (OSError, msgspec.MsgspecError) as error:
            log.error("slots.unreadable", extra={"facts": {"path": str(path), "detail": str(error)}})  # noqa: TRY400
            continue
        found[slots.model_name] = slots
    return found
