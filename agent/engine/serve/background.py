"""Threads for what may take long: loading and freeing models. No loop ever waits for them."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from contract.errors import PitheadError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """One thread, one job after the other; it dies with the process, since a load may never end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Return a future of this loop; what is not a ``PitheadError`` becomes ``internal.error``."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            result: Any = None
            failure: PitheadError | None = None
            try:
                result = work()
            except PitheadError as error:
                failure = error
            except Exception as error:
                log.exception("background.failed")
                code = "inference.out_of_memory" if isinstance(error, MemoryError) else "internal.error"
                failure = PitheadError(code, f"{type(error).__name__}: {error}"[:500])
            try:
                loop.call_soon_threadsafe(_settle, future, result, failure)
            except RuntimeError:  # the loop has ended; nobody waits
                return

        self._start()
        self._jobs.put(job)
        return future

    def do(self, work: Callable[[], None]) -> None:
        """Do ``work`` some time; nobody wants to know."""

        def job() -> None:
            try:
                work()
            except Exception:
                log.exception("background.failed")

        self._start()
        self._jobs.put(job)

    def stop(self, timeout_s: float) -> bool:
        """End after the jobs that were given; return whether that happened in time."""
        if self._thread is None:
            return True
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _settle(future: "asyncio.Future[Any]", result: Any, failure: PitheadError | None) -> None:
    if future.done():
        return
    if failure is not None:
        future.set_exception(failure)
    else:
        future.set_result(result)
