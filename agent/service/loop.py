"""The supervisor's loop: observe -> next step -> execute -> report."""

import contextlib
import logging
import queue
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Final

from msgspec import Struct

from agent.core import plan
from agent.core.layout import Layout
from agent.link import mqtt
from agent.link.mqtt import MqttLink
from agent.service import events
from agent.service.children import Children
from agent.service.engine_process import EngineKeeper
from agent.service.events import Event, Post
from agent.service.intake import Intake
from agent.service.reporting import Clock, Reporter
from agent.service.snapshot import Snapshot, write_snapshot
from agent.service.steps import Steps
from agent.service.updates import Poller
from agent.service.uplink import Uplink
from agent.service.world import World
from agent.store.outbox import Outbox
from contract.errors import PitheadError
from contract.messages import Ack, DesiredHint, Name

log = logging.getLogger(__name__)
TICK_S: Final = 0.5
QUIET_S: Final = 0.05
"""Events that come close together are dealt with in one turn."""
QUIET: Final = (mqtt.Published, Ack)
"""Events that change nothing for the planner."""
MOST_EVENTS: Final = 2000
COLLECT_S: Final = 60.0
SNAPSHOT_S: Final = 1.0
NEWS_S: Final = 2.0
"""Health that says of something new is sent before its time, but not more often than this."""
REFUSED_AGAIN_S: Final = 60.0
"""After this a bundle that was refused is judged once more."""
ROUNDS: Final = 4
"""Steps of one model in one turn, since one durable step often leads to the next."""
LEAVE_S: Final = 8.0
FAILED_S: Final = 1.0


class Stop(Struct, frozen=True):
    """How to come to an end: with the engine, or leaving it in service alone."""

    keep_engine: bool = False


class Parts(Struct, frozen=True):
    """What the loop works with; ``wiring`` makes it."""

    layout: Layout
    clock: Clock
    fraction: Callable[[], float]
    """A random number in [0, 1)."""
    world: World
    outbox: Outbox
    engine: EngineKeeper
    children: Children
    poller: Poller
    link: MqttLink


