"""What lanes and their engine say: sessions, products, fits, receipts."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.__main__ import main
from agent.core import slots
from agent.core.slots import Installed, Serving, Slots
from agent.ports import FitResult, LaneState
from agent.service import events
from agent.service.intake import MOST_UNSTORED
from agent.service.reporting import Clock, Reporter
from agent.service.specs import lane_seen
from contract.errors import PitheadError
from contract.messages import (
    Anomaly,
    Desired,
    PriorityClass,
    Receipt,
    Reported,
)
from tests.agent.bench import (
    Assign,
    Bench,
    Engines,
    hello,
    intake,
    on_trial,
    product,
)

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
