"""What bandits have learned, kept across restarts: one file, replaced as a whole.

A reward that was acknowledged is on the disk. Rewards that come while a write
is under way share the next one.
"""

import asyncio
import logging
import os
import tempfile
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agent.engine.serve.background import Background
from agent.engine.serve.bandit import Arm
from contract.errors import PitheadError

log = logging.getLogger(__name__)

FORMAT: Final = 1


class _File(Struct):
    format: int
    models: dict[str, dict[str, Arm]]


class Ledger:
    """Arms by model and version; ``path`` None forgets at the end of the process."""

    def __init__(self, path: Path | None) -> None:
        """Raises ``config.invalid`` where there is a file that cannot be read."""
        self._path = path
        self.models: dict[str, dict[str, Arm]] = {} if path is None else _read(path)
        self._background = Background("ledger")
        self._last: asyncio.Future[None] | None = None
        self._queued = False
        """Whether the last write has not begun; it takes what is changed until then."""

    def arms(self, model: str) -> dict[str, Arm]:
        """Return a model's arms by version, to be read and changed."""
        return self.models.setdefault(model, {})

    async def keep(self) -> None:
        """Return when all that was changed before is on the disk; raises ``serve.state_unwritable``."""
        write = self.begin()
        if write is not None:
            await asyncio.shield(write)

    def begin(self) -> "asyncio.Future[None] | None":
        """See that it will be."""
        if self._path is None:
            return None
        if not self._queued:
            path = self._path
            self._queued = True  # before it can begin
            self._last = self._background.run(lambda: self._write(path))
            self._last.add_done_callback(_look)
        return self._last

    def close(self, timeout_s: float) -> None:
        """End the thread after what is to be written."""
        self._background.stop(timeout_s)

    def _write(self, path: Path) -> None:
        self._queued = False  # what changes from here on needs another write
        try:
            _replace(path, msgspec.json.encode(_File(FORMAT, self.models)))
        except OSError as error:
            raise PitheadError("serve.state_unwritable", f"{path}: {error.strerror}") from error


def _look(write: "asyncio.Future[None]") -> None:
    """Say what became of a write that perhaps nobody waits for."""
    if not write.cancelled() and (error := write.exception()) is not None:
        log.warning("bandits.not_kept", extra={"facts": {"why": str(error)}})


def _read(path: Path) -> dict[str, dict[str, Arm]]:
    try:
        said = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PitheadError("config.invalid", f"{path}: what bandits have learned: {error}") from error
    if said.format != FORMAT:
        raise PitheadError("config.invalid", f"{path}: format {said.format}, {FORMAT} is known here")
    return said.models


def _replace(path: Path, content: bytes) -> None:
    """Let the file have this content or its old one, whenever power fails."""
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
