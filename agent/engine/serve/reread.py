"""Let a changed ``serve.toml``, token file or certificate hold while it serves; a wrong one is logged.

A file is read when it has looked the same twice: one that is being written,
or is replaced by an editor that takes it away for a moment, is cut or absent
and yet may be valid, and would take all settings back.
"""

import asyncio
import logging
from pathlib import Path
from typing import Final, TypeAlias

from agent.engine.serve import configuration, tokens
from agent.engine.serve.app import App
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


async def follow_access(app: App, token_file: Path | None) -> None:
    """Look at the tokens and the certificate until this is cancelled; a wrong file leaves the old ones."""
    pair = [path for path in (app.listen.certificate, app.listen.key) if path is not None]
    seen_tokens, seen_pair = _tokens(token_file), [_look(path) for path in pair]
    while True:
        await asyncio.sleep(LOOK_S)
        if (now := _tokens(token_file)) != seen_tokens:
            seen_tokens = now
            _read_tokens(app, token_file)
        if (found := [_look(path) for path in pair]) != seen_pair:
            seen_pair = found
            _renew(app)


def _tokens(path: Path | None) -> tuple[int, ...]:
    return () if path is None else _look(path)


def _read_tokens(app: App, path: Path | None) -> None:
    if app.tokens is None or path is None:
        return
    try:
        app.tokens.become(tokens.read(path))
    except PitheadError as error:
        log.warning("serving.tokens_kept", extra={"facts": {"why": error.detail}})
    else:
        log.info("serving.tokens_read")


def _renew(app: App) -> None:
    try:
        app.renew_certificate()
    except PitheadError as error:
        log.warning("serving.certificate_kept", extra={"facts": {"why": error.detail}})
        return
    if app.grpc is not None:
        log.warning("serving.needs_a_restart", extra={"facts": {"what": "the certificate over gRPC"}})
    log.info("serving.certificate_renewed")


def _look(path: Path) -> Look:
    try:
        found = path.stat()
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_ino, found.st_size, found.st_mtime_ns)
