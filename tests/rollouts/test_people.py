"""Whole rollouts: what people may decide, and what one rollout may do to another."""

from collections.abc import Callable
from typing import Any

import pytest

from contract.errors import PitheadError
from contract.messages import AssignmentState, Desired, ModelAssignment, Reporting, Role
from control_plane.core import orders
from control_plane.services import desired
from control_plane.services.rollouts import NewRollout
from control_plane.store import devices as device_store
from control_plane.store import registry
from control_plane.store.rollouts import Selection

ENDS = {"succeeded", "rolled_back", "paused"}
S = AssignmentState


def until(fleet: Any, rollout: str, what: Callable[[Any], bool]) -> None:
    for _ in range(400):
        if what(fleet.rollouts.detail(rollout).rollout):
            return
        fleet.run(0.5)
    raise AssertionError(fleet.rollouts.detail(rollout))


def refused(deed: Callable[[], object]) -> str:
    with pytest.raises(PitheadError) as caught:
        deed()
    return caught.value.code


def test_approving_a_halt_acknowledges_it_and_stays_in_the_stage(fleet: Any):
    """However often a person approves, a release whose canaries all fail gets no further."""
    fleet.release("3.0.0", fail_trial="trial.unhealthy")
    rollout = fleet.create("3.0.0", on_halt="pause", max_soak_buckets=20, min_soak_buckets=5)
    approved = 0
    for _ in range(60):
        fleet.run(1)
        record = fleet.rollouts.detail(rollout).rollout
        assert record.stage == 0
        if record.pause.value == "halted":
            assert refused(lambda: fleet.rollouts.skip(actor="ann", rollout_id=rollout)) == (
                "rollout.illegal_transition"
            )
            fleet.rollouts.approve(actor="ann", rollout_id=rollout)
            approved += 1
        elif record.pause.value == "held":
            break
    assert approved == 2, "the guardrail, then the gate, each once"
    assert fleet.rollouts.detail(rollout).rollout.pause.value == "held"
    assert refused(lambda: fleet.rollouts.approve(actor="ann", rollout_id=rollout)) == (
        "rollout.illegal_transition"
    )
    people = [v for v in fleet.rollouts.verdicts(rollout) if v.kind == "person"]
    assert len(people[0].numbers["acknowledged"]["guardrails"]["rolled_back"]) == 3
    fleet.rollouts.rollback(actor="ann", rollout_id=rollout)
    assert fleet.run_until(rollout, {"rolled_back"}, 30)


def test_an_acknowledged_halt_of_the_gate_waits_out_the_soak_and_halts_the_next_stage(fleet: Any):
    fleet.release("3.0.0", alarm_rate=0.2)
    rollout = fleet.create("3.0.0", on_halt="pause", max_soak_buckets=12, min_soak_buckets=5)
    assert fleet.run_until(rollout, ENDS, 60) == "paused"
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    assert fleet.rollouts.detail(rollout).rollout.stage == 0
    until(fleet, rollout, lambda r: r.pause.value == "held")
    assert "acknowledged: harm above the minimum" in fleet.reason(rollout)
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    until(fleet, rollout, lambda r: r.pause.value != "not")
    record = fleet.rollouts.detail(rollout).rollout
    assert (record.stage, record.pause.value) == (1, "halted")


