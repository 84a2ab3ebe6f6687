"""What a rollout would do, what its gate can find, and why a device has not been updated."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

from contract.messages import AssignmentState
from control_plane.core import progress, strata
from control_plane.core.assignment import ON_NEW_VERSION
from control_plane.core.gate import design
from control_plane.core.policy import Policy
from control_plane.core.progress import MICROS, Arm, Pause
from control_plane.core.rollout import RolloutState
from control_plane.store.devices import DeviceRecord
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord, VerdictRecord

TELLING: Final = 2
"""How many of the newest decisions ``telling`` must see: gate and watch look at the same moment."""
Z_ALPHA: Final = 1.645
Z_POWER: Final = 0.842
"""Power 80 %."""


class PlannedStage(Struct, frozen=True):
    """One stage as far as it is known beforehand."""

    stage: int
    joining: int
    """Devices that get the version in this stage."""
    running: int
    """Devices that have it then."""
    controls: int
    can_halt: bool
    can_advance: bool
    needs: str
    """What a decision would need, when it cannot be taken."""
    detectable: float | None
    """Harm above the minimum that is found four times out of five, in standard
    deviations between devices of an adjusted mean. An estimate."""


class Plan(Struct, frozen=True):
    """What ``create`` would do."""

    strategy: str
    devices: int
    first_install: int
    """Devices without any version of the model: they cannot be compared."""
    strata: dict[str, int]
    locked: dict[str, str]
    """Device -> the open rollout that has it."""
    returns_to: dict[str, int]
    """Devices by the version that a rollback would bring back; ``none`` where there is none."""
    hold_out: int
    stages: list[PlannedStage]
    remarks: list[str]


class Reason(Struct, frozen=True):
    """One condition on the way to a device's update."""

    holds: bool
    condition: str
    detail: str
    remedy: str = ""


class Why(Struct, frozen=True):
    """Everything that keeps a device from its update."""

    device: str
    state: str | None
    arm: str | None
    updated: bool
    reasons: list[Reason]


def plan(policy: Policy, members: Sequence[AssignmentRecord], locked: Mapping[str, str]) -> Plan:
    """Return what a rollout over ``members`` would do."""
    sizes: dict[str, int] = {}
    for m in members:
        sizes[m.stratum] = sizes.get(m.stratum, 0) + 1
    first = sum(m.previous is None for m in members)
    held = progress.hold_out_size(policy, len(members)) if policy.strategy == "canary" else 0
    remarks = []
    if policy.strategy == "all_at_once":
        remarks.append(
            "all at once: nothing can be compared; guardrails and the number of confirmations decide"
        )
    elif members and first == len(members):
        remarks.append("a first install: nothing can be compared; use the strategy all_at_once")
    stages = _stages(policy, len(members) - first, held) if policy.strategy == "canary" else []
    if any(not stage.can_advance for stage in stages):
        remarks.append("stages that the gate cannot decide wait for an approval after the longest soak")
    if members and not progress.is_whole(policy, len(members)):
        reached = progress.stage_size(policy, len(policy.stages) - 1, len(members))
        remarks.append(
            f"the last stage is meant for {reached} of {len(members)} devices: the others keep what they have"
        )
    returns_to: dict[str, int] = {}
    for m in members:
        version = m.previous.version if m.previous is not None else "none"
        returns_to[version] = returns_to.get(version, 0) + 1
    return Plan(
        strategy=policy.strategy,
        devices=len(members),
        first_install=first,
        strata=sizes,
        locked=dict(locked),
        returns_to=returns_to,
        hold_out=held,
        stages=stages,
        remarks=remarks,
    )


