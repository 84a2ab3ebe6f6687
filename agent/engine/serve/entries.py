"""A model and its versions, as they are known: in memory or not, and who waits for them.

All belongs to the loop's thread.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from agent.engine.serve.repository import Candidate, newest
from agent.engine.serve.requests import InferRequest
from agent.engine.serve.routing import Done
from agent.engine.serve.runner import Policy
from agent.engine.serve.served import Live
from agent.engine.serve.statistics import Statistics
from contract.errors import PitheadError

MAX_WAITING: Final = 256
"""Requests that may wait for an idle model to load."""


class State(StrEnum):
    """Of a version."""

    LOADING = "LOADING"
    READY = "READY"
    IDLE = "IDLE"
    """Not in memory; its next request loads it."""
    UNAVAILABLE = "UNAVAILABLE"


class Version:
    """One version; it stays when its session goes."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.state = State.IDLE
        self.reason = ""
        self.live: Live | None = None
        self.statistics = Statistics()
        self.waiting: deque[tuple[InferRequest, Done, int]] = deque()
        """Requests that wait for it to load, and until when, in ns of the monotonic clock."""
        self.policy: Policy | None = None
        """Set by the configuration of a load request."""
        self.loading: asyncio.Task[PitheadError | None] | None = None
        self.tried = ""
        """The identity of what is, or was, being loaded."""

    @property
    def ready(self) -> bool:
        """Whether a request would be answered."""
        return self.live is not None or self.state is State.IDLE

    # ---- who waits for it

    def wait(self, request: InferRequest, done: Done, timeout_s: float) -> None:
        """Answer a request when it is loaded; raises ``serve.overloaded``."""
        if len(self.waiting) >= MAX_WAITING:
            self.statistics.refused += 1
            raise PitheadError("serve.overloaded", f"{MAX_WAITING} requests wait for the model to load")
        timeout = request.timeout_us * 1000 if request.timeout_us else round(timeout_s * 1e9)
        self.waiting.append((request, done, time.monotonic_ns() + timeout))

    def begin(self, live: Live) -> None:
        """Hand on to ``live`` all that have waited for it; the rest of their time is theirs."""
        self.tell_late(time.monotonic_ns())
        waiting, self.waiting = self.waiting, deque()
        for request, done, deadline in waiting:
            request.timeout_us = max(1, (deadline - time.monotonic_ns()) // 1000)
            try:
                live.submit(request, done)
            except PitheadError as error:
                done(error)

    def tell_late(self, now: int) -> None:
        """Tell those whose time was over before it was there."""
        if not self.waiting:
            return
        late = [done for _, done, deadline in self.waiting if deadline < now]
        self.waiting = deque(each for each in self.waiting if each[2] >= now)
        for done in late:
            self.statistics.failed(0, "serve.timeout")
            done(PitheadError("serve.timeout", "its model was not loaded in time"))

    def tell(self, error: PitheadError) -> None:
        """Answer all of them with an error."""
        waiting, self.waiting = self.waiting, deque()
        for _, done, _ in waiting:
            done(error)


class Entry:
    """A model: its served versions, and the one that a request without a version gets."""

    def __init__(self, name: str, hidden: str = "") -> None:
        self.name = name
        self.hidden = hidden
        """The version that never answers a request which names none: a shadow."""
        self.versions: dict[str, Version] = {}
        self.unloaded = False
        """By request: its versions are known, but not served."""

    def routes(self) -> Iterator[tuple[tuple[str, str], Live]]:
        """Yield (model, version) and what serves it now; version is empty for the default."""
        if self.unloaded:
            return
        for text, version in self.versions.items():
            if version.live is not None:
                yield (self.name, text), version.live
        default = self.default
        if default is not None and default.live is not None:
            yield (self.name, ""), default.live

    @property
    def default(self) -> Version | None:
        """The newest version that is in memory; else the newest."""
        first = None
        for name in newest([text for text in self.versions if text != self.hidden]):
            version = self.versions[name]
            if version.live is not None:
                return version
            if first is None or (version.ready and not first.ready):
                first = version
        return first