def test_no_stage_is_skipped_before_its_canaries_serve(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0")
    fleet.run(1)
    assert fleet.state(rollout) == "running"
    skip = lambda: fleet.rollouts.skip(actor="ann", rollout_id=rollout)  # noqa: E731 - called twice below
    assert refused(skip) == "rollout.illegal_transition"
    until(fleet, rollout, lambda r: r.soak_from is not None)
    fleet.run(3)
    assert skip().stage == 1
    assert refused(skip) == "rollout.illegal_transition"


def test_an_author_does_not_pass_a_policy_that_asks_for_approval(fleet: Any):
    fleet.release("2.0.0")
    rollout = fleet.create("2.0.0", approval=True)
    fleet.rollouts.approve(actor="ann", rollout_id=rollout)
    until(fleet, rollout, lambda r: r.soak_from is not None)
    fleet.run(3)
    assert refused(lambda: fleet.rollouts.skip(actor="operator", rollout_id=rollout)) == "auth.forbidden"
    assert fleet.rollouts.skip(actor="ann", rollout_id=rollout).stage == 1


def halted_with_one_dead_canary(fleet: Any) -> tuple[str, Any]:
    fleet.release("3.0.0", alarm_rate=0.3)
    rollout = fleet.create("3.0.0")
    until(fleet, rollout, lambda r: r.soak_from is not None)
    canaries = {m.device_id for m in fleet.rollouts.assignments(rollout) if m.arm.value == "canary"}
    dead = next(device for device in fleet.devices if device.id in canaries)
    fleet.run(4)
    dead.online = False
    until(fleet, rollout, lambda r: r.state.value == "rolling_back")
    fleet.run(10)
    assert fleet.state(rollout) == "rolling_back"
    fleet.release("4.0.0")
    return rollout, dead


def test_a_rollback_holds_only_who_is_not_back(fleet: Any):
    rollout, dead = halted_with_one_dead_canary(fleet)
    assert refused(lambda: fleet.create("4.0.0")) == "rollout.overlap"
    others = Selection(devices=tuple(d.id for d in fleet.devices if d is not dead))
    policy = {"stages": [{"devices": 3}, {"percent": 100}], "bucket_s": 1}
    new = NewRollout("shuttle", "4.0.0", policy, others)
    assert fleet.rollouts.create(actor="ann", new=new)
    assert fleet.state(rollout) == "rolling_back"


def test_a_rollback_can_be_closed_and_the_absent_go_back_when_they_come(fleet: Any):
    rollout, dead = halted_with_one_dead_canary(fleet)
    closed = fleet.rollouts.abort(actor="ann", rollout_id=rollout, reason="sent for repair")
    assert closed.state.value == "rolled_back"
    assert f"not heard of since: {dead.id}" in closed.reason
    assert fleet.versions()["3.0.0"] == 1
    dead.online = True
    fleet.run(8)
    assert fleet.versions() == {"1.0.0": 20}
    (mine,) = [m for m in fleet.rollouts.assignments(rollout) if m.device_id == dead.id]
    assert (mine.state, mine.returning) == (S.ROLLED_BACK, False)
    assert fleet.create("4.0.0")


def test_a_revoked_device_does_not_hold_a_rollback(fleet: Any):
    rollout, dead = halted_with_one_dead_canary(fleet)
    with fleet.database.transaction() as tx:
        device_store.revoke_certificates(tx, dead.id, fleet.now)
    assert fleet.run_until(rollout, {"rolled_back"}, 5)
    assert fleet.create("4.0.0")


def test_a_new_rollout_makes_a_new_attempt_at_a_rejected_version(fleet: Any):
    unlucky = fleet.devices[0].id
    fleet.release("2.0.0", refuse="update.disk_full", refusing=frozenset({unlucky}))
    first = fleet.create("2.0.0")
    until(fleet, first, lambda _: "refused" in fleet.rollouts.detail(first).states)
    fleet.rollouts.abort(actor="ann", rollout_id=first)
    fleet.behaviours["2.0.0"].refuse = None
    second = fleet.create("2.0.0")
    assert {m.attempt for m in fleet.rollouts.assignments(second)} == {1}
    assert fleet.run_until(second, ENDS, 200) == "succeeded", fleet.reason(second)
    fleet.run(8)
    assert fleet.versions() == {"2.0.0": 20}


def assignment(name: str) -> ModelAssignment:
    return ModelAssignment(
        model_name=name,
        version="2.0.0",
        role=Role.ACTIVE,
        manifest_path=f"models/{name}/2.0.0/manifest.json",
        manifest_sha256="b" * 64,
        manifest_length=1,
        release_counter=2,
    )


def test_reporting_is_as_eager_as_the_most_eager_needs_it():
    document = Desired(v=1, device="device-0001", revision=1, reporting=Reporting(bucket_s=5))
    both = [Reporting(bucket_s=1, health_s=90, trial_s=3), Reporting(trial_s=20)]
    assert orders.report(document, both).reporting == Reporting(bucket_s=1, health_s=60, trial_s=20)
    assert orders.report(document, []) == document


def test_rollouts_of_two_models_share_a_device(fleet: Any):
    with fleet.database.transaction() as tx:
        registry.add_version(
            tx,
            registry.VersionRecord(
                model_name="host-health",
                version="1.0.0",
                release_counter=1,
                manifest_sha256="c" * 64,
                manifest_length=10,
                released_at=fleet.now,
                released_by="test",
            ),
            manifest="{}",
            report="{}",
            files=[],
        )

    def reporting() -> Reporting:
        with fleet.database.reading() as tx:
            return desired.read(tx, fleet.devices[0].id).reporting

    fleet.release("2.0.0")
    eager = fleet.create("2.0.0")
    fleet.run(1)
    assert reporting().bucket_s == 1
    policy = {"strategy": "all_at_once", "bucket_s": 60, "health_s": 30, "trial_s": 40}
    calm = fleet.rollouts.create(actor="ann", new=NewRollout("host-health", "1.0.0", policy)).id
    fleet.run(1)
    assert reporting() == Reporting(bucket_s=1, health_s=2, trial_s=40), (
        "the eager one still needs its buckets"
    )
    fleet.rollouts.abort(actor="ann", rollout_id=eager)
    assert reporting() == Reporting(bucket_s=60, health_s=30, trial_s=40)
    fleet.rollouts.abort(actor="ann", rollout_id=calm)
    assert reporting() == Reporting(bucket_s=60, health_s=30, trial_s=40)
