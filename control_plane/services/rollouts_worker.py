"""The rollout worker's use case: look at every open rollout, and bring it on.

Level-triggered: all that counts stands in the database, so a worker may
die at any moment, come late, or look twice.
"""

import hashlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec.structs import replace
from sqlmodel import Session

from contract.messages import Aftermath, AssignmentState
from control_plane.core import guardrails
from control_plane.core.assignment import ON_NEW_VERSION
from control_plane.core.gate import Evidence, Outcome, Verdict, assess, design, spending
from control_plane.core.policy import Policy
from control_plane.core.progress import MICROS, Arm, Happen, Member, Situation, Step, next_step
from control_plane.core.rollout import RolloutEvent, RolloutState
from control_plane.services import rollouts_decisions as decisions
from control_plane.services import rollouts_evidence as seen
from control_plane.services import rollouts_receipts as reports
from control_plane.services import rollouts_steps as steps
from control_plane.services.rollouts_decisions import Basis
from control_plane.services.rollouts_evidence import Due, Recent
from control_plane.store import rollouts as store
from control_plane.store import rollouts_seen as said
from control_plane.store.database import Database
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord, VerdictRecord

log = logging.getLogger(__name__)

MOST_STEPS: Final = 8
"""Steps of one rollout in one tick."""
_WATCHED: Final = frozenset({RolloutState.RUNNING, RolloutState.PAUSED})
_SERVING: Final = ON_NEW_VERSION | {AssignmentState.READY}


class Facts(msgspec.Struct, frozen=True):
    """What the summaries say at one moment."""

    recent: Mapping[str, Recent] = {}
    before_known: bool = False


