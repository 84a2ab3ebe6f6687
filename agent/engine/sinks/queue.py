"""Messages on their way from a lane to the thread of one sink: bounded, so that no sink holds a lane."""

import threading
from collections import deque
from collections.abc import Sequence

from agent.engine.sinks.base import Message


class Queue:
    """The lane puts, the sink's thread takes; what does not fit is lost from the old end, and counted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.lost = 0
        self.put_any = threading.Event()
        self._lock = threading.Lock()
        self._waiting: deque[Message] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, messages: Sequence[Message]) -> None:
        """Add messages; never waits for the sink."""
        with self._lock:
            self._waiting.extend(messages)
            while len(self._waiting) > self.limit:
                self._waiting.popleft()
                self.lost += 1
        self.put_any.set()

    def lose(self, messages: int) -> None:
        """Count messages that were never made, or that nobody will get."""
        with self._lock:
            self.lost += messages

    def take(self, limit: int) -> list[Message]:
        """Return the oldest, which are now the taker's."""
        self.put_any.clear()
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
