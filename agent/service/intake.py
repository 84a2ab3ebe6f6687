"""The loop's side of the engine: its greeting, its lanes, its products, and what it is told to run."""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Final

from msgspec import Struct

from agent.core import health, slots
from agent.core.blame import SOON_S, Suspect
from agent.core.memory import Scales
from agent.engine import memory
from agent.ports import Configure, Fitted, Hello, LaneState, ModelSpec, Product, ServeState, Stored
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
WEIGH_S: Final = 1.0
RETIRE_S: Final = 10.0
"""An engine that was asked to end is killed after this."""
MINE: Final = 0.5
"""Who came when the engine held more than this share of what it holds now is not why it does."""


class Loss(Struct, frozen=True):
    """How an engine was when it was heard last."""

    suspects: frozenset[Suspect]
    code: str
    detail: str
    """Empty where only the engine's end can tell."""
    soon: bool
    """It had not lived long."""


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
        self._configured_at = 0.0
        self._hanging: frozenset[Suspect] = frozenset()
        """Sessions for whose silence the engine is being killed."""
        self._scales = Scales(engine.memory_bytes)
        self._weighed_at = 0.0
        self._weights: dict[Suspect, int] = {}
        """What the engine held when each session was first asked for."""
        self._outgrown = ""
        self._outgrown_at = 0.0
        self._lost: Loss | None = None
        """What was at work when the connection ended; counts if the engine turns out to be dead."""
        self._products: list[Product] = []
        self._store_at = 0.0
        self._stored = 0
        """Number of the last product of this engine that is in the outbox."""
        self._lost_before = 0
        """Products of engines before it that could not be stored."""
        self.starts = 0
        """Engine processes that began under this supervisor."""

    @property
    def ended(self) -> bool:
        """Whether the connection is gone."""
        return self._connection == 0

    def started(self, ended: str = "") -> None:
        """Note that a new engine process begins: one that was heard before has died. Raises ``storage.*``.

        ``ended`` says how.
        """
        self.starts += 1
        self._fresh = True
        self._hello = None
        lost, self._lost = self._lost, None
        if lost is not None:
            detail = lost.detail or f"the engine {ended or 'died'} while the version was in service"
            self._world.engine_died(lost.suspects, health.crashed(detail, lost.code), soon=lost.soon)

    def lost(self, event: events.EngineLost) -> None:
        """Note that the engine cannot be heard, and what was at work in it; it may go on all the same."""
        if event.connection != self._connection:
            return
        code, detail = "trial.crashed", ""
        said = [*self._world.lanes.values(), *(self._world.serve.models if self._world.serve else ())]
        suspects = _at_work(_models(self._configured), said)
        if self._hanging:
            detail, suspects = f"its threads said nothing for {health.SILENT_S:.0f} s", self._hanging
        elif self._outgrown:
            code, detail = "trial.over_memory", f"the engine was ended: {self._outgrown}"
            suspects = self._heavy(suspects)
        age_s = 0.0 if self._hello is None else self._now() - self._hello.started_mono_us / 1e6
        # A leak takes its time: how long an engine lived says nothing of it.
        self._lost = Loss(suspects, code, detail, soon=bool(self._outgrown) or age_s < SOON_S)
        self._weights, self._outgrown = {}, ""
        self._scales.forget()
        self._connection, self._configured, self._hanging = 0, None, frozenset()
        self._world.forget_lanes()

    def weigh(self) -> None:
        """End an engine that holds more memory than it may: in good order, since all else of it works."""
        now, pid = self._now(), self._engine.pid
        if self._connection == 0 or pid is None or now - self._weighed_at < WEIGH_S:
            return
        self._weighed_at = now
        if self._outgrown:
            if now - self._outgrown_at > RETIRE_S:
                self._engine.kill()
            return
        self._outgrown = self._scales.outgrown(memory.held(pid), now)
        if self._outgrown:
            self._outgrown_at = now
            log.error("engine.outgrown", extra={"facts": {"pid": pid, "detail": self._outgrown}})
            self._engine.retire()

    def _heavy(self, suspects: frozenset[Suspect]) -> frozenset[Suspect]:
        """Return those since whose coming the engine has grown most; all, where that is none."""
        light = self._scales.held * MINE
        return frozenset(s for s in suspects if self._weights.get(s, 0) <= light) or suspects

    def watch(self) -> None:
        """Kill an engine of which a lane, or serving, hangs: its thread is stuck in a model."""
        if self._engine.paused:
            self._world.heard = dict.fromkeys(self._world.heard, self._now())
            self._world.serve_heard = self._now()
        if self._connection == 0 or self._configured is None or self._engine.paused or self._outgrown:
            self._configured_at = self._now()
            return
        since = self._now() - health.SILENT_S
        silent = [
            spec
            for spec in self._configured.lanes
            if max(self._world.heard.get(spec.lane, 0.0), self._configured_at) < since
        ]
        serve = self._configured.serve
        if serve is not None and max(self._world.serve_heard, self._configured_at) >= since:
            serve = None
        if self._hanging or not (silent or serve):
            return
        hanging = {_serving(self._world.lanes.get(spec.lane)) or _suspect(spec) for spec in silent}
        if serve is not None:
            hanging |= {_serving(self._world.served(m.model_name)) or _suspect(m) for m in serve.models}
        self._hanging = frozenset(hanging)
        facts = {"lanes": [spec.lane for spec in silent], "serving": serve is not None}
        log.error("engine.lane_hangs", extra={"facts": facts})
        self._engine.kill()

    def said(self, event: events.EngineSaid) -> None:
        """Take one message. Raises ``storage.*``; the engine repeats what matters."""
        message = event.message
        if isinstance(message, Hello):
            self._greeted(event.connection, message)
        elif event.connection != self._connection:
            return
        elif isinstance(message, LaneState):
            self._world.lane_said(message, self._now())
        elif isinstance(message, ServeState):
            self._world.serve_said(message, self._now())
        elif isinstance(message, Fitted):
            self._world.fitted(message.lane, message.digest, message.fit)
        else:
            self._products.append(message)

    def store(self) -> None:
        """Append what the engine made, in one transaction; then it may forget. Raises ``storage.*``."""
        if not self._products or self._now() < self._store_at:
            return
        last = self._products[-1].n
        known = max(self._stored, self._outbox.marked(self._source))
        fresh = [p for p in self._products if p.n > known]
        # Numbers have no holes but where the engine, or the loss of its connection, gave products up.
        lost = self._lost_before + (last - known - len(fresh) if fresh else 0)
        try:
            if fresh:
                self._outbox.append(
                    [_entry(p) for p in fresh],
                    (self._source, last),
                    {PriorityClass.ANOMALY: lost} if lost else {},
                )
        except PitheadError:
            self._store_at = self._now() + STORE_AGAIN_S
            self._engine.pause(on=len(self._products) > MOST_UNSTORED)
            raise
        self._products.clear()
        self._stored, self._lost_before = last, 0
        self._engine.pause(on=False)
        self._engine.send(Stored(last))

    def configure(self) -> None:
        """Tell the engine what to run, when that has changed or the engine is new."""
        if self._connection == 0:
            return
        world = self._world
        wanted = Configure(world.lane_specs(), world.reporting.bucket_s, world.serve_spec())
        self._engine.lanes = len(wanted.lanes) + (wanted.serve is not None)
        if wanted == self._configured:
            return
        if self._fresh and _models(wanted):
            self._count_start(wanted)
        if self._engine.send(wanted):
            self._configured, self._configured_at = wanted, self._now()
            asked = set(map(_suspect, _models(wanted)))
            self._weights = {s: self._weights.get(s, self._scales.held) for s in asked}

    def _greeted(self, connection: int, hello: Hello) -> None:
        before = self._hello
        if before is not None and (before.pid, before.started_mono_us) != (hello.pid, hello.started_mono_us):
            self.started()
        self._lost = None
        source = f"{self._world.machine.boot_id}/{hello.pid}/{hello.started_mono_us}"
        if source != self._source:
            self._last_of_the_old()
            self._stored = 0
        self._store_at = 0.0
        self._products.clear()  # what was not stored is repeated
        self._hello, self._connection, self._configured = hello, connection, None
        self._source = source
        self._world.forget_lanes()
        self._outbox.forget_marks(self._source)
        log.info("engine.connected", extra={"facts": {"pid": hello.pid, "runtimes": hello.runtimes}})

    def _last_of_the_old(self) -> None:
        """Store what a dead engine had said; a full disk shall not keep the new one from its work."""
        self._store_at = 0.0
        try:
            self.store()
        except PitheadError as error:
            self._lost_before += len(self._products)
            facts = {"products": len(self._products), "code": error.code}
            log.error("products.lost", extra={"facts": facts})  # noqa: TRY400 - the code says it all

    def _count_start(self, wanted: Configure) -> None:
        """Count a new engine, durably, before it is given versions on trial that may end it."""
        given = set(map(_suspect, _models(wanted)))
        for found in self._world.slots.all().values():
            trial = found.trial
            if trial and Suspect(found.model_name, trial.digest, trial.activation) in given:
                self._world.slots.save(slots.again(found))
        self._fresh = False


