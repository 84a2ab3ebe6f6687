"""A supervisor's parts on a disk of their own, and engines that are told to live and die."""

import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.core import plan
from agent.core.layout import Layout
from agent.core.settings import AgentSettings, Lane
from agent.core.slots import Installed, Serving, Slots
from agent.ports import Hello, LaneState, Product
from agent.service import events
from agent.service.children import Children
from agent.service.engine_process import EngineKeeper
from agent.service.intake import Intake
from agent.service.reporting import Clock, Reporter
from agent.service.steps import Steps
from agent.service.world import Machine, World
from agent.store.objects import ObjectStore
from agent.store.outbox import Outbox
from agent.store.slots import SlotStore
from agent.store.state import StateStore
from contract import codec
from contract.messages import (
    Anomaly,
    Desired,
    Envelope,
    ModelAssignment,
    PriorityClass,
    Role,
)

DEVICE = "dev-test0001"


class Assign(Protocol):
    """Makes an order for a version of a model."""

    def __call__(
        self, version: str, role: Role = Role.ACTIVE, model: str = "pump", **more: object
    ) -> ModelAssignment: ...


MACHINE = Machine(
    device=DEVICE,
    boot_id="boot",
    arch="x86_64",
    hardware="test",
    formats=frozenset({"onnx"}),
    accelerators=("cpu",),
    runtimes={},
    agent_version="0",
)
LANE = Lane("line", "pump", {"kind": "replay", "path": "rows.csv"})


class Bench:
    """A world on a disk of its own."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.layout.run_dir.mkdir(parents=True)
        self.state = StateStore(self.layout.state)
        self.outbox = Outbox(self.layout.outbox, device=DEVICE, boot_id="boot", limit=10**7)
        self.objects = ObjectStore(self.layout.objects)
        self.box: queue.Queue[events.Event] = queue.Queue()
        self.engine = EngineKeeper(self.layout, self.box.put, fraction=lambda: 0.0)
        self.now = 100.0
        self.world = self.restarted()

    def restarted(self) -> World:
        return World(
            self.layout,
            AgentSettings(lanes=(LANE,)),
            MACHINE,
            slot_store=SlotStore(self.layout.slots),
            objects=self.objects,
            state=self.state,
        )

    def install(self, wanted: ModelAssignment) -> Installed:
        digest, model = self.objects.put(f"manifest {wanted.version}".encode()), self.objects.put(b"model")
        return Installed(wanted.version, digest, "int8", "cpu", {"model.onnx": model})

    def records(self, priority: PriorityClass) -> list[Envelope]:
        batch = self.outbox.unsent(priority, 0, records=10**6, size=2**40)
        return [] if batch is None else [codec.decode(r, Envelope) for r in batch.records]

    def close(self) -> None:
        self.outbox.close()
        self.state.close()


def product(n: int) -> Product:
    return Product(n, 1, 1, Anomaly("pump", "1.0.0", n, 2.0, 1.0))


def hello(pid: int = 7) -> Hello:
    return Hello(pid, 1000, {})


CLOCK = Clock(wall=lambda: 5, mono=lambda: 6)


def intake(bench: Bench) -> Intake:
    return Intake(bench.world, bench.outbox, bench.engine, lambda: bench.now)


def on_trial(bench: Bench, assign: Assign, **more: int) -> Slots:
    installed = bench.install(assign("2.0.0"))
    found = Slots("pump", trial=Serving(installed, activation=3), **more)
    bench.world.slots.save(found)
    return found


@dataclass
class Engines:
    """Engines that come, are told what to run, say that they do, and die."""

    bench: Bench
    intake: Intake
    n: int = 0

    def start(self, *, new: bool = True) -> None:
        if new:
            self.n += 1
            self.intake.started()
        self.intake.said(events.EngineSaid(self.n, hello(pid=self.n)))
        self.intake.configure()

    def say(self, state: LaneState) -> None:
        self.intake.said(events.EngineSaid(self.n, state))

    def run(self, serving: Serving, *, new: bool = True) -> None:
        self.start(new=new)
        self.say(LaneState("line", "pump", "running", serving.digest, serving.activation, windows=3))

    def die(self) -> None:
        self.intake.lost(events.EngineLost(self.n, "closed"))

    def step(self, desired: Desired) -> plan.Step | None:
        """Execute one step on the slots, as the loop does."""
        bench = self.bench
        reporter = Reporter(bench.world, bench.outbox, CLOCK)
        steps = Steps(
            bench.world, Children(bench.layout, bench.box.put, server="https://127.0.0.1:1"), reporter,
            now=lambda: bench.now, wall=lambda: 1, renew=lambda: None, fraction=lambda: 0.0,
        )  # fmt: skip
        step = plan.plan(desired, bench.world.observe(bench.now), bench.now).get("pump")
        if step is not None and not isinstance(step, plan.TASKS):
            steps.execute("pump", step)
        return step


def installed_order(bench: Bench, assign: Assign, version: str, **more: int) -> ModelAssignment:
    """Return an order for a version whose files are here."""
    return assign(version, manifest_sha256=bench.install(assign(version)).digest, **more)