def _stages(policy: Policy, devices: int, held: int) -> list[PlannedStage]:
    shares = design.alpha_shares(len(policy.stages))
    planned: list[PlannedStage] = []
    running = 0
    for index, (own, watch) in enumerate(shares):
        wanted = min(progress.stage_size(policy, index, devices), devices - held)
        joining = max(0, wanted - running)
        running += joining
        controls = devices - running
        sizes = [(joining, joining + controls)]
        pooled = [(running, running + controls)]
        extremes = len(policy.metrics)
        can_halt = design.can_decide(sizes, alpha=policy.alpha * own, extremes=extremes) or (
            index > 0 and design.can_decide(pooled, alpha=policy.alpha * watch, extremes=extremes)
        )
        can_advance = joining > 0 and controls > 0 and design.can_decide(sizes, alpha=policy.alpha)
        planned.append(
            PlannedStage(
                stage=index + 1,
                joining=joining,
                running=running,
                controls=controls,
                can_halt=can_halt,
                can_advance=can_advance,
                needs="" if can_advance else _needs(joining, controls, policy.alpha),
                detectable=_detectable(joining, controls),
            )
        )
    return planned


def _needs(canaries: int, controls: int, alpha: float) -> str:
    more = design.canaries_needed(controls, alpha=alpha) if controls else None
    if more is not None and more > canaries:
        return f"at least {more} canaries beside {controls} controls"
    others = design.controls_needed(canaries, alpha=alpha)
    return "more devices" if others is None else f"at least {others} controls beside {canaries} canaries"


def _detectable(canaries: int, controls: int) -> float | None:
    """Two-sample approximation: (z_alpha + z_power) * sqrt(1 / canaries + 1 / controls)."""
    if not canaries or not controls:
        return None
    return round((Z_ALPHA + Z_POWER) * math.sqrt(1 / canaries + 1 / controls), 2)


def telling(newest: Sequence[VerdictRecord]) -> VerdictRecord | None:
    """Return the decision that says most of ``newest``: the watch's where it halts, else the gate's."""
    if not newest:
        return None
    last = newest[-1]
    if last.kind == "watch" and last.verdict != "halt":
        gate = [v for v in newest if v.kind == "gate" and v.t == last.t]
        return gate[-1] if gate else last
    return last


def why(
    record: RolloutRecord,
    members: Sequence[AssignmentRecord],
    device: DeviceRecord,
    verdict: VerdictRecord | None,
    now: int,
) -> Why:
    """Return the conditions between ``device`` and the version, those that fail first."""
    mine = next((m for m in members if m.device_id == device.id), None)
    if mine is None:
        reason = Reason(
            holds=False,
            condition="selected",
            detail="the device is not part of this rollout: it did not match, or has the version already",
            remedy="check its labels and `pithead devices show`",
        )
        return Why(device=device.id, state=None, arm=None, updated=False, reasons=[reason])
    reasons = [
        _alive(record),
        _online(device, now),
        _ready(mine),
        *_gathered(record, members, mine, now),
        _turn(record, members, mine),
        *_soaked(record, now),
        _decided(record, verdict),
    ]
    return Why(
        device=device.id,
        state=mine.state.value,
        arm=mine.arm.value,
        updated=mine.state is AssignmentState.CONFIRMED,
        reasons=sorted(reasons, key=lambda reason: reason.holds),
    )


def _alive(record: RolloutRecord) -> Reason:
    state = record.state
    remedies = {
        RolloutState.AWAITING_APPROVAL: "a second person approves: pithead rollouts approve",
        RolloutState.SCHEDULED: "wait for its start time",
        RolloutState.PAUSED: "pithead rollouts resume"
        if record.pause is Pause.OPERATOR
        else "pithead rollouts approve, or rollback",
    }
    detail = f"the rollout is {state.value}" + (f": {record.reason}" if record.reason else "")
    return Reason(
        holds=state in {RolloutState.RUNNING, RolloutState.SUCCEEDED},
        condition="rollout runs",
        detail=detail,
        remedy=remedies.get(state, ""),
    )


def _online(device: DeviceRecord, now: int) -> Reason:
    if device.last_seen is None:
        detail = "it was never heard of"
    else:
        detail = f"last heard of {max(0, now - device.last_seen) / MICROS:.0f} s ago"
    return Reason(
        holds=device.online, condition="device is online", detail=detail, remedy="check its power and network"
    )


