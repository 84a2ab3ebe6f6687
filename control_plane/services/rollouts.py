"""What operators do with rollouts, and what they may ask."""

from collections.abc import Callable, Mapping

import msgspec
from msgspec.structs import replace
from sqlmodel import Session

from contract.errors import PitheadError
from contract.messages import Aftermath, AssignmentState
from control_plane.core.assignment import FAILED, AssignmentEvent, follow
from control_plane.core.gate import Outcome, Verdict, assess, trace
from control_plane.core.policy import parse, require_live
from control_plane.core.progress import Arm, Pause
from control_plane.core.rollout import RolloutEvent, RolloutState
from control_plane.ports import Clock
from control_plane.services import events, rollouts_evidence
from control_plane.services import rollouts_decisions as decisions
from control_plane.services import rollouts_members as choice
from control_plane.services import rollouts_plan as planning
from control_plane.services import rollouts_steps as steps
from control_plane.store import devices as device_store
from control_plane.store import rollouts as store
from control_plane.store import rollouts_seen as said
from control_plane.store.database import Database
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
    """The newest decision that says most."""
    soaked_buckets: int
    returns_to: dict[str, int]
    """Devices by the version that a rollback brings back; ``none`` where there was none."""


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
            assignment = choice.released(tx, new.model_name, new.version)
            chosen = choice.select(tx, new.selection)
            members = choice.members(tx, assignment, chosen)
            if not members:
                raise PitheadError(
                    "rollout.no_devices",
                    f"{len(chosen)} devices match, and none of them needs {new.model_name} {new.version}",
                )
            devices = [m.device_id for m in members]
            choice.check_lock(tx, new.model_name, devices)
            choice.check_strategy(policy, members)
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
                receipts_to=said.newest_receipt(tx),
            )
            store.put(tx, record)
            store.put_assignments(tx, [replace(m, rollout_id=rollout_id, changed_at=now) for m in members])
            event = RolloutEvent.APPROVAL_ASKED if policy.approval else RolloutEvent.SUBMITTED
            return steps.happen(tx, record, event, actor=actor, reason=f"{len(members)} devices", now=now)

    def approve(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """Let a rollout start, or go on where it waits for a person.

        After a halt it goes on in its stage: what was shown is acknowledged,
        and no more. Where the policy asks for approval, no approval comes
        from the rollout's author.
        """
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            _second_person(record, actor)
            if record.state is RolloutState.AWAITING_APPROVAL:
                return self._happen(tx, record, RolloutEvent.APPROVED, actor, reason or "approved")
            if record.state is not RolloutState.PAUSED or record.pause in {Pause.NOT, Pause.OPERATOR}:
                raise PitheadError(
                    "rollout.illegal_transition",
                    f"nothing waits for an approval in state {record.state.value}; see also resume and skip",
                    state=record.state.value,
                )
            if record.pause is Pause.HALTED:
                return self._acknowledge(tx, record, actor, reason)
            if record.pause is Pause.COVERAGE and record.policy.strategy != "all_at_once":
                waived = replace(record, waived=True)
                return self._happen(tx, waived, RolloutEvent.RESUMED, actor, reason or "coverage waived")
            return self._pass_stage(tx, record, actor, reason or "approved by a person")

    def skip(self, *, actor: str, rollout_id: str, reason: str = "") -> RolloutRecord:
        """End the present stage as if the gate had advanced it; its canaries must serve the version."""
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            _second_person(record, actor)
            if record.pause is Pause.HALTED:
                raise PitheadError(
                    "rollout.illegal_transition",
                    f"it was halted: {record.reason}. Approve that first, or roll it back",
                    state=record.state.value,
                    pause=record.pause.value,
                )
            return self._pass_stage(tx, record, actor, reason or "stage skipped by a person")

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
        """End the rollout where it stands: what has not begun is withdrawn, what serves stays.

        One that goes back ends without the devices that are not heard of;
        they go back when they come.
        """
        with self._database.transaction() as tx:
            record = store.get(tx, rollout_id)
            words = reason or "aborted"
            if record.state is RolloutState.ROLLING_BACK:
                waiting = [m.device_id for m in store.assignments(tx, rollout_id) if m.returning]
                words = f"{record.reason}; {words}; not heard of since: {', '.join(waiting)}"
            return self._happen(tx, record, RolloutEvent.ABORT_ORDERED, actor, words)

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
        """Return what a verdict was based on.

        That of a comparison is a trace that ``pithead rollouts replay`` reads,
        that of any other decision one line of JSON.
        """
        with self._database.reading() as tx:
            return _kept(tx, rollout_id, verdict_id)[1]

    def replay(self, rollout_id: str, verdict_id: int) -> Verdict:
        """Make a decision again from what was kept of it."""
        with self._database.reading() as tx:
            policy = store.get(tx, rollout_id).policy
            kind, content = _kept(tx, rollout_id, verdict_id)
        if kind not in decisions.COMPARISONS:
            return decisions.again(content)
        return assess(trace.read(content.decode().splitlines()).evidence, policy)

    def why(self, rollout_id: str, device_id: str) -> planning.Why:
        """Return everything that keeps a device from its update, and what would change it."""
        now = self._clock()
        with self._database.reading() as tx:
            record = store.get(tx, rollout_id)
            members = store.assignments(tx, rollout_id)
            device = device_store.device(tx, device_id)
            newest = store.verdicts(tx, rollout_id, newest_only=planning.TELLING)
        return planning.why(record, members, device, planning.telling(newest), now)

    def plan(self, new: NewRollout) -> planning.Plan:
        """Return what ``create`` would do, and what the gate could find with these devices."""
        policy = parse(new.policy)
        require_live(policy)
        with self._database.reading() as tx:
            assignment = choice.released(tx, new.model_name, new.version)
            members = choice.members(tx, assignment, choice.select(tx, new.selection))
            locked = store.locked(tx, new.model_name, [m.device_id for m in members])
        return planning.plan(policy, members, locked)

    def _acknowledge(self, tx: Session, record: RolloutRecord, actor: str, reason: str) -> RolloutRecord:
        """Let a halted rollout go on in its stage; whatever else is shown halts it again."""
        seen = decisions.to_acknowledge(store.halts(tx, record.id))
        words = reason or "acknowledged by a person"
        verdict = VerdictRecord(
            rollout_id=record.id,
            t=self._clock(),
            stage=record.stage,
            kind="person",
            verdict=Outcome.HOLD.value,
            reason=f"{words}: {record.reason}",
            numbers={"actor": actor, "acknowledged": msgspec.to_builtins(seen, order="deterministic")},
        )
        store.add_verdict(tx, verdict)
        return self._happen(tx, record, RolloutEvent.RESUMED, actor, words)

    def _pass_stage(self, tx: Session, record: RolloutRecord, actor: str, reason: str) -> RolloutRecord:
        running = record.state in {RolloutState.RUNNING, RolloutState.PAUSED}
        if running and not any(_serves(record, m) for m in store.assignments(tx, record.id)):
            raise PitheadError(
                "rollout.illegal_transition",
                f"no canary of stage {record.stage + 1} serves the version, so there is nothing to go by; "
                "wait, retry those that failed, or roll back",
                state=record.state.value,
            )
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


def _detail(tx: Session, record: RolloutRecord, now: int) -> RolloutDetail:
    members = store.assignments(tx, record.id)
    states: dict[str, int] = {}
    arms: dict[str, int] = {}
    for m in members:
        states[m.state.value] = states.get(m.state.value, 0) + 1
        arms[m.arm.value] = arms.get(m.arm.value, 0) + 1
    returns_to: dict[str, int] = {}
    for m in members:
        version = m.previous.version if m.previous is not None else "none"
        returns_to[version] = returns_to.get(version, 0) + 1
    newest = store.verdicts(tx, record.id, newest_only=planning.TELLING)
    return RolloutDetail(
        rollout=record,
        states=states,
        arms=arms,
        failures=[m for m in members if m.state in FAILED or m.state is AssignmentState.UNREACHED],
        verdict=planning.telling(newest),
        soaked_buckets=rollouts_evidence.buckets_by(record, now) if record.soak_from is not None else 0,
        returns_to=returns_to,
    )


def _second_person(record: RolloutRecord, actor: str) -> None:
    if record.policy.approval and record.created_by == actor:
        raise PitheadError("auth.forbidden", f"{actor} made this rollout; a second person must approve it")


def _serves(record: RolloutRecord, m: AssignmentRecord) -> bool:
    mine = m.arm is Arm.CANARY and m.stage == record.stage
    return mine and m.state in {AssignmentState.SOAKING, AssignmentState.CONFIRMED}


def _kept(tx: Session, rollout_id: str, verdict_id: int) -> tuple[str, bytes]:
    for verdict in store.verdicts(tx, rollout_id):
        if verdict.id == verdict_id and verdict.evidence_sha256 is not None:
            kept = store.evidence(tx, rollout_id, verdict.evidence_sha256)
            return verdict.kind, rollouts_evidence.decompress(kept)
    raise PitheadError("request.not_found", f"rollout {rollout_id} has no verdict {verdict_id} with evidence")
