"""Parts of the supervisor, each with the real ones that it touches."""

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil
import pytest

from agent.__main__ import main
from agent.core import health, plan, slots
from agent.core.blame import SOON_S
from agent.core.layout import Layout
from agent.core.plan import Fetch, Probe
from agent.core.settings import AgentSettings, Lane
from agent.core.slots import Installed, Serving, Slots
from agent.ports import Configure, FitResult, Hello, LaneState, Product, SinkState
from agent.service import bypass, children, engine_process, events, vitals
from agent.service.children import Children, Download
from agent.service.engine_process import EngineKeeper
from agent.service.intake import MOST_UNSTORED, Intake
from agent.service.reporting import Clock, Reporter
from agent.service.specs import lane_seen
from agent.service.steps import Steps
from agent.service.world import Machine, World
from agent.store.objects import ObjectStore
from agent.store.outbox import Outbox
from agent.store.slots import SlotStore
from agent.store.state import StateStore
from contract import codec
from contract.errors import PitheadError
from contract.messages import (
    Ailing,
    Anomaly,
    Bypass,
    Desired,
    Envelope,
    Health,
    ModelAssignment,
    PriorityClass,
    Receipt,
    Reported,
)
from tests.agent.conftest import Assign
from tests.engine.conftest import make_package

DEVICE = "dev-test0001"
Wait = Callable[..., None]
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


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    yield found
    found.close()


def product(n: int) -> Product:
    return Product(n, 1, 1, Anomaly("pump", "1.0.0", n, 2.0, 1.0))


def hello(pid: int = 7) -> Hello:
    return Hello(pid, 1000, {})


CLOCK = Clock(wall=lambda: 5, mono=lambda: 6)


def intake(bench: Bench) -> Intake:
    return Intake(bench.world, bench.outbox, bench.engine, lambda: bench.now)


# --- trials


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


