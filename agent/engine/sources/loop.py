"""A source with an event loop of its own, for libraries that want one."""

import asyncio
import contextlib
from abc import abstractmethod

from agent.engine.sources.inbox import ThreadedSource


class LoopSource(ThreadedSource):
    """``serve`` runs until the source is closed, and is then cancelled."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__(name, width)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._halt: asyncio.Event | None = None

    @abstractmethod
    async def serve(self) -> None:
        """Put rows into the inbox; see ``ThreadedSource.work``."""

    def interrupt(self) -> None:
        """See ``ThreadedSource``."""
        if self._loop is not None and self._halt is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self._loop.call_soon_threadsafe(self._halt.set)

    def work(self) -> None:
        """See ``ThreadedSource``."""
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._halt = asyncio.get_running_loop(), asyncio.Event()
        serving = asyncio.create_task(self.serve())
        halted = asyncio.create_task(self._halt.wait())
        if self.stopping.is_set():  # before the event was there to be set
            self._halt.set()
        await asyncio.wait({serving, halted}, return_when=asyncio.FIRST_COMPLETED)
        halted.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving
