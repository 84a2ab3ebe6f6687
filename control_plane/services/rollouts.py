"""What operators do with rollouts, and what they may ask."""

from collections.abc import Callable, Mapping, Sequence

import msgspec
from msgspec.structs import replace
from sqlmodel import Session

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, target_path
from contract.messages import Aftermath, AssignmentState, ModelAssignment, Role
from control_plane.core import orders, strata
from control_plane.core.assignment import FAILED, AssignmentEvent, follow
from control_plane.core.gate import Verdict, assess, trace
from control_plane.core.policy import Policy, parse, require_live
from control_plane.core.progress import Arm, Pause
from control_plane.core.rollout import RolloutEvent, RolloutState
from control_plane.ports import Clock
from control_plane.services import desired, events, rollouts_evidence
from control_plane.services import rollouts_plan as planning
from control_plane.services import rollouts_steps as steps
from control_plane.store import devices as device_store
from control_plane.store import registry
from control_plane.store import rollouts as store
from control_plane.store.database import Database
from control_plane.store.devices import DeviceRecord
from control_plane.store.ids import new_id
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord, Selection, VerdictRecord


class NewRollout(msgspec.Struct, frozen=True):
    """What an operator asks for. ``start_at`` in microseconds UTC; None starts at once."""

    model_name: str
    version: str
    policy: Mapping[str, object]
    selection: Selection = Selection()
    start_at: int | None = None


class RolloutDetail(msgspec.Struct, frozen=True):
    """A rollout with how far its devices are."""

    rollout: RolloutRecord
    states: dict[str, int]
    """Devices by state."""
    arms: dict[str, int]
    failures: list[AssignmentRecord]
    verdict: VerdictRecord | None
    """The newest decision."""
    soaked_buckets: int


class Rollouts:
    """Use cases on rollouts. Each raises ``rollout.illegal_transition`` when it is not the time for it."""

    def __init__(self, database: Database, clock: Clock, make_id: Callable[[], str] = new_id) -> None:
        self._database = database
        self._clock = clock
        self._make_id = make_id

    def create(self, *, actor: str, new: NewRollout) -> RolloutRecord:
        """Make a rollout; it waits for approval where the policy says so, else for its time.

        Raises ``rollout.policy_invalid``, ``rollout.no_devices``,
        ``rollout.overlap`` and ``request.not_found``.
        """
        policy = parse(new.policy)
        require_live(policy)
        now = self._clock()
        with self._database.transaction() as tx:
            assignment = _released(tx, new.model_name, new.version)
            chosen = _select(tx, new.selection)
            members = _members(tx, assignment, chosen)
            if not members:
                raise PitheadError(
                    "rollout.no_devices",
                    f"{len(chosen)} devices match, and none of them needs {new.model_name} {new.version}",
                )
            devices = [m.device_id for m in members]
            _check_lock(tx, new.model_name, devices)
            _check_strategy(policy, members)
            store.supersede(tx, new.model_name, devices, now)
            rollout_id = self._make_id()
            record = RolloutRecord(
                id=rollout_id,
                model_name=new.model_name,
                version=new.version,
                assignment=replace(assignment, rollout=rollout_id),
                selection=new.selection,
                policy=policy,
                state=RolloutState.DRAFT,
                stages=1 if policy.strategy == "all_at_once" else len(policy.stages),
                created_at=now,
                created_by=actor,
                changed_at=now,
                start_at=new.start_at,
                receipts_to=store.newest_receipt(tx),
            )
            store.put(tx, record)
            store.put_assignments(tx, [replace(m, rollout_id=rollout_id, changed_at=now) for m in members])
            event = RolloutEvent.APPROVAL_ASKED if policy.approval else RolloutEvent.SUBMITTED
            return steps.happen(tx, record, event, actor=actor, reason=f"{len(members)} devices", now=now)

    def approve(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """Let a rollout start, or go on where it waits for a person.

        The first approval must come from somebody else than its author.
        """
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            if record.state is RolloutState.AWAITING_APPROVAL and record.created_by == actor:
                raise PitheadError(
                    "auth.forbidden", f"{actor} made this rollout; a second person must approve it"
                )
            if record.state is RolloutState.AWAITING_APPROVAL:
                return self._happen(tx, record, RolloutEvent.APPROVED, actor, reason or "approved")
            if record.state is not RolloutState.PAUSED or record.pause in {Pause.NOT, Pause.OPERATOR}:
                raise PitheadError(
                    "rollout.illegal_transition",
                    f"nothing waits for an approval in state {record.state.value}; see also resume and skip",
                    state=record.state.value,
                )
            if record.pause is Pause.COVERAGE and record.policy.strategy != "all_at_once":
                waived = replace(record, waived=True)
                return self._happen(tx, waived, RolloutEvent.RESUMED, actor, reason or "coverage waived")
            return self._pass_stage(tx, record, actor, reason or "approved by a person")

    def skip(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """End the present stage as if the gate had advanced it."""
        with self._database.transaction() as tx:
            return self._pass_stage(
                tx, store.get(tx, rollout_id), actor, reason or "stage skipped by a person"
            )

    def pause(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """Stop growth; guardrails and gate go on watching."""
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            words = reason or "paused by a person"
            return self._happen(tx, record, RolloutEvent.PAUSE_ORDERED, actor, words, pause=Pause.OPERATOR)

    def resume(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """Go on after a pause that an operator ordered."""
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            if record.state is RolloutState.PAUSED and record.pause is not Pause.OPERATOR:
                raise PitheadError(
                    "rollout.illegal_transition",
                    f"it was not paused by an operator but waits for a decision: {record.reason}. "
                    "Approve it or roll it back",
                    state=record.state.value,
                    pause=record.pause.value,
                )
            return self._happen(tx, record, RolloutEvent.RESUMED, actor, reason or "resumed")

    def rollback(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """Bring every device back to the version that it had."""
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            words = reason or "rolled back by a person"
            return self._happen(tx, record, RolloutEvent.ROLLBACK_ORDERED, actor, words)

    def abort(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """End the rollout where it stands: what has not begun is withdrawn, what serves stays."""
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            return self._happen(tx, record, RolloutEvent.ABORT_ORDERED, actor, reason or "aborted")

    def retry(self, *, actor: str, rollout_id: str) -> RolloutRecord:
        """Offer the version once more to the devices that refused it, rolled back or were not reached."""
        now = self._clock()
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            if record.state not in {RolloutState.RUNNING, RolloutState.PAUSED}:
                raise PitheadError(
                    "rollout.illegal_transition",
                    f"retry is not possible in state {record.state.value}",
                    state=record.state.value,
                )
            failed = [
                m
                for m in store.assignments(tx, rollout_id)
                if m.state in {*FAILED, AssignmentState.UNREACHED}
                and m.aftermath is not Aftermath.UNABLE_TO_ROLL_BACK
            ]
            for m in failed:
                if m.arm is Arm.CANARY:
                    steps.put_back(tx, record, m, again=False, now=now)
            again = [
                replace(
                    m,
                    state=follow(m.state, AssignmentEvent.RETRIED),
                    attempt=m.attempt + 1,
                    arm=Arm.NONE,
                    stage=None,
                    changed_at=now,
                )
                for m in failed
            ]
            store.put_assignments(tx, again)
            facts = {"devices": [m.device_id for m in again]}
            events.record(tx, actor=actor, kind="rollout.retried", subject=rollout_id, facts=facts, t=now)
            return record

    def detail(self, rollout_id: str) -> RolloutDetail:
        """Return a rollout with how far it is."""
        with self._database.reading() as tx:
            return _detail(tx, store.get(tx, rollout_id), self._clock())

    def page(
        self,
        *,
        model: str | None = None,
        state: str | None = None,
        before: str | None = None,
        limit: int = 50,
    ) -> list[RolloutDetail]:
        """Return rollouts, the newest first."""
        now = self._clock()
        with self._database.reading() as tx:
            found = store.newest(tx, model=model, state=state, before=before, limit=limit)
            return [_detail(tx, record, now) for record in found]

    def assignments(self, rollout_id: str) -> list[AssignmentRecord]:
        """Return a rollout's devices, by id."""
        with self._database.reading() as tx:
            store.get(tx, rollout_id)
            return store.assignments(tx, rollout_id)

    def verdicts(self, rollout_id: str) -> list[VerdictRecord]:
        """Return all decisions in their order."""
        with self._database.reading() as tx:
            store.get(tx, rollout_id)
            return store.verdicts(tx, rollout_id)

    def trace(self, rollout_id: str, verdict_id: int) -> bytes:
        """Return what a verdict was based on, as a trace that ``pithead rollouts replay`` reads."""
        with self._database.reading() as tx:
            return _trace(tx, rollout_id, verdict_id)

    def replay(self, rollout_id: str, verdict_id: int) -> Verdict:
        """Make a decision of the gate again from what was kept of it."""
        with self._database.reading() as tx:
            policy = store.get(tx, rollout_id).policy
            lines = _trace(tx, rollout_id, verdict_id).decode().splitlines()
        return assess(trace.read(lines).evidence, policy)

    def why(self, rollout_id: str, device_id: str) -> planning.Why:
        """Return everything that keeps a device from its update, and what would change it."""
        now = self._clock()
        with self._database.reading() as tx:
            record = store.get(tx, rollout_id)
            members = store.assignments(tx, rollout_id)
            device = device_store.device(tx, device_id)
            newest = store.verdicts(tx, rollout_id, newest_only=1)
        return planning.why(record, members, device, newest[0] if newest else None, now)

    def plan(self, new: NewRollout) -> planning.Plan:
        """Return what ``create`` would do, and what the gate could find with these devices."""
        policy = parse(new.policy)
        require_live(policy)
        with self._database.reading() as tx:
            assignment = _released(tx, new.model_name, new.version)
            members = _members(tx, assignment, _select(tx, new.selection))
            locked = store.locked(tx, new.model_name, [m.device_id for m in members])
        return planning.plan(policy, members, locked)

    def _pass_stage(self, tx: Session, record: RolloutRecord, actor: str, reason: str) -> RolloutRecord:
        last = record.stage + 1 >= record.stages
        event = RolloutEvent.LAST_STAGE_PASSED if last else RolloutEvent.STAGE_PASSED
        after = self._happen(tx, record, event, actor, reason)
        verdict = VerdictRecord(
            rollout_id=record.id,
            t=self._clock(),
            stage=record.stage,
            kind="person",
            verdict="advance",
            reason=reason,
            numbers={"actor": actor},
        )
        store.add_verdict(tx, verdict)
        return after

    def _happen(
        self,
        tx: Session,
        record: RolloutRecord,
        event: RolloutEvent,
        actor: str,
        reason: str,
        pause: Pause = Pause.NOT,
    ) -> RolloutRecord:
        return steps.happen(tx, record, event, actor=actor, reason=reason, now=self._clock(), pause=pause)


def _released(tx: Session, model_name: str, version: str) -> ModelAssignment:
    found = registry.version(tx, model_name, version)
    if found is None:
        raise PitheadError("request.not_found", f"{model_name} {version} is not released")
    return ModelAssignment(
        model_name=model_name,
        version=version,
        role=Role.ACTIVE,
        manifest_path=target_path(model_name, version, MANIFEST_NAME),
        manifest_sha256=found.manifest_sha256,
        manifest_length=found.manifest_length,
        release_counter=found.release_counter,
    )


def _select(tx: Session, selection: Selection) -> list[DeviceRecord]:
    labels = dict(selection.labels)
    if selection.group is not None:
        labels |= device_store.group(tx, selection.group).selector
    found = device_store.devices(tx, labels=labels, state="active")
    if not selection.devices:
        return found
    known = {device.id for device in found}
    unknown = sorted(set(selection.devices) - known)
    if unknown:
        raise PitheadError("rollout.no_devices", f"no active device {', '.join(unknown)}", devices=unknown)
    return [device for device in found if device.id in selection.devices]


def _members(
    tx: Session, assignment: ModelAssignment, devices: Sequence[DeviceRecord]
) -> list[AssignmentRecord]:
    """Return the devices that do not have the version yet, with their strata."""
    site = strata.merge_small({device.id: _stratum(device) for device in devices})
    members = []
    for device in devices:
        active = orders.active(desired.read(tx, device.id), assignment.model_name)
        if active is not None and active.manifest_sha256 == assignment.manifest_sha256:
            continue
        members.append(
            AssignmentRecord(
                rollout_id="",
                device_id=device.id,
                stratum=site[device.id],
                state=AssignmentState.PLANNED,
                changed_at=0,
                previous=active,
            )
        )
    return members


def _stratum(device: DeviceRecord) -> str:
    accelerators = "+".join(sorted(device.accelerators))
    return f"{device.hardware}/{accelerators}/{device.labels.get('site', '-')}"


def _check_lock(tx: Session, model_name: str, devices: Sequence[str]) -> None:
    locked = store.locked(tx, model_name, devices)
    if locked:
        device, other = min(locked.items())
        raise PitheadError(
            "rollout.overlap",
            f"{len(locked)} devices, for example {device}, are in rollout {other}",
            rollout=other,
            devices=sorted(locked)[:20],
        )


def _check_strategy(policy: Policy, members: Sequence[AssignmentRecord]) -> None:
    if policy.strategy == "canary" and all(m.previous is None for m in members):
        raise PitheadError(
            "rollout.policy_invalid",
            "none of the devices has a version of this model, so there is nothing to compare with: use "
            '`strategy = "all_at_once"` for a first install (guardrails and confirmations only)',
        )


def _detail(tx: Session, record: RolloutRecord, now: int) -> RolloutDetail:
    members = store.assignments(tx, record.id)
    states: dict[str, int] = {}
    arms: dict[str, int] = {}
    for m in members:
        states[m.state.value] = states.get(m.state.value, 0) + 1
        arms[m.arm.value] = arms.get(m.arm.value, 0) + 1
    newest = store.verdicts(tx, record.id, newest_only=1)
    return RolloutDetail(
        rollout=record,
        states=states,
        arms=arms,
        failures=[m for m in members if m.state in FAILED or m.state is AssignmentState.UNREACHED],
        verdict=newest[0] if newest else None,
        soaked_buckets=rollouts_evidence.buckets_by(record, now),
    )


def _trace(tx: Session, rollout_id: str, verdict_id: int) -> bytes:
    for verdict in store.verdicts(tx, rollout_id):
        if verdict.id == verdict_id and verdict.evidence_sha256 is not None:
            return rollouts_evidence.decompress(store.evidence(tx, rollout_id, verdict.evidence_sha256))
    raise PitheadError("request.not_found", f"rollout {rollout_id} has no verdict {verdict_id} with evidence")