@pytest.fixture
def engines(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Engines:
    monkeypatch.setattr(bench.engine, "send", lambda _message: True)
    return Engines(bench, intake(bench))


def installed_order(bench: Bench, assign: Assign, version: str, **more: int) -> ModelAssignment:
    """Return an order for a version whose files are here."""
    return assign(version, manifest_sha256=bench.install(assign(version)).digest, **more)


def test_an_engine_that_dies_under_watch_ends_the_trial(bench: Bench, engines: Engines, assign: Assign):
    trial = on_trial(bench, assign).trial
    assert trial is not None
    engines.run(trial)
    verdict = bench.world.observe(0.0)["pump"].verdict
    assert verdict.judgement is health.Judgement.PENDING
    assert bench.world.slots.get("pump").trial_starts == 1
    engines.die()
    engines.start()
    verdict = bench.world.observe(0.0)["pump"].verdict
    assert (verdict.judgement, verdict.code) == (health.Judgement.BAD, "trial.crashed")


def test_a_way_back_ordered_while_the_engine_is_dead_is_not_blamed_for_it(
    bench: Bench, engines: Engines, assign: Assign, desire: Callable[..., Desired]
):
    """The confirmed version kills the engine; while the next one waits, the fleet orders a rollback."""
    bad, good = bench.install(assign("2.0.0")), bench.install(assign("1.0.0"))
    active = Serving(bad, activation=2)
    bench.world.slots.save(Slots("pump", active=active, last_good=good))
    engines.run(active)
    engines.die()
    back = desire(installed_order(bench, assign, "1.0.0", activation=3))
    assert isinstance(engines.step(back), plan.Activate)
    trial = bench.world.slots.get("pump").trial
    assert trial is not None
    engines.run(trial)
    assert engines.step(back) is None
    for _ in range(health.MAX_STARTS - 1):  # it was good once: one death more proves nothing
        engines.die()
        engines.run(trial)
        assert engines.step(back) is None
    assert bench.world.slots.get("pump").serving == trial
    engines.die()
    engines.run(trial)
    assert isinstance(engines.step(back), plan.Rollback)


def test_a_confirmed_version_that_kills_engines_is_given_up_also_across_restarts(
    bench: Bench, engines: Engines, assign: Assign, desire: Callable[..., Desired]
):
    good = bench.install(assign("1.0.0"))
    wanted = installed_order(bench, assign, "2.0.0", activation=2, attempt=1)
    active = Serving(bench.install(wanted), activation=2)
    bench.world.slots.save(Slots("pump", active=active, last_good=good))
    for n in range(health.MAX_DEATHS):
        assert engines.step(desire(wanted)) is None
        engines.run(active)
        if n == 2:
            bench.world = bench.restarted()
            engines.intake = intake(bench)
            engines.run(active, new=False)
        engines.die()
    engines.start()
    step = engines.step(desire(wanted))
    assert isinstance(step, plan.Fallback)
    found = bench.world.slots.get("pump")
    assert found.active == Serving(good)
    assert [(r.version, r.attempt, r.code) for r in found.rejected] == [("2.0.0", 1, "trial.crashed")]
    assert engines.step(desire(wanted)) is None


def test_engines_that_die_before_their_lanes_speak_count_too(
    bench: Bench, engines: Engines, assign: Assign, desire: Callable[..., Desired]
):
    wanted = installed_order(bench, assign, "2.0.0")
    active = Serving(bench.install(wanted))
    bench.world.slots.save(Slots("pump", active=active, last_good=bench.install(assign("1.0.0"))))
    for _ in range(health.MAX_DEATHS):
        engines.start()
        assert engines.step(desire(wanted)) is None
        engines.die()
    engines.start()
    assert isinstance(engines.step(desire(wanted)), plan.Fallback)


def test_an_engine_that_lived_long_begins_a_new_count(bench: Bench, engines: Engines, assign: Assign):
    active = Serving(bench.install(assign("2.0.0")))
    before = Slots("pump", active=active, last_good=bench.install(assign("1.0.0")), deaths=4)
    bench.world.slots.save(before)
    engines.run(active)
    bench.now += SOON_S
    engines.die()
    engines.start()
    assert bench.world.slots.get("pump").deaths == 1


def test_a_confirmed_version_that_does_not_load_is_given_up_in_time(
    bench: Bench, engines: Engines, assign: Assign, desire: Callable[..., Desired]
):
    wanted = installed_order(bench, assign, "2.0.0")
    active = Serving(bench.install(wanted))
    bench.world.slots.save(Slots("pump", active=active, last_good=bench.install(assign("1.0.0"))))
    engines.start()
    for _ in range(2):
        engines.say(
            LaneState("line", "pump", "failed", wanted_digest=active.digest, code="inference.load_failed")
        )
        assert engines.step(desire(wanted)) is None
        bench.now += health.LOAD_S
        engines.say(LaneState("line", "pump", "running", active.digest))
        assert engines.step(desire(wanted)) is None
    engines.say(
        LaneState("line", "pump", "failed", wanted_digest=active.digest, code="inference.load_failed")
    )
    assert engines.step(desire(wanted)) is None
    bench.now += health.LOAD_S
    assert isinstance(engines.step(desire(wanted)), plan.Fallback)


def test_while_files_in_service_are_damaged_the_version_before_stands_in(
    bench: Bench, assign: Assign, desire: Callable[..., Desired]
):
    good = bench.install(assign("1.0.0"))
    wanted = installed_order(bench, assign, "2.0.0")
    active = Serving(bench.install(wanted))
    bench.world.slots.save(Slots("pump", active=active, last_good=good))
    bench.world.take(desire(wanted), "e1")
    assert [s.version for s in bench.world.lane_specs()] == ["2.0.0"]
    bench.objects.path(active.digest).unlink()
    assert [s.version for s in bench.world.lane_specs()] == ["1.0.0"]
    reporter = Reporter(bench.world, bench.outbox, CLOCK)
    (told,) = reporter.document(bench.world.observe(0.0)).models
    assert (told.code, told.rejected) == ("storage.corrupt", ())
    bench.install(wanted)
    assert [s.version for s in bench.world.lane_specs()] == ["2.0.0"]


def test_an_engine_that_survives_a_lost_connection_is_no_crash(
    bench: Bench, engines: Engines, assign: Assign
):
    trial = on_trial(bench, assign).trial
    assert trial is not None
    watching = engines.intake
    watching.said(events.EngineSaid(1, hello()))
    watching.configure()
    watching.said(events.EngineSaid(1, LaneState("line", "pump", "running", trial.digest, 3)))
    watching.lost(events.EngineLost(1, "closed"))
    watching.said(events.EngineSaid(2, hello()))
    watching.configure()
    assert bench.world.observe(0.0)["pump"].verdict.judgement is health.Judgement.PENDING
    assert bench.world.slots.get("pump").trial_starts == 0


def test_a_trial_that_takes_the_device_down_again_and_again_is_given_up(
    bench: Bench, engines: Engines, assign: Assign
):
    on_trial(bench, assign)
    for _ in range(health.MAX_STARTS + 1):
        bench.world = bench.restarted()
        engines.intake = intake(bench)
        engines.start()
    assert bench.world.observe(0.0)["pump"].verdict.code == "trial.crashed"


DIGEST = "d" * 64
TRIAL = Serving(Installed("2.0.0", DIGEST, "int8", "cpu", {}), activation=3)


@pytest.mark.parametrize(
    ("state", "serves", "seen", "code"),
    [
        (None, False, "unknown", None),
        (LaneState("line", "pump", "running", "a" * 64, 1), False, "loading", None),
        (LaneState("line", "pump", "failed", "a" * 64, 1, code="source.failed"), False, "loading", None),
        (LaneState("line", "pump", "running", DIGEST, 2), False, "loading", None),
        (LaneState("line", "pump", "running", DIGEST, 3, code="source.failed"), True, "running", None),
        (
            LaneState("line", "pump", "running", "a" * 64, 1, DIGEST, 3, code="inference.load_failed"),
            False,
            "running",
            "inference.load_failed",
        ),
        (
            LaneState("line", "pump", "failed", DIGEST, 3, code="inference.run_failed"),
            True,
            "failed",
            "inference.run_failed",
        ),
    ],
)
def test_a_lane_counts_for_its_own_session_only(
    state: LaneState | None,
    serves: bool,  # noqa: FBT001 - a parameter of the table above
    seen: str,
    code: str | None,
):
    lane = lane_seen("line", state, TRIAL)
    assert (lane.serves, lane.state, lane.code) == (serves, seen, code)


# --- the engine's products


def test_products_that_the_engine_repeats_are_stored_once(bench: Bench):
    first = intake(bench)
    first.said(events.EngineSaid(1, hello()))
    for n in range(1, 6):
        first.said(events.EngineSaid(1, product(n)))
    first.store()
    again = intake(bench)  # the supervisor has died before it could say `Stored`
    again.said(events.EngineSaid(1, hello()))
    for n in range(3, 9):
        again.said(events.EngineSaid(1, product(n)))
    again.store()
    bodies = [e.body for e in bench.records(PriorityClass.ANOMALY)]
    assert [b.t for b in bodies if isinstance(b, Anomaly)] == list(range(1, 9))
    other = intake(bench)  # a new engine counts from 1 again
    other.said(events.EngineSaid(1, hello(pid=8)))
    other.said(events.EngineSaid(1, product(1)))
    other.store()
    assert len(bench.records(PriorityClass.ANOMALY)) == 9


def test_products_that_the_engine_gave_up_are_counted(bench: Bench):
    taking = intake(bench)
    taking.said(events.EngineSaid(1, hello()))
    for n in (1, 2, 5, 6, 9):
        taking.said(events.EngineSaid(1, product(n)))
    taking.store()
    assert bench.outbox.health().lost == {"anomaly": 4}
    again = intake(bench)
    again.said(events.EngineSaid(1, hello()))
    for n in (9, 10, 12):
        again.said(events.EngineSaid(1, product(n)))
    again.store()
    assert bench.outbox.health().lost == {"anomaly": 5}


def test_a_full_disk_does_not_keep_a_new_engine_from_its_work(bench: Bench, engines: Engines, assign: Assign):
    on_trial(bench, assign)
    engines.start()
    engines.intake.said(events.EngineSaid(1, product(1)))
    bench.outbox._db.execute("PRAGMA query_only=ON")
    engines.die()
    with contextlib.suppress(PitheadError):
        engines.start()
    bench.outbox._db.execute("PRAGMA query_only=OFF")
    engines.intake.configure()
    assert not engines.intake.ended
    engines.intake.said(events.EngineSaid(2, product(1)))
    engines.intake.store()
    assert bench.outbox.health().lost == {"anomaly": 1}


def test_while_the_disk_takes_nothing_products_wait_and_the_engine_is_held(bench: Bench):
    taking = intake(bench)
    taking.said(events.EngineSaid(1, hello()))
    for n in range(1, MOST_UNSTORED + 3):
        taking.said(events.EngineSaid(1, product(n)))
    bench.outbox._db.execute("PRAGMA query_only=ON")
    with pytest.raises(PitheadError) as caught:
        taking.store()
    assert caught.value.code == "storage.failed"
    assert bench.engine._paused.is_set()
    taking.store()  # not yet again
    bench.outbox._db.execute("PRAGMA query_only=OFF")
    bench.now += 2
    taking.store()
    assert not bench.engine._paused.is_set()
    assert len(bench.records(PriorityClass.ANOMALY)) == MOST_UNSTORED + 2


# --- what the engine is told


def test_a_lane_runs_only_with_all_its_files_and_keeps_its_fit(bench: Bench, assign: Assign):
    found = on_trial(bench, assign)
    assert found.trial is not None
    installed = found.trial.installed
    binding = bench.world.lane_specs()[0].binding
    fit = FitResult((0.0,), (1.0,), 2.0, 10, 5, binding)
    bench.world.fitted("line", installed.digest, fit)
    world = bench.restarted()
    (spec,) = world.lane_specs()
    assert (spec.fit, spec.activation, spec.digest) == (fit, 3, installed.digest)
    assert spec.source["path"] == str(bench.layout.config.parent / "rows.csv")
    path = Path(spec.files["model.onnx"])
    path.write_bytes(b"other")
    failed = LaneState("line", "pump", "failed", installed.digest, 3, code="package.file_mismatch")
    world.lane_said(failed, 0.0)
    assert not path.exists()
    assert world.lane_specs() == ()
    assert installed.digest in world.observe(0.0)["pump"].broken


def test_a_fit_holds_for_its_source_and_until_another_calibration_is_asked_for(
    bench: Bench, assign: Assign, capsys: pytest.CaptureFixture[str]
):
    found = on_trial(bench, assign)
    assert found.trial is not None
    (spec,) = bench.world.lane_specs()
    fit = FitResult((0.0,), (1.0,), 2.0, 10, 5, spec.binding)
    bench.world.fitted("line", found.trial.installed.digest, fit)
    assert bench.world.lane_specs()[0].fit == fit
    bench.layout.config.parent.mkdir(parents=True)
    bench.layout.config.write_text(
        '[[lanes]]\nname = "line"\nmodel = "pump"\nsource = {kind = "replay", path = "rows.csv"}\n'
    )
    root = ["--root", str(bench.layout.root)]
    assert main(["recalibrate", "line", *root]) == 0  # by another process, while this one runs
    (again,) = bench.world.lane_specs()
    assert again.fit is None
    assert again.binding != spec.binding
    # The engine may still repeat the fit that it had: it is kept for what it was made for.
    bench.world.fitted("line", found.trial.installed.digest, fit)
    assert bench.world.lane_specs()[0].fit is None
    assert main(["recalibrate", "other", *root]) == 2
    assert "no lane is named 'other'; there are line" in capsys.readouterr().err


def test_what_is_needed_is_kept_and_fits_of_gone_versions_are_forgotten(bench: Bench, assign: Assign):
    found = on_trial(bench, assign)
    assert found.trial is not None
    installed = found.trial.installed
    binding = bench.world.lane_specs()[0].binding
    bench.world.fitted("line", installed.digest, FitResult((0.0,), (1.0,), 2.0, 10, 5, binding))
    gone = bench.objects.put(b"gone")
    bench.world.forget()
    assert bench.objects.collect(bench.world.needed_objects()) == 1
    assert not bench.objects.has(gone)
    assert bench.world.lane_specs()[0].fit is not None
    bench.world.slots.remove("pump")
    bench.world.forget()
    assert bench.state.scan("fit/", FitResult) == {}


# --- reporting


def test_receipts_are_made_up_for_after_a_power_cut_and_not_repeated(
    bench: Bench, assign: Assign, desire: Callable[..., Desired]
):
    clock = Clock(wall=lambda: 5, mono=lambda: 6)
    bench.world.take(desire(assign("1.0.0", rollout="r")), "e1")
    reporter = Reporter(bench.world, bench.outbox, clock)

    def report(reporter: Reporter) -> list[str]:
        observed = bench.world.observe(0.0)
        reporter.receipts(observed, lambda _name: None)
        reporter.reported(observed)
        bodies = [e.body for e in bench.records(PriorityClass.RECEIPT)]
        return [b.state.value if isinstance(b, Receipt) else type(b).__name__ for b in bodies]

    assert report(reporter) == ["acknowledged", "Reported"]
    assert report(reporter) == ["acknowledged", "Reported"]
    wanted = assign("1.0.0")
    installed = msgspec.structs.replace(bench.install(wanted), digest=wanted.manifest_sha256)
    bench.world.slots.save(slots.confirm(slots.activate(slots.stage(Slots("pump"), installed), wanted)))
    restarted = Reporter(bench.world, bench.outbox, clock)
    assert report(restarted)[2:] == ["confirmed", "Reported"]
    last = bench.records(PriorityClass.RECEIPT)[-1].body
    assert isinstance(last, Reported)
    assert last.models[0].active is not None
    assert last.models[0].active.version == "1.0.0"


def test_health_has_plausible_numbers(bench: Bench):
    reporter = Reporter(bench.world, bench.outbox, Clock(wall=lambda: 5, mono=lambda: 6))
    reporter.health(engine_pid=None, engine_restarts=2, connected_s=None, clock_offset_s=0.5)
    (record,) = bench.records(PriorityClass.HEALTH)
    body = msgspec.to_builtins(record.body)
    assert body["engine_restarts"] == 2
    assert 0 < body["memory_percent"] < 100
    assert body["agent_pss_bytes"] > 10_000_000
    assert body["disk_free_bytes"] > 0


def test_health_says_of_the_bypass_and_of_what_ails_whoever_wrote_it(bench: Bench):
    reporter = Reporter(bench.world, bench.outbox, CLOCK)

    def sent() -> Health:
        reporter.health(engine_pid=None, engine_restarts=0, connected_s=None, clock_offset_s=None)
        body = bench.records(PriorityClass.HEALTH)[-1].body
        assert isinstance(body, Health)
        return body

    quiet = sent()
    assert (quiet.bypass, quiet.ailing) == (None, ())
    assert not reporter.has_news()
    sinks = (
        SinkState("hook", "http", "failed", lost=2, waiting=3, code="sink.failed", detail="refused"),
        SinkState("lamp", "modbus", "bypassed"),
        SinkState("log\0", "file", "working", sent=9),
    )
    lane = LaneState("line", "pump", "failed", code="source.failed", detail="no route", sinks=sinks)
    bench.world.lane_said(lane, bench.now)
    bypass.switch_on(bench.layout.bypass, datetime(2026, 3, 1, 12, tzinfo=UTC), "ann\0", "valve " * 1000)
    assert reporter.has_news()
    body = sent()
    assert body.bypass is not None
    assert (body.bypass.since, body.bypass.who) == (1_772_366_400_000_000, "ann")
    assert len(body.bypass.why) == 2000
    assert body.ailing == (
        Ailing("line", "sink", "failed", "hook", "http", "sink.failed", "refused", waiting=3, lost=2),
        Ailing("line", "source", "failed", code="source.failed", detail="no route"),
    )
    bench.world.lane_said(msgspec.structs.replace(lane, windows=7), bench.now)
    assert not reporter.has_news(), "counts are none"
    bench.world.lane_said(LaneState("line", "pump", "running", machine="unknown"), bench.now)
    assert reporter.has_news()
    assert [(each.what, each.state, each.code) for each in sent().ailing] == [("machine", "unknown", None)]
    bench.layout.bypass.write_bytes(b"")  # by touch
    os.utime(bench.layout.bypass, (5, 5))
    assert sent().bypass == Bypass(5_000_000)


def test_vitals_agree_with_psutil():
    assert vitals.memory_percent() == pytest.approx(psutil.virtual_memory().percent, abs=5)
    assert vitals.pss([os.getpid()]) == pytest.approx(psutil.Process().memory_full_info().pss, rel=0.2)
    assert 0 <= vitals.CpuMeter().percent() <= 100
    assert vitals.pss([2**22 + 1]) == 0


def test_vitals_read_sensors_where_there_are_any(tmp_path: Path):
    assert vitals.temperature(tmp_path) is None
    for i, text in enumerate(["41500\n", "broken\n", "55250\n"]):
        zone = tmp_path / f"class/thermal/thermal_zone{i}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    assert vitals.temperature(tmp_path) == 55.25


# --- child processes


@pytest.fixture
def running(bench: Bench) -> Iterator[Children]:
    found = Children(bench.layout, bench.box.put, server="https://127.0.0.1:1")
    yield found
    found.stop()
    for thread in threading.enumerate():
        if thread.name in {"fetch", "probe", "refresh"}:
            thread.join(20)


def test_an_update_process_that_fails_leaves_a_code(bench: Bench, running: Children, assign: Assign):
    step = Fetch(assign("1.0.0"))
    running.fetch(step, [Download("models/pump/1.0.0/manifest.json", "a" * 64, 10)])
    assert running.running("pump") == step
    event = bench.box.get(timeout=30)
    assert isinstance(event, events.Fetched)
    assert event.error is not None
    assert event.error.code == "update.not_released"
    running.finished(step)
    assert running.running("pump") is None
    bench.layout.bundle.write_bytes(b"nonsense")
    running.refresh('"e1"')
    refused = bench.box.get(timeout=30)
    assert isinstance(refused, events.Refreshed)
    assert isinstance(refused.result, PitheadError)


def test_a_cancelled_task_says_nothing_and_two_never_write_at_once(
    bench: Bench, running: Children, assign: Assign, wait_until: Wait
):
    holder = bench.layout.update_lock
    holder.touch()
    # An update process that outlived its supervisor holds the lock.
    orphan = subprocess.Popen(["flock", str(holder), "sleep", "60"], start_new_session=True)
    try:
        wait_until(lambda: subprocess.call(["flock", "-n", str(holder), "true"]) == 1, "the lock to be held")
        step = Fetch(assign("1.0.0"))
        running.fetch(step, [Download("models/pump/1.0.0/manifest.json", "a" * 64, 10)])
        with pytest.raises(queue.Empty):
            bench.box.get(timeout=0.5)
        running.cancel("pump")
        assert running.running("pump") is None
        wait_until(lambda: "pump" not in running._running, "the task to end")
        assert bench.box.empty()
    finally:
        os.killpg(orphan.pid, signal.SIGKILL)
        orphan.wait()


def steps_of(bench: Bench, running: Children, renewed: list[int] | None = None) -> Steps:
    return Steps(
        bench.world, running, Reporter(bench.world, bench.outbox, CLOCK),
        now=lambda: bench.now, wall=lambda: 1, fraction=lambda: 0.0,
        renew=lambda: None if renewed is None else renewed.append(1),
    )  # fmt: skip


def test_only_probes_that_began_and_were_waited_for_count_against_a_model(
    bench: Bench, running: Children, assign: Assign, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
):
    """The fleet changes its mind again and again while a probe takes its time: the device never went down."""
    gate = threading.Event()

    def slow(*_: object, **__: object) -> list[object]:
        assert gate.wait(30)
        return []

    monkeypatch.setattr(children.probing, "probe", slow)
    package = make_package(bench.layout.objects)
    wanted = assign("1.0.0", model="demo", manifest_sha256=package.digest,
                    manifest_length=package.manifest_path.stat().st_size)  # fmt: skip
    other = msgspec.structs.replace(wanted, model_name="other")
    steps, probe = steps_of(bench, running), Probe(wanted, package.variant.name)
    steps.execute("demo", probe)
    assert list(bench.state.scan("probes/", int).values()) == [1]
    steps.cancel("demo")
    for _ in range(6):
        steps.execute("demo", probe)
        steps.execute("other", Probe(other, package.variant.name))
    assert bench.state.scan("probes/", int) == {}
    assert bench.world.failures == {}
    gate.set()
    wait_until(lambda: not running.probing, "the probe to end")
    steps.execute("demo", probe)
    assert running.running("demo") == probe


def test_a_probe_is_told_whether_the_sandbox_is_required(
    bench: Bench, assign: Assign, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []

    def probed(*_: object, **options: object) -> list[object]:
        asked.append(options["require_sandbox"])
        return []

    monkeypatch.setattr(children.probing, "probe", probed)
    package = make_package(bench.layout.objects)
    for required in (True, False):
        strict = Children(bench.layout, bench.box.put, server="https://127.0.0.1:1", require_sandbox=required)
        strict.probe(Probe(assign("1.0.0"), package.variant.name), package.manifest, {})
        assert isinstance(bench.box.get(timeout=10), events.Probed)
    assert asked == [True, False]


@pytest.mark.parametrize("code", ["update.not_released", "storage.corrupt"])
def test_a_fetch_without_verified_metadata_waits_until_they_are_verified_again(
    bench: Bench, running: Children, assign: Assign, desire: Callable[..., Desired], code: str
):
    wanted = assign("2.0.0")
    bench.world.take(desire(wanted), "e1")
    renewed: list[int] = []
    steps, ended = steps_of(bench, running, renewed), events.Fetched(Fetch(wanted), PitheadError(code))
    for n in range(1, 9):
        steps.fetched(ended)
        assert len(renewed) == n
    assert bench.world.failures == {}
    bench.world.take(desire(wanted), "e1")
    steps.fetched(ended)
    assert bench.world.failures[wanted.manifest_sha256].code == code


def test_what_serves_and_is_damaged_is_fetched_with_longer_and_longer_pauses(
    bench: Bench, running: Children, assign: Assign, desire: Callable[..., Desired]
):
    wanted = installed_order(bench, assign, "2.0.0")
    active = Serving(bench.install(wanted))
    bench.world.slots.save(Slots("pump", active=active))
    bench.world.take(desire(wanted), "e1")
    bench.objects.path(active.digest).unlink()
    steps, tries = steps_of(bench, running), []
    for _ in range(1200):
        step = plan.plan(bench.world.desired, bench.world.observe(bench.now), bench.now).get("pump")
        if step is not None:
            assert isinstance(step, Fetch)
            tries.append(bench.now)
            steps.fetched(events.Fetched(step, PitheadError("update.hash_mismatch")))
        bench.now += 0.5
    assert 5 < len(tries) < 20
    assert bench.world.slots.get("pump").rejected == ()


def test_an_answer_that_is_none_is_an_interruption():
    with pytest.raises(PitheadError) as caught:
        children._answer("fetch", b"", b"boom\n", -9)
    assert caught.value.code == "install.interrupted"
    assert "boom" in caught.value.detail
    with pytest.raises(PitheadError) as caught:
        children._answer("fetch", b'{"ok": false, "code": "update.hash_mismatch", "detail": "x"}\n', b"", 1)
    assert caught.value.code == "update.hash_mismatch"


# --- the engine's process


def heard(bench: Bench, kind: type, timeout_s: float = 30.0) -> events.Event:
    while True:
        event = bench.box.get(timeout=timeout_s)
        if isinstance(event, kind) or (
            isinstance(event, events.EngineSaid) and isinstance(event.message, kind)
        ):
            return event


def test_an_engine_that_dies_or_hangs_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_process, "SILENCE_S", 0.5)
    bench.engine.start()
    try:
        first = heard(bench, Hello)
        assert isinstance(first, events.EngineSaid)
        assert isinstance(first.message, Hello)
        assert bench.engine.send(Configure(()))
        os.kill(first.message.pid, signal.SIGKILL)
        second = heard(bench, Hello)
        assert isinstance(second, events.EngineSaid)
        assert isinstance(second.message, Hello)
        assert second.message.pid != first.message.pid
        bench.engine.lanes = 1
        os.kill(second.message.pid, signal.SIGSTOP)
        third = heard(bench, Hello)
        assert isinstance(third, events.EngineSaid)
        assert isinstance(third.message, Hello)
        assert third.message.pid not in {first.message.pid, second.message.pid}
    finally:
        bench.engine.leave(keep_engine=False)
        bench.engine.join()
    assert not engine_process.is_engine(third.message.pid)
