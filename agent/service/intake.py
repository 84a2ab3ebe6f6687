"""The loop's side of the engine: its greeting, its lanes, its products, and what it is told to run."""

import logging
from collections.abc import Callable
from typing import Final

from agent.core import slots
from agent.ports import Configure, Fitted, Hello, LaneState, Product, Stored
from agent.service import events
from agent.service.engine_process import EngineKeeper
from agent.service.world import World
from agent.store.outbox import Entry, Outbox
from contract.errors import PitheadError
from contract.messages import Anomaly, PriorityClass

log = logging.getLogger(__name__)
MOST_UNSTORED: Final = 5000
"""Products in memory while the disk takes none; beyond, the engine keeps them."""
STORE_AGAIN_S: Final = 1.0


class Intake:
    """Used by the loop alone."""

    def __init__(self, world: World, outbox: Outbox, engine: EngineKeeper, now: Callable[[], float]) -> None:
        self._world = world
        self._outbox = outbox
        self._engine = engine
        self._now = now
        self._hello: Hello | None = None
        self._source = ""
        self._connection = 0
        self._fresh = False
        self._configured: Configure | None = None
        self._products: list[Product] = []
        self._store_at = 0.0
        self.starts = 0
        """Engine processes that began under this supervisor."""

    @property
    def ended(self) -> bool:
        """Whether the connection is gone."""
        return self._connection == 0

    def started(self) -> None:
        """Note that a new engine process begins; if another was in service, it has died."""
        self.starts += 1
        self._fresh = True
        if self._hello is None:
            return
        self._hello = None
        for found in self._world.slots.all().values():
            if found.trial is not None:
                self._world.crashed[found.model_name] = "the engine died while the version was on trial"

    def lost(self, event: events.EngineLost) -> None:
        """Note that the engine cannot be heard; it may go on all the same."""
        if event.connection == self._connection:
            self._connection = 0
            self._world.lanes.clear()
            self._configured = None

    def said(self, event: events.EngineSaid) -> None:
        """Take one message. Raises ``storage.*``; the engine repeats what matters."""
        message = event.message
        if isinstance(message, Hello):
            self._greeted(event.connection, message)
        elif event.connection != self._connection:
            return
        elif isinstance(message, LaneState):
            self._world.lane_said(message)
        elif isinstance(message, Fitted):
            self._world.fitted(message.lane, message.digest, message.fit)
        else:
            self._products.append(message)

    def store(self) -> None:
        """Append what the engine made, in one transaction; then it may forget. Raises ``storage.*``."""
        if not self._products or self._now() < self._store_at:
            return
        last = self._products[-1].n
        known = self._outbox.marked(self._source)
        entries = [_entry(p) for p in self._products if p.n > known]
        try:
            if entries:
                self._outbox.append(entries, (self._source, last))
        except PitheadError:
            self._store_at = self._now() + STORE_AGAIN_S
            self._engine.pause(on=len(self._products) > MOST_UNSTORED)
            raise
        self._products.clear()
        self._engine.pause(on=False)
        self._engine.send(Stored(last))

    def configure(self) -> None:
        """Tell the engine what to run, when that has changed or the engine is new."""
        if self._connection == 0:
            return
        wanted = Configure(self._world.lane_specs(), self._world.reporting.bucket_s)
        self._engine.lanes = len(wanted.lanes)
        if wanted != self._configured and self._engine.send(wanted):
            self._configured = wanted

    def _greeted(self, connection: int, hello: Hello) -> None:
        before = self._hello
        if before is not None and (before.pid, before.started_mono_us) != (hello.pid, hello.started_mono_us):
            self.started()
        self._store_at = 0.0
        self.store()
        self._products.clear()  # what was not stored is repeated
        if self._fresh:
            self._count_start()
        self._hello, self._connection, self._configured = hello, connection, None
        self._source = f"{self._world.machine.boot_id}/{hello.pid}/{hello.started_mono_us}"
        self._world.lanes.clear()
        self._outbox.forget_marks(self._source)
        log.info("engine.connected", extra={"facts": {"pid": hello.pid, "runtimes": hello.runtimes}})

    def _count_start(self) -> None:
        """Count a new engine, durably, before it is given a version on trial that may end it."""
        self._fresh = False
        for found in self._world.slots.all().values():
            if found.trial is not None and found.model_name not in self._world.crashed:
                self._world.slots.save(slots.again(found))


def _entry(product: Product) -> Entry:
    priority = PriorityClass.ANOMALY if isinstance(product.body, Anomaly) else PriorityClass.SUMMARY
    return Entry(priority, product.t_wall, product.t_mono, product.body)
