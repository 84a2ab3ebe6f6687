"""What the device says of itself: receipts, its side of the twin, its health."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Final, Literal

from msgspec import Struct

from agent.core import plan, slots
from agent.core.slots import Installed, Slots
from agent.core.standing import Standing, news, standing
from agent.service import vitals
from agent.service.ailing import Signature, ailing, signature, told
from agent.service.world import World
from agent.store.outbox import Entry, Outbox
from contract.errors import PitheadError
from contract.messages import (
    Ailing,
    AssignmentState,
    Body,
    Bypass,
    ErrorCode,
    Health,
    Micros,
    ModelAssignment,
    Name,
    PriorityClass,
    Receipt,
    RejectedVersion,
    Reported,
    ReportedModel,
    VersionInSlot,
)

log = logging.getLogger(__name__)
TOLD: Final = "told/"
LaneReport = Literal["none", "loading", "calibrating", "running", "failed"]
LANE_ORDER: Final[tuple[LaneReport, ...]] = ("none", "running", "calibrating", "loading", "failed")
Facts = dict[str, str | int | float | bool | None]


class Clock(Struct, frozen=True):
    """Integer microseconds: UTC, and a clock that never goes back."""

    wall: Callable[[], Micros]
    mono: Callable[[], Micros]

    def seconds(self) -> float:
        """Monotonic seconds."""
        return self.mono() / 1e6


class Reporter:
    """Writes what the device says of itself into the outbox. Used by the loop alone."""

    def __init__(self, world: World, outbox: Outbox, clock: Clock) -> None:
        self._world = world
        self._outbox = outbox
        self._clock = clock
        self._told: dict[str, Standing] = world.state.scan(TOLD, Standing)
        self._reported: tuple[str, Reported] | None = None
        """Outbox and document; one that was lost with its outbox is said again."""
        self._started = clock.seconds()
        self.update_error: PitheadError | None = None
        self._owed: list[Entry] = []
        """Receipts of steps that were executed and whose append failed."""
        self._cpu = vitals.CpuMeter()
        self._signed: Signature = (False, frozenset())
        """What the last health said of trouble."""

    def entry(self, priority: PriorityClass, body: Body) -> Entry:
        """Return a record of now."""
        return Entry(priority, self._clock.wall(), self._clock.mono(), body)

    def receipt(self, wanted: ModelAssignment, found: Standing, facts: Facts | None = None) -> None:
        """Say how far the device is with an assignment, whatever it has said before. Raises ``storage.*``."""
        self._owe(_receipt(wanted, found, facts or {}))

    def superseded(self, model_name: Name, trial: slots.Serving, step: plan.Rollback, after: Slots) -> None:
        """Say that a trial was ended because another version is wanted."""
        receipt = Receipt(
            model_name=model_name,
            version=trial.installed.version,
            state=AssignmentState.ROLLED_BACK,
            activation=trial.activation,
            attempt=trial.attempt,
            rollout=trial.rollout,
            code=step.code,
            detail=step.detail,
            aftermath=slots.aftermath(after),
        )
        self._owe(receipt)

    def _owe(self, receipt: Receipt) -> None:
        self._owed.append(self.entry(PriorityClass.RECEIPT, receipt))
        self._pay()

    def _pay(self) -> None:
        """Append what is owed; what cannot be appended is owed on. Raises ``storage.*``."""
        if self._owed:
            self._outbox.append(self._owed)
            self._owed = []

    def receipts(
        self,
        observed: Mapping[Name, plan.Observed],
        running: Callable[[Name], plan.Fetch | plan.Probe | None],
    ) -> None:
        """Say what has changed in how far the device is with each assignment. Raises ``storage.*``."""
        self._pay()
        desired = self._world.desired
        if desired is None:
            return
        changed: dict[str, Standing] = {}
        entries: list[Entry] = []
        keys = set()
        for wanted in desired.models:
            key = _key(wanted)
            keys.add(key)
            seen = observed.get(wanted.model_name)
            if seen is None:
                continue
            now = standing(
                wanted,
                seen,
                task=running(wanted.model_name),
                soaking=self._world.soaking(seen.slots),
                trouble=self._world.troubles.get(wanted.manifest_sha256),
            )
            if news(self._told.get(key), now):
                entries.append(self.entry(PriorityClass.RECEIPT, _receipt(wanted, now, _facts(wanted, seen))))
                changed[key] = now
        if entries:
            self._outbox.append(entries)
        gone = self._told.keys() - keys
        if changed or gone:
            self._world.state.put(
                {TOLD + key: value for key, value in changed.items()} | {TOLD + key: None for key in gone}
            )
            self._told = {k: v for k, v in self._told.items() if k not in gone} | changed
        for key, value in changed.items():
            log.info("receipt", extra={"facts": {"for": key, "state": value.state.value, "code": value.code}})

    def reported(self, observed: Mapping[Name, plan.Observed]) -> None:
        """Send the device's side of the twin if it has changed."""
        now, epoch = self.document(observed), self._outbox.epoch
        if (epoch, now) != self._reported:
            self._outbox.append([self.entry(PriorityClass.RECEIPT, now)])
            self._reported = (epoch, now)

    def document(self, observed: Mapping[Name, plan.Observed]) -> Reported:
        """Return the device's side of the twin."""
        world, error = self._world, self.update_error
        machine = world.machine
        goals = plan.goals(world.desired) if world.desired is not None else {}
        return Reported(
            revision=0 if world.desired is None else world.desired.revision,
            models=tuple(
                self._model(observed[name], goals.get(name, plan.Goal())) for name in sorted(observed)
            ),
            agent_version=machine.agent_version,
            hardware=machine.hardware,
            arch=machine.arch,
            accelerators=machine.accelerators,
            runtimes=machine.runtimes,
            update_code=None if error is None else error.code,
            update_detail="" if error is None else error.detail[:2000],
        )

    def health(
        self,
        *,
        engine_pid: int | None,
        engine_restarts: int,
        connected_s: float | None,
        clock_offset_s: float | None,
    ) -> None:
        """Send how the device itself is. Raises ``storage.*``."""
        stopped, found = self._trouble_now()
        health = Health(
            uptime_s=round(self._clock.seconds() - self._started, 3),
            cpu_percent=self._cpu.percent(),
            memory_percent=vitals.memory_percent(),
            agent_pss_bytes=vitals.pss([os.getpid()] + ([engine_pid] if engine_pid is not None else [])),
            disk_free_bytes=shutil.disk_usage(self._world.layout.state_dir).free,
            outbox=self._outbox.health(),
            temperature_c=vitals.temperature(),
            engine_restarts=engine_restarts,
            connected_s=connected_s,
            clock_offset_s=clock_offset_s,
            load_1=vitals.load_1(),
            bypass=stopped,
            ailing=found,
        )
        self._outbox.append([self.entry(PriorityClass.HEALTH, health)])
        self._signed = signature(stopped, found)

    def has_news(self) -> bool:
        """Whether something began or ceased to ail, or to be bypassed, since health was sent last."""
        return signature(*self._trouble_now()) != self._signed

    def _trouble_now(self) -> tuple[Bypass | None, tuple[Ailing, ...]]:
        world = self._world
        return told(world.layout.bypass), ailing(world.lanes.values(), world.serve)

    def _model(self, seen: plan.Observed, goal: plan.Goal) -> ReportedModel:
        found = seen.slots
        serving = found.serving
        previous = found.active.installed if found.trial is not None and found.active is not None else None
        code, detail = self._trouble(found, goal)
        return ReportedModel(
            model_name=found.model_name,
            active=None if serving is None else _in_slot(serving.installed),
            standby=None if found.standby is None else _in_slot(found.standby),
            last_good=_in_slot_or_none(previous or found.last_good),
            activation=0 if serving is None else serving.activation,
            trial=found.trial is not None,
            lane=self._lane_state(found.model_name),
            rejected=tuple(
                RejectedVersion(r.version, r.digest, r.attempt, r.code, r.detail)
                for r in found.rejected
                if r.final
            ),
            code=code,
            detail=detail,
        )

    def _trouble(self, found: Slots, goal: plan.Goal) -> tuple[ErrorCode | None, str]:
        for wanted in goal.assignments:
            refused = slots.rejection(found, wanted)
            if refused is not None:
                return refused.code, refused.detail
            trouble = self._world.troubles.get(wanted.manifest_sha256)
            if trouble is not None:
                return trouble[0], trouble[1][:2000]
        instead = self._world.in_service(found)
        if instead is not None and found.serving is not None and instead.digest != found.serving.digest:
            damaged, serves = found.serving.installed.version, instead.installed.version
            return (
                "storage.corrupt",
                f"files of {damaged} are damaged; {serves} serves until they are fetched",
            )
        for lane in self._world.lanes_of(found.model_name):
            state = self._world.lanes.get(lane.name)
            if state is not None and state.code is not None:
                return state.code, state.detail
        return self._serving_trouble(found.model_name)

    def _serving_trouble(self, model_name: Name) -> tuple[ErrorCode | None, str]:
        """What serving says of a model; of its own failure only where nothing else runs the model."""
        world = self._world
        state = world.served(model_name)
        if state is not None and state.code is not None:
            return state.code, state.detail
        if world.serve is not None and not world.lanes_of(model_name):
            return world.serve.code, world.serve.detail
        return None, ""

    def _lane_state(self, model_name: Name) -> LaneReport:
        """The worst of a model's lanes stands for all; where it has none, serving does."""
        lanes = self._world.lanes_of(model_name)
        found = [self._world.lanes.get(lane.name) for lane in lanes] or [self._world.served(model_name)]
        states: list[LaneReport] = [state.state for state in found if state is not None]
        return max(states, key=LANE_ORDER.index, default="none")


def _key(wanted: ModelAssignment) -> str:
    parts = (wanted.model_name, wanted.role.value, wanted.manifest_sha256, wanted.activation, wanted.attempt)
    return "/".join((*map(str, parts), wanted.rollout or ""))


def _receipt(wanted: ModelAssignment, found: Standing, facts: Facts) -> Receipt:
    return Receipt(
        model_name=wanted.model_name,
        version=wanted.version,
        state=found.state,
        activation=wanted.activation,
        attempt=wanted.attempt,
        rollout=wanted.rollout,
        code=found.code,
        detail=found.detail,
        aftermath=found.aftermath,
        facts=facts,
    )


def _facts(wanted: ModelAssignment, seen: plan.Observed) -> Facts:
    installed = seen.slots.find(wanted.manifest_sha256)
    facts: Facts = {"role": wanted.role.value}
    if installed is not None:
        facts |= {"variant": installed.variant, "accelerator": installed.accelerator}
    return facts


def _in_slot(installed: Installed) -> VersionInSlot:
    return VersionInSlot(installed.version, installed.digest, installed.variant, installed.accelerator)


def _in_slot_or_none(installed: Installed | None) -> VersionInSlot | None:
    return None if installed is None else _in_slot(installed)
