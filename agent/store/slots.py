"""Slots on disk: one small JSON file for each model, replaced whole."""

import logging
from pathlib import Path
from typing import Final

import msgspec

from agent.core.slots import Slots
from agent.store import durable
from contract.messages import Name

log = logging.getLogger(__name__)
SUFFIX: Final = ".json"


class SlotStore:
    """All models' slots, read once and kept in memory; every change is durable before it is seen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._slots = read_all(directory)

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
        durable.write(self._path(slots.model_name), msgspec.json.encode(slots))
        self._slots[slots.model_name] = slots

    def remove(self, model_name: Name) -> None:
        """Forget a model. Raises ``storage.*``."""
        durable.remove(self._path(model_name))
        self._slots.pop(model_name, None)

    def _path(self, model_name: Name) -> Path:
        return self.directory / f"{model_name}{SUFFIX}"


def read_all(directory: Path) -> dict[Name, Slots]:
    """Return the slots of every model; a file that cannot be read is reported and left alone."""
    found: dict[Name, Slots] = {}
    if not directory.is_dir():
        return found
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        if path.name.startswith(durable.TEMPORARY):
            continue
        try:
            slots = msgspec.json.decode(path.read_bytes(), type=Slots)
        except (OSError, msgspec.MsgspecError) as error:
            log.error("slots.unreadable", extra={"facts": {"path": str(path), "detail": str(error)}})  # noqa: TRY400
            continue
        found[slots.model_name] = slots
    return found
