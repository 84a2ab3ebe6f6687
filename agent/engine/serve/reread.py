"""Let a changed ``serve.toml`` hold while the server runs; a wrong one changes nothing, and is logged."""

import asyncio
import logging
from pathlib import Path
from typing import Final

from agent.engine.serve import configuration
from agent.engine.serve.service import Service
from contract.errors import PitheadError

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5


async def follow(directory: Path, service: Service) -> None:
    """Look at the file until this is cancelled."""
    path = directory / configuration.NAME
    seen = _look(path)
    while True:
        await asyncio.sleep(LOOK_S)
        now = _look(path)
        if now == seen:
            continue
        seen = now
        try:
            said = configuration.read(directory)
            await service.reconfigure(said)
        except PitheadError as error:
            log.warning("serving.configuration_kept", extra={"facts": {"why": error.detail}})


def _look(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_ino, found.st_size, found.st_mtime_ns)
