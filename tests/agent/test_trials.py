"""Trials and confirmed versions whose engines die, hang or do not load."""

from collections.abc import Callable

from agent.core import health, plan
from agent.core.blame import SOON_S
from agent.core.slots import Serving, Slots
from agent.ports import LaneState
from agent.service import events
from agent.service.reporting import Reporter
from contract.messages import (
    Desired,
)
from tests.agent.bench import CLOCK, Assign, Bench, Engines, hello, installed_order, intake, on_trial


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
