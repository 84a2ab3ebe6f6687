"""Let a changed ``serve.toml`` hold while the server runs; a wrong one changes nothing, and is logged.

A file is read when it has looked the same twice: one that is being written,
or is replaced by an editor that takes it away for a moment, is cut or absent
and yet may be valid, and would take all settings back.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final, TypeAlias

from agent.engine.serve import configuration
from agent.engine.serve.service import Service
from contract.errors import PitheadError

log = logging.getLogger(__name__)

LOOK_S: Final = 0.25

Look: TypeAlias = tuple[int, ...]


class Settled:
    """Tells when a file that has changed does not change any more. Pure."""

    def __init__(self, first: Look) -> None:
        self._read = self._last = first

    def changed(self, now: Look) -> bool:
        """Whether it is to be read: it is another than what was read, and the same as a look ago."""
        still, self._last = now == self._last, now
        if not still or now == self._read:
            return False
        self._read = now
        return True


async def follow(directory: Path, service: Service) -> None:
    """Look at the file until this is cancelled."""
    path = directory / configuration.NAME
    settled = Settled(_look(path))
    while True:
        await asyncio.sleep(LOOK_S)
        if not settled.changed(_look(path)):
            continue
        try:
            await service.reconfigure(configuration.read(directory))
        except PitheadError as error:
            log.warning("serving.configuration_kept", extra={"facts": {"why": error.detail}})
        except Exception:  # the next change must still be seen
            log.exception("serving.configuration_failed")


def _look(path: Path) -> Look:
    try:
        found = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_ino, found.st_size, found.st_mtime_ns)
