"""Whole rollouts: that harm is seen whenever it comes, and nothing passes that was not judged."""

from collections.abc import Callable
from typing import Any

import pytest

from contract.messages import Aftermath, AssignmentState, Health, OutboxHealth, PriorityClass
from control_plane.core.progress import Arm
from control_plane.services.rollouts import NewRollout
from control_plane.store.rollouts import Selection

ENDS = {"succeeded", "rolled_back", "paused"}
S = AssignmentState
HARM = {"alarm_rate": 0.9, "latency_us": 9000.0}


def until(fleet: Any, rollout: str, what: Callable[[Any], bool]) -> None:
    for _ in range(400):
        if what(fleet.rollouts.detail(rollout).rollout):
            return
        fleet.run(0.5)
    raise AssertionError(fleet.rollouts.detail(rollout))


def worsen(fleet: Any, version: str) -> None:
    for name, value in HARM.items():
        setattr(fleet.behaviours[version], name, value)


def test_harm_after_an_advance_that_a_pause_kept_back_halts(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", max_soak_buckets=80, guardrails={"error_rate": 1.0})
    until(fleet, rollout, lambda r: r.soak_from is not None)
    fleet.rollouts.pause(actor="ann", rollout_id=rollout)
    until(fleet, rollout, lambda _: fleet.rollouts.verdicts(rollout)[-1:] != [] and advanced(fleet, rollout))
    worsen(fleet, "2.0.0")
    assert fleet.run_until(rollout, {"rolled_back"}, 60)
    assert fleet.versions() == {"1.0.0": 20}


def advanced(fleet: Any, rollout: str) -> bool:
    return any(v.verdict == "advance" for v in fleet.rollouts.verdicts(rollout))


def test_a_worker_that_was_away_sees_the_harm_and_not_the_old_advance(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", max_soak_buckets=80)
    until(fleet, rollout, lambda r: r.soak_from is not None)
    worker = fleet.worker
    fleet.worker = type("Away", (), {"tick": lambda _self, _now: 0})()
    fleet.run(15)
    worsen(fleet, "2.0.0")
    fleet.run(40)
    fleet.worker = worker
    fleet.run(1)
    assert fleet.rollouts.verdicts(rollout)[-1].verdict == "halt"
    assert fleet.run_until(rollout, {"rolled_back"}, 30)


def test_the_watch_goes_on_after_the_longest_soak(fleet: Any):
    """A person is awaited; harm does not wait."""
    fleet.release("2.0.0", alarm_rate=0.105)
    rollout = fleet.create("2.0.0", max_soak_buckets=12, min_soak_buckets=5)
    assert fleet.run_until(rollout, ENDS, 100) == "paused"
    assert fleet.rollouts.detail(rollout).rollout.pause.value == "held"
    fleet.run(14)
    assert fleet.state(rollout) == "paused"
    worsen(fleet, "2.0.0")
    assert fleet.run_until(rollout, {"rolled_back"}, 60)
    halt = next(v for v in fleet.rollouts.verdicts(rollout) if v.verdict == "halt")
    assert (halt.kind, halt.numbers["period"] > 0) == ("watch", True)
    assert fleet.rollouts.replay(rollout, halt.id).reason == halt.reason


def test_the_watch_goes_on_between_stages(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    until(fleet, rollout, lambda r: r.stage == 1)
    detail = fleet.rollouts.detail(rollout)
    assert (detail.rollout.ordered_at, detail.soaked_buckets) == (None, 0)
    fleet.rollouts.pause(actor="ann", rollout_id=rollout)
    worsen(fleet, "2.0.0")
    assert fleet.run_until(rollout, {"rolled_back"}, 60)
    halt = next(v for v in fleet.rollouts.verdicts(rollout) if v.verdict == "halt")
    assert (halt.kind, halt.stage) == ("watch", 0)


def test_no_stage_passes_without_a_canary_that_was_judged(make_fleet: Callable[..., Any]):
    """The only device with a version to compare with refuses; ten first installs wait behind it."""
    fleet = make_fleet(devices=11)
    fleet.release("1.0.0")
    policy = {"strategy": "all_at_once", "bucket_s": 1, "trial_s": 3, "health_s": 2}
    alone = Selection(devices=(fleet.devices[0].id,))
    first = fleet.rollouts.create(actor="ann", new=NewRollout("shuttle", "1.0.0", policy, alone)).id
    assert fleet.run_until(first, ENDS, 60) == "succeeded"
    fleet.release("2.0.0", refuse="probe.golden_mismatch", refusing=frozenset({fleet.devices[0].id}))
    rollout = fleet.create("2.0.0")
    assert fleet.run_until(rollout, ENDS, 60) == "paused"
    assert "nothing can be compared" in fleet.reason(rollout)
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    fleet.run(20)
    assert fleet.state(rollout) == "paused", "a coverage that is waived is no canary"
    assert fleet.versions() == {"1.0.0": 1, "none": 10}


def test_a_last_stage_that_is_not_meant_for_all_leaves_the_others_alone(fleet: Any):
    fleet.release("2.0.0")
    policy = {"stages": [{"devices": 3}, {"percent": 50}], "max_soak_buckets": 40, "bucket_s": 1}
    plan = fleet.rollouts.plan(NewRollout(model_name="shuttle", version="2.0.0", policy=policy))
    assert "the last stage is meant for 10 of 20 devices: the others keep what they have" in plan.remarks
    assert plan.returns_to == {"1.0.0": 20}
    rollout = fleet.create("2.0.0", stages=policy["stages"])
    assert fleet.run_until(rollout, ENDS, 200) == "succeeded"
    fleet.run(8)
    assert fleet.versions() == {"2.0.0": 10, "1.0.0": 10}
    assert fleet.rollouts.detail(rollout).states == {"confirmed": 10, "superseded": 10}


def crash(fleet: Any, device: Any) -> None:
    """Fall back as an agent does whose confirmed version kills the engine again and again."""
    fallen = device.active
    device.rejected.add((fallen.version, fallen.attempt))
    device.active = device.previous
    fleet._tell(device, fallen, S.ROLLED_BACK, "trial.crashed", Aftermath.ROLLED_BACK)


def test_devices_that_fall_back_after_confirming_halt_a_later_stage(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    until(fleet, rollout, lambda r: r.stage == 1 and r.soak_from is not None)
    early = {m.device_id for m in fleet.rollouts.assignments(rollout) if m.stage == 0}
    for device in fleet.devices:
        if device.id in early:
            crash(fleet, device)
    assert fleet.run_until(rollout, {"rolled_back"}, 30)
    assert "guardrail crashed" in fleet.reason(rollout)
    assert fleet.versions() == {"1.0.0": 20}
    crashed = [m for m in fleet.rollouts.assignments(rollout) if m.device_id in early]
    assert {(m.state, m.code, m.aftermath) for m in crashed} == {
        (S.ROLLED_BACK, "trial.crashed", Aftermath.ROLLED_BACK)
    }


def test_an_engine_that_keeps_dying_on_a_canary_halts(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", min_soak_buckets=38)
    until(fleet, rollout, lambda r: r.soak_from is not None)
    members = fleet.rollouts.assignments(rollout)
    canary = next(m.device_id for m in members if m.arm is Arm.CANARY)
    device = next(d for d in fleet.devices if d.id == canary)
    for restarts in (7, 8, 0, 1, 2):  # the agent itself restarts once
        health = Health(
            uptime_s=1,
            cpu_percent=1,
            memory_percent=1,
            agent_pss_bytes=1,
            disk_free_bytes=1,
            outbox=OutboxHealth(records=0, bytes=0),
            engine_restarts=restarts,
        )
        fleet._send(device, PriorityClass.HEALTH, health)
        fleet.run(0.5)
    assert fleet.run_until(rollout, {"rolled_back"}, 30)
    assert f"the engine died 3 times on {canary}" in fleet.reason(rollout)


@pytest.mark.parametrize(
    ("release", "policy", "offline", "kind", "verdict"),
    [
        ({}, {"deadline_s": 15}, 5, "coverage", "hold"),
        ({"refuse": "update.hash_mismatch"}, {"guardrails": {"refused": 100}}, 0, "coverage", "halt"),
        ({"refuse": "update.hash_mismatch"}, {}, 0, "guardrail", "halt"),
        ({"error_rate": 0.9}, {}, 0, "guardrail", "halt"),
        ({"alarm_rate": 0.105}, {"max_soak_buckets": 12, "min_soak_buckets": 5}, 0, "soak", "hold"),
        ({}, {"strategy": "all_at_once"}, 0, "count", "advance"),
    ],
)
def test_every_decision_is_kept_and_can_be_made_again(
    fleet: Any,
    release: dict[str, Any],
    policy: dict[str, Any],
    offline: int,
    kind: str,
    verdict: str,
):
    fleet.release("2.0.0", **release)
    for device in fleet.devices[:offline]:
        device.online = False
    rollout = fleet.create("2.0.0", **policy)
    fleet.run_until(rollout, ENDS, 100)
    last = fleet.rollouts.verdicts(rollout)[-1]
    assert (last.kind, last.verdict) == (kind, verdict)
    again = fleet.rollouts.replay(rollout, last.id)
    assert (again.verdict.value, again.reason) == (last.verdict, last.reason)
    assert fleet.devices[7].id in fleet.rollouts.trace(rollout, last.id).decode()


def test_a_device_retried_before_the_end_is_not_forgotten(fleet: Any):
    unlucky = fleet.devices[0].id
    fleet.release("2.0.0", refuse="update.disk_full", refusing=frozenset({unlucky}))
    rollout = fleet.create("2.0.0", stages=[{"devices": 10}, {"devices": 20}])
    until(fleet, rollout, lambda r: r.stage == 1 and r.soak_from is not None)
    fleet.rollouts.pause(actor="ann", rollout_id=rollout)
    fleet.run(4)
    fleet.behaviours["2.0.0"].refuse = None
    fleet.rollouts.retry(actor="ann", rollout_id=rollout)
    fleet.rollouts.skip(actor="ann", rollout_id=rollout)
    assert fleet.state(rollout) == "succeeded"
    fleet.run(10)
    assert fleet.versions() == {"2.0.0": 20}
    assert fleet.rollouts.detail(rollout).states == {"confirmed": 20}


def test_after_an_abort_the_states_of_devices_still_come_true(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    until(fleet, rollout, lambda _: "activating" in fleet.rollouts.detail(rollout).states)
    fleet.rollouts.abort(actor="ann", rollout_id=rollout)
    fleet.run(6)
    assert fleet.rollouts.detail(rollout).states == {"confirmed": 3, "superseded": 17}


def test_why_and_show_tell_of_the_gate_and_of_what_is_waited_for(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", min_soak_buckets=38)
    fleet.run(1)
    device = fleet.devices[0].id
    conditions = {reason.condition for reason in fleet.rollouts.why(rollout, device).reasons}
    assert {"coverage", "gate", "its turn"} <= conditions
    until(fleet, rollout, lambda r: r.stage == 1 and r.looked_at >= 7)
    control = next(m for m in fleet.rollouts.assignments(rollout) if m.arm is Arm.CONTROL)
    found = {reason.condition: reason for reason in fleet.rollouts.why(rollout, control.device_id).reasons}
    assert found["gate"].detail == "gate: hold: soaking until bucket 38"
    assert "of at least 38" in found["soak"].detail
    detail = fleet.rollouts.detail(rollout)
    assert detail.verdict is not None
    assert detail.verdict.kind == "gate"
    assert detail.returns_to == {"1.0.0": 20}
    held = next(m for m in fleet.rollouts.assignments(rollout) if m.arm is Arm.HOLD_OUT)
    assert fleet.run_until(rollout, ENDS, 300) == "succeeded"
    fleet.run(8)
    why = fleet.rollouts.why(rollout, held.device_id)
    assert why.updated
    assert all(reason.holds for reason in why.reasons if reason.condition != "device is online")