class Supervisor:
    """One thread; its helpers post events into its queue."""

    def __init__(self, parts: Parts, box: "queue.Queue[Event]") -> None:
        self._parts = parts
        self._box = box
        self._world = parts.world
        self._now = parts.clock.seconds
        self._reporter = Reporter(parts.world, parts.outbox, parts.clock)
        self._steps = Steps(
            parts.world,
            parts.children,
            self._reporter,
            now=self._now,
            wall=parts.clock.wall,
            renew=self._renew_metadata,
            fraction=parts.fraction,
        )
        self._intake = Intake(parts.world, parts.outbox, parts.engine, self._now)
        self._uplink = Uplink(parts.outbox, parts.link, self._now)
        self._observed: dict[Name, plan.Observed] = {}
        self._idle = False
        self._plan_at = 0.0
        self._health_at = 0.0
        self._news_at = 0.0
        self._snapshot_at = 0.0
        self._collect_at = 0.0
        self._collect = True
        self._refused_at: float | None = None
        self._connected_at: float | None = None
        self._link_error = ""
        self._clock_offset_s: float | None = None
        self._poll_error: PitheadError | None = None
        self._complaints: dict[str, str] = {}
        self._stop: Stop | None = None

    def stop(self, *, keep_engine: bool = False) -> None:
        """Come to an end soon. Safe in a signal handler and in any thread."""
        self._stop = Stop(keep_engine)

    def run(self) -> None:
        """Work until ``stop``, then end the helpers."""
        parts = self._parts
        parts.engine.start()
        parts.link.start()
        parts.poller.start()
        log.info("supervisor.started", extra={"facts": {"device": self._world.machine.device}})
        while self._stop is None:
            try:
                self._turn()
            except Exception:  # whatever it is, the device goes on serving and reporting
                log.exception("supervisor.failed")
                time.sleep(FAILED_S)
        self._leave(self._stop)

    def _turn(self) -> None:
        for event in self._drain(TICK_S):
            self._try("events", self._handle, event)
            self._idle = self._idle and isinstance(event, QUIET)
        self._try("products", self._intake.store)
        if not self._idle or self._now() >= self._plan_at:
            self._idle, self._plan_at = True, self._now() + TICK_S
            self._try("plan", self._plan)
        self._try("health", self._send_health)
        self._try("collect", self._collect_garbage)
        self._try("uplink", self._uplink.pump)
        self._try("snapshot", self._snapshot)

    def _drain(self, timeout_s: float) -> list[Event]:
        found: list[Event] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._box.get(timeout=timeout_s))
            time.sleep(QUIET_S)
            while len(found) < MOST_EVENTS:
                found.append(self._box.get_nowait())
        return found

    def _try(self, where: str, act: Callable[..., object], *arguments: object) -> bool:
        """Act; an error is logged when it is new. What failed is tried again at the next turn.

        Whatever it is, the rest of the turn goes on: one broken part must
        keep neither a rollback nor a report from happening.
        """
        try:
            act(*arguments)
        except PitheadError as error:
            if self._complaints.get(where) != error.code:
                self._complaints[where] = error.code
                facts = {"in": where, "code": error.code, "detail": error.detail}
                log.error("supervisor.hindered", extra={"facts": facts})  # noqa: TRY400 - the code says it all
            return False
        except Exception as error:
            kind = type(error).__name__
            if self._complaints.get(where) != kind:
                self._complaints[where] = kind
                log.exception("supervisor.failed", extra={"facts": {"in": where}})
            return False
        if self._complaints.pop(where, None) is not None:
            log.info("supervisor.recovered", extra={"facts": {"in": where}})
        return True

    # --- events

    def _handle(self, event: Event) -> None:
        match event:
            case events.EngineSaid():
                self._intake.said(event)
            case events.EngineStarted():
                self._intake.started(event.ended)
            case events.EngineLost():
                self._intake.lost(event)
            case events.Fetched():
                self._parts.children.finished(event.step)
                self._steps.fetched(event)
            case events.Probed():
                self._parts.children.finished(event.step)
                self._steps.probed(event)
            case events.BundlePolled() | events.PollFailed() | events.Refreshed():
                self._handle_update(event)
            case _:
                self._handle_link(event)

    def _handle_update(self, event: events.BundlePolled | events.PollFailed | events.Refreshed) -> None:
        match event:
            case events.BundlePolled():
                self._poll_went(None)
                self._polled(event)
            case events.PollFailed():
                self._poll_went(event.error)
            case events.Refreshed():
                self._refreshed(event)

    def _handle_link(self, event: mqtt.LinkEvent) -> None:
        match event:
            case Ack():
                self._uplink.acknowledged(event)
            case DesiredHint():
                self._hinted(event)
            case mqtt.Connected():
                self._connected_at, self._link_error = self._now(), ""
            case mqtt.Disconnected():
                self._connected_at, self._link_error = None, event.detail
            case mqtt.Published():
                pass

    def _polled(self, event: events.BundlePolled) -> None:
        if event.date is not None:
            with contextlib.suppress(ValueError, TypeError):
                server = parsedate_to_datetime(event.date).timestamp()
                self._clock_offset_s = round(self._parts.clock.wall() / 1e6 - server, 1)
        if event.body is None or self._parts.children.refreshing:
            return
        bundle = self._parts.layout.bundle
        try:
            temporary = bundle.with_suffix(".new")
            temporary.write_bytes(event.body)
            temporary.rename(bundle)
        except OSError as error:
            raise PitheadError("storage.failed", f"writing {bundle}: {error.strerror}") from error
        self._parts.children.refresh(event.etag)

    def _poll_went(self, error: PitheadError | None) -> None:
        before, self._poll_error = self._poll_error, error
        if error is not None and (before is None or before.code != error.code):
            log.warning("poll.failed", extra={"facts": {"code": error.code, "detail": error.detail}})
        if error is None and before is not None:
            log.info("poll.recovered")

    def _refreshed(self, event: events.Refreshed) -> None:
        result = event.result
        if not isinstance(result, PitheadError) and result.device != self._world.machine.device:
            result = PitheadError("update.wrong_device", f"the assignment is for {result.device}")
        if isinstance(result, PitheadError):
            self._reporter.update_error, self._refused_at = result, self._now()
            self._parts.poller.judged(event.etag)
            log.error("bundle.refused", extra={"facts": {"code": result.code, "detail": result.detail}})
            return
        self._world.take(result, event.etag)
        self._reporter.update_error, self._refused_at = None, None
        self._parts.poller.judged(event.etag)
        self._collect, self._snapshot_at = True, 0.0
        facts = {"revision": result.revision, "models": len(result.models)}
        log.info("desired.taken", extra={"facts": facts})

    def _renew_metadata(self) -> None:
        self._parts.poller.judged(None)
        self._parts.poller.hint()

    def _hinted(self, hint: DesiredHint) -> None:
        poller = self._parts.poller
        known = (poller.etag or "").removeprefix("W/").strip('"')
        if hint.device == self._world.machine.device and hint.sha256 != known:
            poller.hint()

    # --- each turn

    def _plan(self) -> None:
        world, children = self._world, self._parts.children
        if self._refused_at is not None and self._now() - self._refused_at > REFUSED_AGAIN_S:
            self._refused_at = None
            self._parts.poller.judged(None)
        for _ in range(ROUNDS):
            self._observed = world.observe(self._now())
            self._reporter.receipts(self._observed, children.running)
            steps = plan.plan(world.desired, self._observed, self._now())
            self._cancel(steps)
            changed = [self._execute(name, step) for name, step in steps.items()]
            if not any(changed):
                # A task that has just begun may end before the next turn.
                self._reporter.receipts(self._observed, children.running)
                break
            self._collect, self._snapshot_at = True, 0.0
        self._intake.watch()
        self._intake.weigh()
        self._intake.configure()
        self._reporter.reported(self._observed)

    def _execute(self, name: Name, step: plan.Step) -> bool:
        """Carry out a step; return whether another may follow at once."""
        if isinstance(step, plan.TASKS):
            if self._parts.children.running(name) is None:
                self._try(f"step of {name}", self._steps.execute, name, step)
            return False
        return self._try(f"step of {name}", self._steps.execute, name, step)

    def _cancel(self, steps: dict[Name, plan.Step]) -> None:
        """Stop tasks that nobody wants, or that stand in the way of a more urgent one."""
        for name in self._observed:
            task = self._parts.children.running(name)
            if task is None:
                continue
            step = steps.get(name)
            urgent = (
                isinstance(step, plan.TASKS) and step.wanted.manifest_sha256 != task.wanted.manifest_sha256
            )
            if urgent or not self._world.wants(task.wanted):
                self._steps.cancel(name)

    def _send_health(self) -> None:
        now = self._now()
        if now < self._health_at and (now < self._news_at or not self._reporter.has_news()):
            return
        self._health_at, self._news_at = now + self._world.reporting.health_s, now + NEWS_S
        self._reporter.health(
            engine_pid=self._parts.engine.pid,
            engine_restarts=max(0, self._intake.starts - 1),
            connected_s=None if self._connected_at is None else round(now - self._connected_at, 3),
            clock_offset_s=self._clock_offset_s,
        )

    def _collect_garbage(self) -> None:
        now = self._now()
        if not self._collect or now < self._collect_at or self._parts.children.fetching:
            return
        self._collect, self._collect_at = False, now + COLLECT_S
        self._world.forget()
        removed = self._world.objects.collect(self._world.needed_objects())
        if removed:
            log.info("objects.collected", extra={"facts": {"removed": removed}})

    def _snapshot(self) -> None:
        now, failed = self._now(), self._poll_error
        if now < self._snapshot_at:
            return
        self._snapshot_at = now + SNAPSHOT_S
        write_snapshot(
            self._parts.layout.status,
            Snapshot(
                t=self._parts.clock.wall(),
                reported=self._reporter.document(self._observed),
                lanes=tuple(self._world.lanes.values()),
                engine_pid=self._parts.engine.pid,
                broker="connected" if self._connected_at is not None else self._link_error or "connecting",
                server="ok" if failed is None else f"{failed.code}: {failed.detail}",
                outbox=self._parts.outbox.health(),
                desired=self._world.desired,
                serve=self._world.serve,
            ),
        )

    def _leave(self, stop: Stop) -> None:
        """End the helpers; the engine's last products are stored first."""
        parts = self._parts
        parts.poller.stop()
        for name in self._world.slots.all().keys() | self._observed.keys():
            self._try("events", self._steps.cancel, name)
        parts.children.stop()
        parts.engine.leave(keep_engine=stop.keep_engine)
        until = time.monotonic() + LEAVE_S
        while not stop.keep_engine and not self._intake.ended and time.monotonic() < until:
            for event in self._drain(0.1):
                self._try("events", self._handle, event)
            self._try("products", self._intake.store)
        parts.engine.join()
        parts.link.stop()
        parts.outbox.close()
        self._world.state.close()
        log.info("supervisor.stopped")


def inbox() -> tuple["queue.Queue[Event]", Post]:
    """Return the loop's queue and what puts events into it; a full queue makes the helpers wait."""
    box: queue.Queue[Event] = queue.Queue(maxsize=4 * MOST_EVENTS)
    return box, box.put
