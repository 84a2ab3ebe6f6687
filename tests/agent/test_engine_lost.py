"""A real engine that dies or hangs, and a supervisor's parts that find out what was to blame."""

import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.core import health, plan
from agent.core.settings import AgentSettings, Lane
from agent.core.slots import Installed, Serving, Slots
from agent.engine import lane
from agent.engine.clock import Clock as EngineClock
from agent.engine.loading import Loader
from agent.engine.outlet import Outlet
from agent.service import events
from agent.service.children import Children
from agent.service.reporting import Clock, Reporter
from agent.service.steps import Steps
from agent.service.world import World
from agent.store.slots import SlotStore
from contract.messages import Desired, ModelAssignment
from inference.accelerators import Custom
from tests.agent.conftest import Assign
from tests.agent.test_service import MACHINE, Bench, intake
from tests.engine.conftest import Package, make_package, samples, write_csv

Wait = Callable[..., None]
CLOCK = Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)


@dataclass
class Rig:
    """The supervisor's loop without its links, on a real engine."""

    bench: Bench
    lanes: tuple[Lane, ...]
    desired: Desired
    accelerators: dict[str, Custom] = field(default_factory=dict)
    executed: list[plan.Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        b = self.bench
        b.world = self.world = World(
            b.layout, AgentSettings(lanes=self.lanes, accelerators=self.accelerators), MACHINE,
            slot_store=SlotStore(b.layout.slots), objects=b.objects, state=b.state,
        )  # fmt: skip
        self.world.take(self.desired, None)
        self.intake = intake(b)
        self.steps = Steps(
            self.world, Children(b.layout, b.box.put, server="https://127.0.0.1:1"),
            Reporter(self.world, b.outbox, CLOCK),
            now=CLOCK.seconds, wall=CLOCK.wall, renew=lambda: None, fraction=lambda: 0.0,
        )  # fmt: skip

    def turn(self) -> None:
        self.bench.now = CLOCK.seconds()
        while True:
            try:
                event = self.bench.box.get(timeout=0.05)
            except queue.Empty:
                break
            match event:
                case events.EngineSaid():
                    self.intake.said(event)
                case events.EngineStarted():
                    self.intake.started(event.ended)
                case events.EngineLost():
                    self.intake.lost(event)
                case _:
                    raise AssertionError(event)
        for name, step in plan.plan(self.desired, self.world.observe(self.bench.now), self.bench.now).items():
            assert not isinstance(step, plan.TASKS), step
            self.steps.execute(name, step)
            self.executed.append(step)
        self.intake.store()
        self.intake.watch()
        self.intake.weigh()
        self.intake.configure()

    def serves(self, lane: str, digest: str) -> bool:
        self.turn()
        state = self.world.lanes.get(lane)
        return state is not None and (state.state, state.digest) == ("running", digest)

    def kill(self) -> None:
        assert self.bench.engine.pid is not None
        os.kill(self.bench.engine.pid, signal.SIGKILL)


def installed(package: Package, accelerator: str = "cpu") -> Installed:
    files = {path: Path(place).name for path, place in package.files.items()}
    return Installed(package.manifest.version, package.digest, package.variant.name, accelerator, files)


def order(assign: Assign, model: str, package: Package, **more: int) -> ModelAssignment:
    return assign(package.manifest.version, model=model, manifest_sha256=package.digest, **more)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    found.layout.config.parent.mkdir(parents=True)
    write_csv(found.layout.config.parent / "rows.csv", samples())
    yield found
    found.engine.leave(keep_engine=False)
    found.engine.join()
    found.close()


LINE = Lane("line", "pump", {"kind": "replay", "path": "rows.csv", "rate_hz": 50.0})


def test_a_confirmed_version_of_which_engines_die_gives_way_to_the_one_before(
    bench: Bench, assign: Assign, desire: Callable[..., Desired], wait_until: Wait
) -> None:
    old, new = (make_package(bench.layout.objects, version=v) for v in ("1.0.0", "2.0.0"))
    bench.world.slots.save(Slots("pump", active=Serving(installed(new)), last_good=installed(old)))
    rig = Rig(bench, (LINE,), desire(order(assign, "pump", new)))
    bench.engine.start()
    for _ in range(health.MAX_DEATHS):
        assert not rig.executed
        wait_until(lambda: rig.serves("line", new.digest), "the confirmed version to serve")
        rig.kill()
        wait_until(lambda: rig.turn() or rig.intake.ended, "the loss to be seen")
    wait_until(lambda: rig.serves("line", old.digest), "the version before to serve")
    assert [type(step) for step in rig.executed] == [plan.Fallback]


def test_a_lane_that_hangs_costs_its_own_trial_only(
    bench: Bench,
    assign: Assign,
    desire: Callable[..., Desired],
    wait_until: Wait,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pipe that nobody writes holds the second lane for ever, as a model may; the first goes on."""
    monkeypatch.setattr(health, "SILENT_S", 3.0)
    package = make_package(bench.layout.objects)
    os.mkfifo(bench.layout.config.parent / "pipe")
    stuck = Lane("stuck", "fan", {"kind": "replay", "path": "pipe", "rate_hz": 50.0})
    for name in ("pump", "fan"):
        bench.world.slots.save(Slots(name, trial=Serving(installed(package))))
    rig = Rig(bench, (LINE, stuck), desire(*(order(assign, name, package) for name in ("pump", "fan"))))
    bench.engine.start()
    wait_until(lambda: rig.serves("line", package.digest), "the first lane to serve")
    first = bench.engine.pid
    wait_until(lambda: rig.turn() or rig.executed, "a verdict")
    (step,) = rig.executed
    assert isinstance(step, plan.Rollback)
    assert step.code == "trial.crashed"
    assert rig.world.slots.get("fan").trial is None
    wait_until(lambda: rig.serves("line", package.digest), "the first lane to serve again")
    assert bench.engine.pid != first
    assert rig.world.slots.get("pump").trial is not None


def test_a_model_that_could_not_be_loaded_is_tried_again(
    bench: Bench, wait_until: Wait, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane, "LOAD_AGAIN_US", 100_000)
    package = make_package(bench.layout.objects)
    model = Path(package.files[package.variant.file.path])
    model.rename(model.with_name("away"))
    clock = EngineClock(wall=CLOCK.wall, mono=CLOCK.mono)
    outlet, loader = Outlet(clock, lambda: None), Loader()
    spec = package.spec({"kind": "replay", "path": str(bench.layout.config.parent / "rows.csv")})
    running = lane.Lane(spec, 60.0, outlet, loader, clock)
    loader.start()
    running.start()
    try:
        wait_until(lambda: outlet._states and outlet._states["one"].state == "failed", "the refusal")
        model.with_name("away").rename(model)
        wait_until(lambda: outlet._states["one"].state == "running", "the second try")
    finally:
        running.stop()
        assert running.join(10)
        loader.stop(10)
