"""A thread for each sink: opens it, tries again when it is away, and never keeps its lane waiting."""

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from agent.core import backoff
from agent.engine.clock import Clock
from agent.engine.sinks import Plan
from agent.engine.sinks.base import Control, ControlSink, Delivery, Message, MessageSink, Outputs, Way, failed
from agent.engine.sinks.bypass import is_on
from agent.engine.sinks.queue import Queue
from agent.ports import SinkState
from contract.errors import PitheadError

log = logging.getLogger(__name__)

AT_ONCE: Final = 100
FIRST_RETRY_S: Final = 0.25
LAST_RETRY_S: Final = 15.0
LOOK_S: Final = 0.2
"""How often a control looks for the bypass when nothing else happens."""
IDLE_S: Final = 0.5
LAST_TRIES_S: Final = 0.1
HANGS_US: Final = 30_000_000
"""A sink that has not come back from a call for so long is said to have failed."""
FLUSH_S: Final = 1.0
"""What waits may still be sent for so long when the lane ends."""
HANDOVER_S: Final = 5.0
"""So long a sink waits for the end of the one whose place it takes."""
EVENTS: Final = {"working": "sink.works", "failed": "sink.failed", "bypassed": "sink.bypassed"}
HEARTBEATS: Final = 32_768


class Worker(ABC):
    """What both families share. ``stop`` may come from any thread, and returns at once."""

    def __init__(self, lane: str, plan: Plan, clock: Clock, before: Sequence["Worker"] = ()) -> None:
        """``before`` are workers that are ending; this one opens its sink after them."""
        self.name = plan.name
        self._lane, self._plan, self._clock, self._before = lane, plan, clock, tuple(before)
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._failures = 0
        self._retry_at = 0
        self._state = SinkState(name=plan.name, kind=str(plan.table.get("kind", "")), state="starting")
        self._sent = 0
        self._busy_since: int | None = None
        """When the sink was last called, while it has not come back."""
        self._thread = threading.Thread(target=self._run, name=f"sink-{lane}-{plan.name}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; ``join`` waits for it."""
        self._stopping.set()
        self._wake.set()

    def join(self, timeout_s: float) -> bool:
        """Return whether it has ended."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, timeout_s))
        return not self._thread.is_alive()

    def state(self) -> SinkState:
        """Return how it is; one that hangs has failed, whatever it was before."""
        now, since = self._state, self._busy_since
        if since is None or (hangs := self._clock.mono() - since) < HANGS_US:
            return now
        return SinkState(
            now.name, now.kind, "failed", code="sink.failed", detail=f"no answer for {hangs / 1e6:.0f} s"
        )

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = self._clock.mono()
        try:
            yield
        finally:
            self._busy_since = None

    @abstractmethod
    def _work(self) -> None:
        """Runs on the own thread until ``stop``."""

    def _run(self) -> None:
        for worker in self._before:
            worker.join(HANDOVER_S)
        try:
            self._work()
        except Exception as error:
            # Whatever ends this thread ends the sink: said here, since nobody else sees it.
            log.exception("sink.broke", extra={"facts": self._facts()})
            self._say("failed", PitheadError("internal.error", f"{type(error).__name__}: {error}"))

    def _open(self) -> Way:
        return self._plan.open(self._plan.table)

    def _tried(self, error: BaseException) -> None:
        """Note a failure, and when to try again."""
        known = isinstance(error, PitheadError | OSError)
        if not known:
            log.error("sink.unexpected", extra={"facts": self._facts()}, exc_info=error)
        problem = error if isinstance(error, PitheadError) else failed(self.name, error)
        self._failures += 1
        pause = backoff.delay(self._failures, random.random(), base_s=FIRST_RETRY_S, cap_s=LAST_RETRY_S)  # noqa: S311 - spreads tries, hides nothing
        self._retry_at = self._clock.mono() + round(pause * 1e6)
        self._say("failed", problem)

    def _works(self) -> None:
        self._failures = 0
        self._say("working", None)

    def _say(self, state: str, problem: PitheadError | None) -> None:
        code, detail = (None, "") if problem is None else (problem.code, problem.detail[:500])
        before = self._state
        if (before.state, before.code) != (state, code):
            level = logging.WARNING if state in {"failed", "bypassed"} else logging.INFO
            log.log(level, EVENTS[state], extra={"facts": self._facts() | {"code": code, "detail": detail}})
        self._state = SinkState(self.name, before.kind, state, code=code, detail=detail)  # type: ignore[arg-type]

    def _facts(self) -> dict[str, object]:
        return {"lane": self._lane, "sink": self.name}

    def _until_retry_s(self) -> float:
        return max(0.0, (self._retry_at - self._clock.mono()) / 1e6)


class MessageWorker(Worker):
    """Sends messages in order; each arrives once at least, or is counted as lost."""

    def __init__(self, lane: str, plan: Plan, clock: Clock, before: Sequence[Worker] = ()) -> None:
        super().__init__(lane, plan, clock, before)
        assert isinstance(plan.keys, Delivery)
        self.keys = plan.keys
        self.queue = Queue(plan.keys.queue)
        self._held: list[Message] = []
        """Taken from the queue, and not sent yet."""
        self._sink: MessageSink | None = None
        self._said_lost = 0

    def stop(self) -> None:
        """See ``Worker``."""
        super().stop()
        self.queue.put_any.set()

    def state(self) -> SinkState:
        """See ``Worker``."""
        now, waiting = super().state(), len(self.queue) + len(self._held)
        return SinkState(
            now.name, now.kind, now.state, self._sent, self.queue.lost, waiting, now.code, now.detail
        )

    def _work(self) -> None:
        until: int | None = None
        while True:
            if self._stopping.is_set():
                until = until or self._clock.mono() + round(FLUSH_S * 1e6)
                if self._clock.mono() >= until or not (self._held or len(self.queue)):
                    break
            self._turn()
        self._give_up()

    def _turn(self) -> None:
        self._held = self._held or self.queue.take(AT_ONCE)
        if self._held:
            pause = self._until_retry_s()
            if pause:
                self._pause(pause)
            else:
                self._try()
            return
        # A sink is opened before it is needed, so that the status says whether it could be.
        if self._sink is None and not self._until_retry_s():
            self._try()
        self.queue.put_any.wait(IDLE_S)

    def _pause(self, seconds: float) -> None:
        if self._stopping.is_set():
            self._retry_at = min(self._retry_at, self._clock.mono() + round(LAST_TRIES_S * 1e6))
            time.sleep(min(seconds, LAST_TRIES_S))
        else:
            self._stopping.wait(seconds)

    def _try(self) -> None:
        """Open the sink if need be, and send what it takes at once of what is held."""
        messages: Sequence[Message] = ()
        try:
            with self._busy():
                if self._sink is None:
                    self._sink = self._open()  # type: ignore[assignment]
                messages = self._held[: getattr(self._sink, "at_once", AT_ONCE)]
                refused = self._sent_now(messages) if messages else 0
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a third party's; _tried says what
            self._close()
            self._tried(error)
            return
        self._held = self._held[len(messages) :]
        self._sent += len(messages) - refused
        self.queue.lose(refused)
        self._works()
        self._log_losses()

    def _sent_now(self, messages: Sequence[Message]) -> int:
        refused = self._sink.send(messages)  # type: ignore[union-attr]
        if not isinstance(refused, int) or not 0 <= refused <= len(messages):
            raise failed(self.name, f"send() returned {refused!r}, not how many messages were refused")
        return refused

    def _log_losses(self) -> None:
        if (lost := self.queue.lost) > self._said_lost:
            facts = self._facts() | {"lost": lost - self._said_lost, "total": lost}
            log.warning("sink.messages_lost", extra={"facts": facts})
            self._said_lost = lost

    def _close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            _closed(sink)

    def _give_up(self) -> None:
        self._close()
        self.queue.lose(len(self._held) + len(self.queue))
        self._held = []
        self.queue.take(self.queue.limit)
        self._log_losses()


class ControlWorker(Worker):
    """Keeps a control at what the lane judges now; only the newest counts."""

    def __init__(
        self, lane: str, plan: Plan, clock: Clock, bypass: str, before: Sequence[Worker] = ()
    ) -> None:
        super().__init__(lane, plan, clock, before)
        assert isinstance(plan.keys, Control)
        self.keys = plan.keys
        self._bypass = bypass
        self._judged: tuple[int, float] | None = None
        """When the lane last judged a window, by the monotonic clock, and its score."""
        self._alarm_at: int | None = None
        """When it last was an alarm."""
        self._written: Outputs | None = None
        self._due = 0
        self._beat = 0
        self._sink: ControlSink | None = None

    # ---- from the lane's thread

    def judged(self, score: float, *, alarm: bool) -> None:
        """Take the lane's newest judgement; ``alarm`` if any window of it was one."""
        now = self._clock.mono()
        if alarm:
            self._alarm_at = now
        first, self._judged = self._judged is None, (now, score)
        written = self._written
        if first or (alarm and (written is None or written.alarm != self.keys.on)):
            self._wake.set()

    def distrust(self) -> None:
        """The lane has failed: nothing that it said before counts."""
        if self._judged is not None:
            self._judged = self._alarm_at = None
            self._wake.set()

    def state(self) -> SinkState:
        """See ``Worker``."""
        now = super().state()
        return SinkState(now.name, now.kind, now.state, self._sent, 0, 0, now.code, now.detail)

    # ---- own thread

    def outputs(self, now: int) -> Outputs:
        """Return what the control shall hold at ``now``, microseconds of the monotonic clock."""
        judged, alarm_at = self._judged, self._alarm_at
        if self._stopping.is_set() or judged is None or now - judged[0] > self.keys.max_age_s * 1e6:
            return Outputs(self.keys.safe, None, quality=False, heartbeat=self._beat, may_write=self._may)
        # What came in the very last batch counts even where an alarm is not held at all.
        on = alarm_at is not None and (alarm_at >= judged[0] or now - alarm_at < self.keys.hold_s * 1e6)
        alarm = self.keys.on if on else self.keys.off
        return Outputs(alarm, judged[1], quality=True, heartbeat=self._beat, may_write=self._may)

    def _may(self) -> bool:
        return not is_on(self._bypass)

    def _work(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            self._turn()
            now = self._clock.mono()
            wait = max(self._due - now, self._retry_at - now if self._failures else 0) / 1e6
            self._wake.wait(min(LOOK_S, max(0.005, wait)))
        self._leave()
        self._close()

    def _leave(self) -> None:
        """Leave the safe value; a connection that went while nothing was written is made again for it."""
        until, tries = self._clock.mono() + round(FLUSH_S * 1e6), 0
        while not self._turn(last=True):
            tries += 1
            if self._clock.mono() > until and tries > 1:
                facts = self._facts() | {"detail": self._state.detail}
                log.error("sink.not_left_safe", extra={"facts": facts})
                return
            time.sleep(LAST_TRIES_S)

    def _turn(self, *, last: bool = False) -> bool:
        """Write if that is due; return whether nothing is left to be done for now."""
        if is_on(self._bypass):
            self._close()
            self._written, self._due = None, 0
            self._say("bypassed", None)
            return True
        now = self._clock.mono()
        wanted, written = self.outputs(now), self._written
        new = written is None or (wanted.alarm, wanted.quality) != (written.alarm, written.quality)
        if not last and ((now < self._due and not new) or (self._failures and now < self._retry_at)):
            return True
        try:
            with self._busy():
                self._written_now(wanted)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a third party's; _tried says what
            self._close()
            self._written = None
            if self._may():  # else the next turn says why
                self._tried(error)
            return False
        self._written, self._due = wanted, now + round(self.keys.refresh_s * 1e6)
        self._beat = (self._beat + 1) % HEARTBEATS
        self._sent += 1
        self._works()
        if last:
            log.info("sink.left_safe", extra={"facts": self._facts() | {"alarm": wanted.alarm}})
        return True

    def _written_now(self, wanted: Outputs) -> None:
        if self._sink is None:
            self._sink = self._open()  # type: ignore[assignment]
            if (accepts := getattr(self._sink, "accepts", None)) is not None:
                accepts({name: getattr(self.keys, name) for name in ("on", "off", "safe")})
        if not self._may():  # opening takes its time
            raise failed(self.name, "the bypass was switched on")
        self._sink.write(wanted)  # type: ignore[union-attr]

    def _close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            _closed(sink)


def _closed(sink: Way) -> None:
    try:
        sink.close()
    except Exception as error:  # noqa: BLE001 - what is let go anyway may complain, but not stop anything
        log.warning("sink.not_closed", extra={"facts": {"detail": str(error)}})


def worker(lane: str, plan: Plan, clock: Clock, bypass: str, before: Sequence[Worker]) -> Worker:
    """Return the thread for ``plan``, not started."""
    if isinstance(plan.keys, Control):
        return ControlWorker(lane, plan, clock, bypass, before)
    return MessageWorker(lane, plan, clock, before)