def _models(configured: Configure | None) -> tuple[ModelSpec, ...]:
    """Return every session that was asked for."""
    if configured is None:
        return ()
    return (*configured.lanes, *(configured.serve.models if configured.serve is not None else ()))


def _suspect(spec: ModelSpec) -> Suspect:
    return Suspect(spec.model_name, spec.digest, spec.activation)


def _serving(state: LaneState | None) -> Suspect | None:
    if state is None or state.digest is None:
        return None
    return Suspect(state.model_name, state.digest, state.activation)


def _at_work(configured: Collection[ModelSpec], lanes: Iterable[LaneState]) -> frozenset[Suspect]:
    """Return the sessions that were asked for and that were seen in service or loading.

    One of which nothing was seen yet, while others spoke, is none of them: its
    trial loses a start by the next engine, and no more. An engine that died
    before any of its lanes spoke may have died of each.
    """
    asked, said = frozenset(map(_suspect, configured)), tuple(lanes)
    if not said:
        return asked
    seen = set()
    for state in said:
        seen.add(_serving(state))
        if state.wanted_digest is not None and state.state != "failed":
            seen.add(Suspect(state.model_name, state.wanted_digest, state.wanted_activation))
    return asked & seen


def _entry(product: Product) -> Entry:
    priority = PriorityClass.ANOMALY if isinstance(product.body, Anomaly) else PriorityClass.SUMMARY
    return Entry(priority, product.t_wall, product.t_mono, product.body)
