"""Runs tasks at their intervals, each in a thread of its own, so that a slow one holds up no other."""

import logging
import threading
from collections.abc import Callable, Sequence

import msgspec

from contract.errors import PitheadError

log = logging.getLogger(__name__)


class Task(msgspec.Struct, frozen=True):
    """Something to do every ``period_s`` seconds, counted from the end of the last time."""

    name: str
    period_s: float
    run: Callable[[], object]


class Workers:
    """Threads for tasks. A task that fails is logged, once for each new reason, and tried again."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(task,), name=task.name, daemon=True) for task in tasks
        ]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the tasks that run end, and begin no more."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self, task: Task) -> None:
        failure = ""
        while not self._stopping.is_set():
            try:
                task.run()
            except PitheadError as error:
                if str(error) != failure:
                    log.warning("worker.failed", extra={"facts": {"task": task.name, "error": str(error)}})
                failure = str(error)
            except Exception as error:
                if str(error) != failure:
                    log.exception("worker.failed", extra={"facts": {"task": task.name}})
                failure = str(error)
            else:
                failure = ""
            self._stopping.wait(task.period_s)