def _ready(mine: AssignmentRecord) -> Reason:
    state = mine.state
    detail = f"the device is {state.value}"
    if mine.code:
        detail += f": {mine.code} {mine.detail}".rstrip()
    remedies = {
        AssignmentState.REFUSED: "mend the cause, then retry the failed devices",
        AssignmentState.ROLLED_BACK: "release a better version, or retry the failed devices",
        AssignmentState.UNREACHED: "it goes on when the device comes back",
        AssignmentState.PLANNED: "wait for the rollout to start",
    }
    fine = ON_NEW_VERSION | {AssignmentState.READY}
    return Reason(
        holds=state in fine,
        condition="version is ready on the device",
        detail=detail,
        remedy=remedies.get(state, "" if state in fine else "wait, or see the device's receipts"),
    )


def _gathered(
    record: RolloutRecord, members: Sequence[AssignmentRecord], mine: AssignmentRecord, now: int
) -> list[Reason]:
    """Return what must be before a stage is activated: this device in time, and enough of the others."""
    if record.state not in {RolloutState.RUNNING, RolloutState.PAUSED} or record.offered_at is None:
        return []
    found = []
    left = (record.offered_at - now) / MICROS + record.policy.deadline_s
    if mine.state in progress.PENDING or mine.state is AssignmentState.UNREACHED:
        found.append(
            Reason(
                holds=left > 0,
                condition="deadline",
                detail=f"it has {left:.0f} s left to be ready" if left > 0 else "it was not ready in time",
                remedy="see its receipts; it goes on when the device comes back",
            )
        )
    if record.ordered_at is None and record.policy.strategy == "canary":
        gap = progress.coverage_gap(
            tuple(progress.Member(m.device_id, m.stratum, m.state) for m in members),
            record.policy.min_coverage,
        )
        found.append(
            Reason(
                holds=gap is None or record.waived,
                condition="coverage",
                detail=gap or "enough devices of every stratum are ready",
                remedy="bring the others online, or approve without them after the deadline",
            )
        )
    return found


def _soaked(record: RolloutRecord, now: int) -> list[Reason]:
    if record.soak_from is None or record.state not in {RolloutState.RUNNING, RolloutState.PAUSED}:
        return []
    policy = record.policy
    soaked = max(0, int((now - record.soak_from) / MICROS / policy.bucket_s))
    return [
        Reason(
            holds=soaked >= policy.shortest_soak,
            condition="soak",
            detail=f"stage {record.stage + 1} has soaked {soaked} of at least {policy.shortest_soak} and at "
            f"most {policy.max_soak_buckets} buckets",
            remedy="wait",
        )
    ]


def _turn(record: RolloutRecord, members: Sequence[AssignmentRecord], mine: AssignmentRecord) -> Reason:
    if mine.state is AssignmentState.CONFIRMED and mine.arm is not Arm.CANARY:
        return Reason(holds=True, condition="its turn", detail="it got the version when the rollout closed")
    if mine.arm is Arm.CANARY:
        return Reason(holds=True, condition="its turn", detail=f"it joined in stage {(mine.stage or 0) + 1}")
    if mine.arm is Arm.HOLD_OUT:
        words = "it is in the hold-out, which keeps the old version until the rollout closes"
        return Reason(holds=False, condition="its turn", detail=words, remedy="wait for the end")
    if mine.previous is None:
        words = "it has no version to compare with, so it gets this one when the rollout closes"
        return Reason(holds=False, condition="its turn", detail=words, remedy="wait for the end")
    line = strata.order(record.id, {m.device_id: m.stratum for m in members})
    place = line.index(mine.device_id) + 1
    words = f"stage {record.stage + 1} of {record.stages} runs; it is number {place} of {len(line)} in line"
    return Reason(holds=False, condition="its turn", detail=words, remedy="wait for a later stage")


def _decided(record: RolloutRecord, verdict: VerdictRecord | None) -> Reason:
    if record.state is RolloutState.SUCCEEDED:
        return Reason(holds=True, condition="gate", detail="the last stage has passed")
    if verdict is None:
        return Reason(holds=False, condition="gate", detail="no look has been taken yet", remedy="wait")
    return Reason(
        holds=verdict.verdict == "advance",
        condition="gate",
        detail=f"{verdict.kind}: {verdict.verdict}: {verdict.reason}",
        remedy="" if verdict.verdict == "advance" else "pithead rollouts show, verdicts",
    )
