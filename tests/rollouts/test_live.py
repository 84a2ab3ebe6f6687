"""Whole rollouts: the real worker, services and tables, with a simulated fleet."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from contract.errors import PitheadError
from contract.messages import AssignmentState, Role
from control_plane.core.gate import trace
from control_plane.services import desired
from control_plane.services.rollouts import NewRollout
from control_plane.store import events
from control_plane.store.rollouts import Selection

ENDS = {"succeeded", "rolled_back", "paused"}


def kinds(fleet: Any, rollout: str) -> list[str]:
    with fleet.database.reading() as tx:
        return [event.kind for event in events.query(tx, subject=rollout)][::-1]


def test_a_first_install_counts_confirmations_and_says_so(make_fleet: Callable[..., Any]):
    fleet = make_fleet(devices=5)
    fleet.release("1.0.0")
    with pytest.raises(PitheadError, match="all_at_once") as caught:
        fleet.create("1.0.0")
    assert caught.value.code == "rollout.policy_invalid"
    rollout = fleet.create("1.0.0", strategy="all_at_once")
    assert fleet.run_until(rollout, ENDS, 60) == "succeeded"
    assert fleet.versions() == {"1.0.0": 5}
    (verdict,) = fleet.rollouts.verdicts(rollout)
    assert (verdict.kind, verdict.verdict) == ("count", "advance")
    assert "nothing was compared" in verdict.reason


def test_a_good_release_goes_to_all_but_the_hold_out_and_then_to_all(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    assert fleet.run_until(rollout, ENDS, 200) == "succeeded", fleet.reason(rollout)
    assert fleet.versions() == {"2.0.0": 17, "1.0.0": 3}, "the hold-out keeps the old version until the end"
    stages = {v.stage: v for v in fleet.rollouts.verdicts(rollout) if v.kind == "gate"}
    assert [v.verdict for v in stages.values()] == ["advance"] * 3
    assert all(v.bucket is not None and v.bucket <= 20 for v in stages.values())
    fleet.run(6)
    assert fleet.versions() == {"2.0.0": 20}
    states = {m.state for m in fleet.rollouts.assignments(rollout)}
    assert states == {AssignmentState.CONFIRMED}
    assert "rollout.last_stage_passed" in kinds(fleet, rollout)


def test_controls_restart_at_the_same_moment_as_canaries(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    while fleet.rollouts.detail(rollout).rollout.ordered_at is None:
        fleet.run(0.5)
    arms = {m.device_id: m for m in fleet.rollouts.assignments(rollout)}
    with fleet.database.reading() as tx:
        documents = {device: desired.read(tx, device) for device in arms}
    for device, m in arms.items():
        active = next(a for a in documents[device].models if a.role is Role.ACTIVE)
        assert active.activation == m.activation == 2
        assert active.version == ("2.0.0" if m.arm.value == "canary" else "1.0.0")
    assert sorted(m.arm.value for m in arms.values()) == ["canary"] * 3 + ["control"] * 14 + ["hold_out"] * 3


@pytest.mark.parametrize("harm", [{"alarm_rate": 0.2}, {"latency_us": 600.0}, {"error_rate": 0.15}])
def test_a_bad_release_is_halted_and_rolled_back(fleet: Any, harm: dict[str, float]):
    fleet.release("3.0.0", **harm)
    rollout = fleet.create("3.0.0", guardrails={"error_rate": 0.9})
    assert fleet.run_until(rollout, ENDS, 100) == "rolled_back", fleet.reason(rollout)
    assert fleet.versions() == {"1.0.0": 20}
    halt = fleet.rollouts.verdicts(rollout)[-1]
    assert (halt.kind, halt.verdict) == ("gate", "halt")
    assert halt.bucket is not None
    assert halt.bucket <= 10
    members = fleet.rollouts.assignments(rollout)
    assert {m.state.value for m in members} == {"rolled_back", "superseded"}
    assert all(not m.returning for m in members)
    with fleet.database.reading() as tx:
        for m in members:
            (only,) = desired.read(tx, m.device_id).models
            assert (only.version, only.role) == ("1.0.0", Role.ACTIVE)
    assert kinds(fleet, rollout)[-1] == "rollout.rollback_complete"


@pytest.mark.parametrize("harm", [{"alarm_rate": 0.2}, {"latency_us": 600.0}])
def test_what_applications_ask_does_not_hide_what_a_lane_sees(fleet: Any, harm: dict[str, float]):
    fleet.requests = 100_000
    fleet.release("3.0.0", **harm)
    rollout = fleet.create("3.0.0")
    assert fleet.run_until(rollout, ENDS, 100) == "rolled_back", fleet.reason(rollout)
    halt = fleet.rollouts.verdicts(rollout)[-1]
    assert (halt.kind, halt.verdict) == ("gate", "halt")
    assert halt.bucket is not None
    assert halt.bucket <= 10


def test_every_verdict_can_be_made_again_from_what_was_kept(fleet: Any):
    fleet.release("3.0.0", alarm_rate=0.2)
    rollout = fleet.create("3.0.0")
    fleet.run_until(rollout, ENDS, 100)
    looked = [v for v in fleet.rollouts.verdicts(rollout) if v.evidence_sha256]
    assert looked
    for verdict in looked:
        again = fleet.rollouts.replay(rollout, verdict.id)
        assert again.verdict.value == verdict.verdict
        assert again.reason == verdict.reason
        assert msgspec.json.decode(msgspec.json.encode(again.looks[-1])) == verdict.numbers["look"]
        found = trace.read(fleet.rollouts.trace(rollout, verdict.id).decode().splitlines())
        assert sum(found.evidence.treated) == 3
        assert found.evidence.pre == verdict.numbers["pre_buckets"] >= 10


def test_harm_that_comes_late_halts_a_later_stage(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    while fleet.rollouts.detail(rollout).rollout.stage < 2:
        fleet.run(0.5)
    fleet.behaviours["2.0.0"].alarm_rate = 0.3
    assert fleet.run_until(rollout, ENDS, 100) == "rolled_back", fleet.reason(rollout)
    assert fleet.versions() == {"1.0.0": 20}


def test_devices_that_refuse_halt_and_say_why(fleet: Any):
    fleet.release("4.0.0", refuse="update.hash_mismatch")
    rollout = fleet.create("4.0.0", guardrails={"refused": 20})
    assert fleet.run_until(rollout, ENDS, 60) == "rolled_back"
    members = fleet.rollouts.assignments(rollout)
    assert {(m.state.value, m.code, m.aftermath.value) for m in members} == {
        ("refused", "update.hash_mismatch", "no_change")
    }
    assert "update.hash_mismatch" in fleet.reason(rollout)
    assert fleet.versions() == {"1.0.0": 20}
    assert fleet.rollouts.verdicts(rollout)[-1].kind == "guardrail"


def test_two_canaries_that_roll_back_halt(fleet: Any):
    fleet.release("5.0.0", fail_trial="trial.crashed")
    rollout = fleet.create("5.0.0")
    assert fleet.run_until(rollout, ENDS, 60) == "rolled_back"
    assert "guardrail crashed" in fleet.reason(rollout)
    assert fleet.versions() == {"1.0.0": 20}


def test_canaries_that_fall_silent_halt(fleet: Any):
    fleet.release("6.0.0", dies_after_s=6)
    rollout = fleet.create("6.0.0", min_soak_buckets=30)
    assert fleet.run_until(rollout, ENDS, 100) == "rolled_back"
    assert "silent" in fleet.reason(rollout)


def test_machines_that_stand_are_waited_for(fleet: Any):
    """Neither silence nor evidence: a rest is made up for by a longer soak, whatever applications ask."""
    fleet.requests = 50
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", max_soak_buckets=80, min_soak_buckets=10)
    standing = fleet.canaries(rollout)
    for device in standing:
        device.stands = True
    fleet.run(25)
    assert fleet.state(rollout) == "running"
    assert fleet.rollouts.detail(rollout).rollout.stage == 0
    verdict = fleet.rollouts.verdicts(rollout)[-1]
    assert (verdict.kind, verdict.verdict) == ("gate", "hold")
    assert "the machines of " in verdict.reason
    again = fleet.rollouts.replay(rollout, verdict.id)
    assert (again.verdict.value, again.reason) == (verdict.verdict, verdict.reason)
    for device in standing:
        device.stands = False
    while fleet.rollouts.detail(rollout).rollout.stage == 0:
        fleet.run(0.5)
    passed = next(v for v in fleet.rollouts.verdicts(rollout) if v.verdict == "advance")
    assert passed.bucket is not None
    assert passed.bucket >= 30, "ten buckets with the machines running"


def test_when_nothing_ever_runs_a_person_is_told_why(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", max_soak_buckets=12, min_soak_buckets=5)
    fleet.canaries(rollout)
    for device in fleet.devices:
        device.stands = True
    assert fleet.run_until(rollout, ENDS, 60) == "paused"
    assert "machines stand" in fleet.reason(rollout)
    assert {v.verdict for v in fleet.rollouts.verdicts(rollout)} == {"hold"}


def test_one_machine_that_stands_holds_nobody_up(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    canaries = {device.id for device in fleet.canaries(rollout)}
    chosen = {m.device_id for m in fleet.rollouts.assignments(rollout) if m.arm.value == "control"}
    assert not canaries & chosen
    next(device for device in fleet.devices if device.id in chosen).stands = True
    while fleet.rollouts.detail(rollout).rollout.stage == 0:
        fleet.run(0.5)
    assert fleet.state(rollout) == "running"


def test_a_canary_that_dies_while_its_machine_stands_is_silent_all_the_same(fleet: Any):
    fleet.release("6.0.0", dies_after_s=12)
    rollout = fleet.create("6.0.0", min_soak_buckets=30)
    for device in fleet.canaries(rollout):
        device.stands = True
    assert fleet.run_until(rollout, ENDS, 100) == "rolled_back"
    assert "silent" in fleet.reason(rollout)


def test_a_rest_before_the_activation_is_no_period_before(fleet: Any):
    for device in fleet.devices:
        device.stands = True
    fleet.run(30)
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", min_pre_buckets=10)
    fleet.run(15)
    assert fleet.rollouts.detail(rollout).rollout.ordered_at is None, "it waits for windows"
    for device in fleet.devices:
        device.stands = False
    fleet.run(13)
    assert fleet.rollouts.detail(rollout).rollout.ordered_at is not None


def test_errors_above_the_guardrail_halt_before_the_first_look(fleet: Any):
    fleet.release("7.0.0", error_rate=0.9)
    rollout = fleet.create("7.0.0")
    assert fleet.run_until(rollout, ENDS, 60) == "rolled_back"
    assert "guardrail error_rate" in fleet.reason(rollout)


def test_a_halt_can_leave_the_rest_to_a_person(fleet: Any):
    fleet.release("3.0.0", alarm_rate=0.2)
    rollout = fleet.create("3.0.0", on_halt="pause")
    assert fleet.run_until(rollout, ENDS, 60) == "paused"
    assert fleet.rollouts.detail(rollout).rollout.pause.value == "halted"
    fleet.run(5)
    assert fleet.state(rollout) == "paused"
    fleet.rollouts.rollback(actor="ann", rollout_id=rollout, reason="enough")
    assert fleet.run_until(rollout, {"rolled_back"}, 30)
    assert fleet.versions() == {"1.0.0": 20}


def test_too_few_devices_wait_for_an_approval_and_say_what_is_needed(make_fleet: Callable[..., Any]):
    fleet = make_fleet(devices=4)
    fleet.install()
    fleet.release("2.0.0")
    few = {"stages": [{"devices": 1}, {"percent": 100}], "max_soak_buckets": 10, "min_soak_buckets": 5}
    rollout = fleet.create("2.0.0", **few)
    assert fleet.run_until(rollout, ENDS, 100) == "paused"
    assert "too few devices" in fleet.reason(rollout)
    assert "at least" in fleet.reason(rollout)
    with pytest.raises(PitheadError, match="Approve it or roll it back"):
        fleet.rollouts.resume(actor="ann", rollout_id=rollout)
    fleet.rollouts.approve(actor="ann", rollout_id=rollout, reason="looks fine")
    assert fleet.state(rollout) == "running"
    assert fleet.run_until(rollout, ENDS, 100) == "paused"
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    assert fleet.state(rollout) == "succeeded"
    fleet.run(6)
    assert fleet.versions() == {"2.0.0": 4}
    people = [v for v in fleet.rollouts.verdicts(rollout) if v.kind == "person"]
    assert [v.numbers["actor"] for v in people] == ["ann", "ann"]


def test_a_pause_stops_growth_but_not_the_watch(fleet: Any):
    fleet.release("3.0.0")
    rollout = fleet.create("3.0.0")
    while fleet.rollouts.detail(rollout).rollout.soak_from is None:
        fleet.run(0.5)
    fleet.rollouts.pause(actor="ann", rollout_id=rollout)
    fleet.run(15)
    assert fleet.state(rollout) == "paused"
    assert fleet.rollouts.detail(rollout).rollout.stage == 0
    fleet.rollouts.resume(actor="ann", rollout_id=rollout)
    fleet.run(1)
    assert fleet.rollouts.detail(rollout).rollout.stage == 1, "the gate had advanced meanwhile"
    while fleet.rollouts.detail(rollout).rollout.soak_from is None:
        fleet.run(0.5)
    fleet.rollouts.pause(actor="ann", rollout_id=rollout)
    fleet.behaviours["3.0.0"].alarm_rate = 0.4
    assert fleet.run_until(rollout, {"rolled_back"}, 60)


def test_approval_needs_a_second_person(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", approval=True)
    fleet.run(3)
    assert fleet.state(rollout) == "awaiting_approval"
    with pytest.raises(PitheadError) as caught:
        fleet.rollouts.approve(actor="operator", rollout_id=rollout)
    assert caught.value.code == "auth.forbidden"
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    fleet.run(1)
    assert fleet.state(rollout) == "running"


def test_rollouts_do_not_overlap(fleet: Any):
    fleet.release("2.0.0")
    fleet.release("3.0.0")
    first = fleet.create("2.0.0")
    with pytest.raises(PitheadError) as caught:
        fleet.create("3.0.0")
    assert caught.value.code == "rollout.overlap"
    assert caught.value.facts["rollout"] == first
    fleet.rollouts.abort(actor="ann", rollout_id=first)
    assert fleet.create("3.0.0")


def test_abort_keeps_what_serves_and_withdraws_the_rest(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    while fleet.rollouts.detail(rollout).rollout.soak_from is None:
        fleet.run(0.5)
    fleet.rollouts.abort(actor="ann", rollout_id=rollout)
    fleet.run(5)
    assert fleet.versions() == {"2.0.0": 3, "1.0.0": 17}
    with fleet.database.reading() as tx:
        roles = {m.role for d in fleet.devices for m in desired.read(tx, d.id).models}
    assert roles == {Role.ACTIVE}


def test_unreached_devices_are_counted_apart_and_get_it_when_they_come_back(fleet: Any):
    fleet.release("2.0.0")
    absent = fleet.devices[0]
    absent.online = False
    rollout = fleet.create("2.0.0", deadline_s=15)
    assert fleet.run_until(rollout, ENDS, 200) == "succeeded", fleet.reason(rollout)
    states = {m.device_id: m.state.value for m in fleet.rollouts.assignments(rollout)}
    assert states[absent.id] == "unreached"
    absent.online = True
    fleet.run(8)
    assert fleet.versions() == {"2.0.0": 20}
    states = {m.device_id: m.state.value for m in fleet.rollouts.assignments(rollout)}
    assert states[absent.id] == "confirmed"


def test_too_little_coverage_pauses_and_can_be_waived(fleet: Any):
    fleet.release("2.0.0")
    for device in fleet.devices[:5]:
        device.online = False
    rollout = fleet.create("2.0.0", deadline_s=15)
    assert fleet.run_until(rollout, ENDS, 60) == "paused"
    assert "coverage: 15 of 20" in fleet.reason(rollout)
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    while fleet.rollouts.detail(rollout).rollout.ordered_at is None:
        fleet.run(0.5)
    assert fleet.rollouts.detail(rollout).arms["canary"] == 3


def test_a_wrong_clock_does_not_make_a_device_silent(make_fleet: Callable[..., Any]):
    fleet = make_fleet()
    for device in fleet.devices[:6]:
        device.clock_offset_us = -1_500_000_000
    fleet.install()
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    assert fleet.run_until(rollout, ENDS, 200) == "succeeded", fleet.reason(rollout)


def test_a_worker_that_died_goes_on_where_it_stood(fleet: Any):
    """Everything that counts is in the database: a new worker for every tick changes nothing."""
    fleet.release("3.0.0", alarm_rate=0.2)
    rollout = fleet.create("3.0.0")
    for _ in range(200):
        fleet.run(0.5)
        fleet.new_worker()
        if fleet.state(rollout) in ENDS:
            break
    assert fleet.state(rollout) == "rolled_back"


def test_ticks_repeat_nothing(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    while fleet.rollouts.detail(rollout).rollout.soak_from is None:
        fleet.run(0.5)
    fleet.worker.tick(fleet.now)
    before = kinds(fleet, rollout)
    for _ in range(5):
        assert fleet.worker.tick(fleet.now) == 0
    assert kinds(fleet, rollout) == before


def test_retry_offers_it_once_more(fleet: Any):
    unlucky = fleet.devices[0].id
    fleet.release("2.0.0", refuse="update.disk_full", refusing=frozenset({unlucky}))
    rollout = fleet.create("2.0.0")
    fleet.run(3)
    assert {m.device_id for m in fleet.rollouts.detail(rollout).failures} == {unlucky}
    fleet.behaviours["2.0.0"].refuse = None
    fleet.rollouts.retry(actor="ann", rollout_id=rollout)
    fleet.run(3)
    assert fleet.rollouts.detail(rollout).failures == []
    (mine,) = [m for m in fleet.rollouts.assignments(rollout) if m.device_id == unlucky]
    assert mine.attempt == 1
    assert fleet.run_until(rollout, ENDS, 200) == "succeeded", fleet.reason(rollout)


def test_why_names_what_is_in_the_way(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    while fleet.rollouts.detail(rollout).rollout.soak_from is None:
        fleet.run(0.5)
    members = fleet.rollouts.assignments(rollout)
    held = next(m for m in members if m.arm.value == "hold_out")
    why = fleet.rollouts.why(rollout, held.device_id)
    assert not why.updated
    failing = {reason.condition: reason for reason in why.reasons if not reason.holds}
    assert "hold-out" in failing["its turn"].detail
    canary = next(m for m in members if m.arm.value == "canary")
    reasons = {
        reason.condition: reason.holds for reason in fleet.rollouts.why(rollout, canary.device_id).reasons
    }
    assert reasons["its turn"]
    with pytest.raises(PitheadError, match="no device"):
        fleet.rollouts.why(rollout, "nobody-here")


def test_plan_says_what_the_gate_can_find_and_changes_nothing(fleet: Any):
    fleet.release("2.0.0")
    policy = {"stages": [{"devices": 1}, {"devices": 3}, {"percent": 100}]}
    plan = fleet.rollouts.plan(NewRollout(model_name="shuttle", version="2.0.0", policy=policy))
    assert plan.devices == 20
    assert [(s.joining, s.running, s.controls) for s in plan.stages] == [(1, 1, 19), (2, 3, 17), (14, 17, 3)]
    assert [s.can_advance for s in plan.stages] == [True, True, True]
    assert [s.can_halt for s in plan.stages] == [False, True, True]
    assert fleet.rollouts.page() == fleet.rollouts.page(model="shuttle")
    assert len(fleet.rollouts.page()) == 1


def test_what_cannot_be_made(fleet: Any):
    fleet.release("2.0.0")
    policy: dict[str, object] = {}

    def create(version: str, selection: Selection) -> None:
        fleet.rollouts.create(
            actor="ann", new=NewRollout("shuttle", version, policy=policy, selection=selection)
        )

    for code, version, selection in (
        ("request.not_found", "9.9.9", Selection()),
        ("request.not_found", "2.0.0", Selection(group="nowhere")),
        ("rollout.no_devices", "2.0.0", Selection(labels={"site": "nowhere"})),
        ("rollout.no_devices", "2.0.0", Selection(devices=("no-such-device",))),
        ("rollout.no_devices", "1.0.0", Selection()),
    ):
        with pytest.raises(PitheadError) as caught:
            create(version, selection)
        assert caught.value.code == code
