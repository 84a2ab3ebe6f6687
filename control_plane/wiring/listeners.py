"""Two uvicorn servers in one loop, which end together on SIGTERM or SIGINT."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import uvicorn
import uvloop

from contract.errors import PitheadError

GRACE_S: Final = 5
BACKLOG: Final = 2048


class Listener(uvicorn.Server):
    """A server that leaves the signals to whoever runs several of them."""

    def __init__(self, config: uvicorn.Config, bound: socket.socket) -> None:
        config.timeout_graceful_shutdown = GRACE_S
        super().__init__(config)
        self.bound = bound
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve, and say so."""
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals as they are."""
        yield


def bind(host: str, port: int, setting: str) -> socket.socket:
    """Return a listening socket; ``config.invalid`` names the setting when the port is taken."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family = found[0][0] if host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise PitheadError(
            "config.invalid", f"{setting}: cannot listen on {host or '*'}:{port}: {error.strerror}"
        ) from error


def serve(listeners: Sequence[Listener], ready: Callable[[], None]) -> None:
    """Serve until a signal comes; ``ready`` is called when all of them do."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(listeners, ready))


async def _serve(listeners: Sequence[Listener], ready: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    tasks = [loop.create_task(listener.serve(sockets=[listener.bound])) for listener in listeners]
    waiting = loop.create_task(stopping.wait())
    started = loop.create_task(_all_ready(listeners, ready))
    await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    started.cancel()
    for listener in listeners:
        listener.should_exit = True
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def _all_ready(listeners: Sequence[Listener], ready: Callable[[], None]) -> None:
    for listener in listeners:
        await listener.ready.wait()
    ready()
