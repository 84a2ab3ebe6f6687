"""A server that has outgrown its memory answers what it has taken, and begins anew.

Nobody but it knows where its models are, so the command stays the same; the
ports stay too, where free ones were asked for.
"""

import asyncio
import logging
import os
import signal
import sys
import time
from typing import Final, NoReturn

from agent.core.memory import Scales
from agent.engine import memory
from contract.errors import PitheadError

log = logging.getLogger(__name__)
WEIGH_S: Final = 1.0
YOUNG_S: Final = 60.0
"""Who outgrows its memory so soon would do so again and again: its models are too large for it."""


async def watch(limit_bytes: int, stop: asyncio.Event) -> str:
    """Look at this process until it holds too much or ``stop`` is set; return what it held, or nothing."""
    scales = Scales(limit_bytes)
    while not stop.is_set():
        said = scales.outgrown(memory.held(), time.monotonic())
        if said:
            log.error("serve.outgrown", extra={"facts": {"detail": said}})
            return said
        try:
            await asyncio.wait_for(stop.wait(), WEIGH_S if limit_bytes else None)
        except TimeoutError:
            continue
    return ""


def begin_again(said: str, age_s: float, ports: dict[str, int]) -> NoReturn:
    """Become the same command once more.

    Raises ``inference.out_of_memory`` for what has just begun.
    """
    if age_s < YOUNG_S:
        raise PitheadError(
            "inference.out_of_memory", f"{said}, {age_s:.0f} s after its start: its models need more"
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    options = [word for name, port in ports.items() for word in (f"--{name}", str(port))]
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *options])  # noqa: S606 - our own command