class Progress:
    """Brings rollouts on. ``step`` is safe to call at any time and from anywhere."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._facts: dict[str, tuple[int, tuple[object, ...], Facts]] = {}

    def open_rollouts(self) -> list[str]:
        """Return the rollouts that may need a step."""
        with self._database.reading() as tx:
            return [*store.open_ids(tx), *store.unfinished_ids(tx)]

    def step(self, rollout_id: str, now: int) -> bool:
        """Bring one rollout on as far as it goes at ``now`` (microseconds UTC); return whether it changed."""
        changed = self._look(rollout_id, now)
        with self._database.reading() as tx:
            record = store.get(tx, rollout_id)
            facts = self._gather(tx, record, now)
            if not self._is_due(tx, record, facts, now):
                return changed
        with self._database.transaction() as tx:
            return self._advance(tx, rollout_id, facts, now) or changed

    def _is_due(self, tx: Session, record: RolloutRecord, facts: Facts, now: int) -> bool:
        if said.receipts_after(tx, record.model_name, record.receipts_to, limit=1):
            return True
        members = store.assignments(tx, record.id)
        if record.state is RolloutState.ROLLING_BACK:
            waiting = [m for m in members if m.returning]
            gone = store.gone(tx, [m.device_id for m in waiting])
            return bool(gone) or _is_back(record, waiting, now) or any(m.previous is None for m in waiting)
        return next_step(_basis(tx, record, members, facts, now).situation, now) is not None

    def _advance(self, tx: Session, rollout_id: str, facts: Facts, now: int) -> bool:
        record = store.get(tx, rollout_id)
        before = record
        members: Sequence[AssignmentRecord] = store.assignments(tx, rollout_id)
        receipts = said.receipts_after(tx, record.model_name, record.receipts_to)
        record, members = reports.take_receipts(tx, record, members, receipts, now)
        for _ in range(MOST_STEPS):
            if record.state is RolloutState.ROLLING_BACK:
                return self._come_back(tx, record, members, now) or record != before
            basis = _basis(tx, record, members, facts, now)
            step = next_step(basis.situation, now)
            if step is None:
                break
            _note(tx, record, basis, step)
            record = steps.execute(tx, record, step, now)
            members = store.assignments(tx, rollout_id)
            # What was seen was seen of the stage before.
            facts = Facts()
        return record != before

    def _come_back(
        self, tx: Session, record: RolloutRecord, members: Sequence[AssignmentRecord], now: int
    ) -> bool:
        waiting = []
        gone = store.gone(tx, [m.device_id for m in members if m.returning])
        for m in members:
            if m.device_id in gone:
                reports.give_up(tx, m, now)
            elif m.returning and m.previous is None and reports.removed(tx, m, record.model_name):
                store.put_assignments(tx, [reports.returned(m, Aftermath.ROLLED_BACK, now)])
            elif m.returning:
                waiting.append(m)
        if not _is_back(record, waiting, now):
            return False
        reason = record.reason
        if waiting:
            reason += f"; not heard of since: {', '.join(m.device_id for m in waiting)}"
        steps.happen(tx, record, RolloutEvent.ROLLBACK_COMPLETE, actor=steps.SYSTEM, reason=reason, now=now)
        return True

    def _gather(self, tx: Session, record: RolloutRecord, now: int) -> Facts:
        """Return what the summaries say, at most twice per bucket."""
        if record.state not in _WATCHED:
            self._facts.pop(record.id, None)
            return Facts()
        key = (record.state, record.stage, record.ordered_at, record.soak_from)
        at, of, facts = self._facts.get(record.id, (0, (), Facts()))
        if of == key and 0 <= now - at < record.policy.bucket_s * MICROS / 2:
            return facts
        facts = _facts(tx, record, store.assignments(tx, record.id), now)
        self._facts[record.id] = (now, key, facts)
        return facts

    def _look(self, rollout_id: str, now: int) -> bool:
        """Let the gate look when a look is due. The long calculation stands outside of any transaction."""
        with self._database.reading() as tx:
            record = store.get(tx, rollout_id)
            due = due_look(record, now)
            if due is None:
                return False
            members = store.assignments(tx, rollout_id)
            rows = seen.load(tx, record, members, *seen.spans(record, due), skew=said.worst_skew(tx))
        judged = [
            (kind, evidence, judge(evidence, record.policy, due.bucket))
            for kind, evidence in seen.comparisons(record, members, rows, due)
        ]
        with self._database.transaction() as tx:
            current = store.get(tx, rollout_id)
            if (current.stage, current.soak_from, current.watch_from, current.looked_at) != (
                record.stage,
                record.soak_from,
                record.watch_from,
                record.looked_at,
            ) or current.state not in _WATCHED:
                return False
            for kind, evidence, verdict in judged:
                _keep(tx, current, kind, evidence, verdict, due.period, now)
            start, _ = design.period(due.period, record.policy.max_soak_buckets)
            store.put(tx, replace(current, looked_at=start + due.bucket))
        return True


def due_look(record: RolloutRecord, now: int) -> Due | None:
    """Return the latest look that is due and was not taken, of the earliest period that has one.

    The watch never ends while the rollout is open: a pause, a change of
    stages and an operator who is late stop growth, and harm does not wait.
    """
    if record.state not in _WATCHED or record.watch_from is None or record.policy.strategy == "all_at_once":
        return None
    policy = record.policy
    by_now = seen.buckets_by(record, now)
    for period in itertools.count():
        start, length = design.period(period, policy.max_soak_buckets)
        if start > by_now:
            return None
        planned = spending.schedule(policy.first_look, policy.look_growth, length)
        due = [bucket for bucket in planned if record.looked_at < start + bucket <= by_now]
        if due:
            return Due(period, due[-1])
    return None


def judge(evidence: Evidence, policy: Policy, bucket: int) -> Verdict:
    """Return the gate's verdict at ``bucket``. Whatever goes wrong holds."""
    try:
        verdict = assess(evidence, policy)
    except (ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as error:
        log.exception("gate.failed")
        verdict = Verdict(verdict=Outcome.HOLD, reason=f"unreadable evidence: {error}", bucket=None)
    return replace(verdict, exhausted=bucket >= policy.max_soak_buckets)


def _keep(
    tx: Session,
    record: RolloutRecord,
    kind: str,
    evidence: Evidence,
    verdict: Verdict,
    period: int,
    now: int,
) -> None:
    numbers: dict[str, Any] = msgspec.to_builtins(verdict)
    numbers["look"] = numbers["looks"][-1] if verdict.looks else None
    numbers["looks"] = len(verdict.looks)
    numbers["canaries"] = sum(evidence.treated)
    numbers["controls"] = len(evidence.treated) - sum(evidence.treated)
    numbers["pre_buckets"] = evidence.pre
    numbers["period"] = period
    numbers["alpha"] = record.policy.alpha * evidence.alpha_share
    steps.note_verdict(
        tx,
        VerdictRecord(
            rollout_id=record.id,
            t=now,
            stage=record.watched_stage,
            kind=kind,
            verdict=verdict.verdict.value,
            bucket=verdict.bucket,
            reason=verdict.reason,
            numbers=numbers,
            evidence_sha256=_store(tx, record, seen.pack(evidence, record.policy)),
        ),
    )


def _store(tx: Session, record: RolloutRecord, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    store.put_evidence(tx, record.id, sha256, seen.compress(content))
    return sha256


def _note(tx: Session, record: RolloutRecord, basis: Basis, step: Step) -> None:
    """Keep a decision that no comparison took, with all that it rests on."""
    kind = decisions.kind(basis.situation, step) if isinstance(step, Happen) else None
    if kind is None or not isinstance(step, Happen):
        return
    steps.note_verdict(
        tx,
        VerdictRecord(
            rollout_id=record.id,
            t=basis.now,
            stage=record.stage,
            kind=kind,
            verdict=decisions.outcome(step).value,
            reason=step.reason,
            numbers=decisions.numbers(basis.situation),
            evidence_sha256=_store(tx, record, decisions.pack(basis)),
        ),
    )


def _basis(
    tx: Session, record: RolloutRecord, members: Sequence[AssignmentRecord], facts: Facts, now: int
) -> Basis:
    taken = decisions.acknowledged(store.of_people(tx, record.id))
    devices = tuple(_device_facts(record, m, facts.recent.get(m.device_id)) for m in members)
    verdict = None
    if record.watch_from is not None:
        stage = record.stage if record.soak_from is not None else None
        verdict = decisions.standing(store.standing(tx, record.id, record.watch_from), stage, taken)
    situation = Situation(
        rollout=steps.core(record),
        policy=record.policy,
        members=tuple(_member(record, m, facts.recent.get(m.device_id)) for m in members),
        pause=record.pause,
        start_at=record.start_at,
        offered_at=record.offered_at,
        ordered_at=record.ordered_at,
        soak_from=record.soak_from,
        waived=record.waived,
        before_known=facts.before_known,
        breach=guardrails.check(record.policy.guardrails, devices, taken.guardrails),
        verdict=verdict,
    )
    return Basis(now=now, situation=situation, devices=devices, acknowledged=taken.guardrails)


def _is_back(record: RolloutRecord, waiting: Sequence[AssignmentRecord], now: int) -> bool:
    return not waiting or now - record.changed_at >= record.policy.deadline_s * MICROS


def _member(record: RolloutRecord, m: AssignmentRecord, recent: Recent | None) -> Member:
    earlier = m.arm is Arm.CANARY and m.stage is not None and m.stage < record.stage
    return Member(
        device=m.device_id,
        stratum=m.stratum,
        state=m.state,
        arm=m.arm,
        stage=m.stage,
        has_previous=m.previous is not None,
        begun=earlier or (recent is not None and recent.begun),
    )


def _device_facts(
    record: RolloutRecord, m: AssignmentRecord, recent: Recent | None
) -> guardrails.DeviceFacts:
    treated = m.arm is Arm.CANARY
    watched = record.watch_from is not None and m.arm is not Arm.NONE and m.state in _SERVING
    return guardrails.DeviceFacts(
        device=m.device_id,
        state=m.state,
        treated=treated,
        code=m.code,
        aftermath=m.aftermath,
        silent=not recent.speaking if watched and recent is not None and recent.begun else None,
        windows=recent.windows if recent is not None else 0,
        errors=recent.errors if recent is not None else 0,
        restarts=recent.restarts if watched and recent is not None else 0,
    )


def _facts(tx: Session, record: RolloutRecord, members: Sequence[AssignmentRecord], now: int) -> Facts:
    policy = record.policy
    width = policy.bucket_s * MICROS
    skew = said.worst_skew(tx)
    if record.ordered_at is None and policy.strategy != "all_at_once":
        ready = [m for m in members if m.state is AssignmentState.READY and m.previous is not None]
        since = now - round(2 * (policy.min_pre_buckets + 1) * width)
        rows = seen.load(tx, record, ready, (since, None), skew=skew) if ready else None
        known = policy.min_pre_buckets == 0 or (rows is not None and seen.before_known(rows, ready, policy))
    else:
        known = True
    quiet = now - round((policy.silent_buckets + 1) * width + policy.delivery_s * MICROS)
    since = quiet if record.watch_from is not None or record.ordered_at is None else record.ordered_at
    compared = [m for m in members if m.arm is not Arm.NONE]
    rows = seen.load(tx, record, compared, (since, None), skew=skew)
    recent = seen.recent(tx, record, compared, rows, now)
    return Facts(recent=recent, before_known=known)
