"""Rollouts: make them, watch them, decide where they wait for a person."""

from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Depends, Query, Response
from pydantic import Field

from control_plane.api.auth import requires
from control_plane.api.pages import Limit, Page, View, Wanted, page
from control_plane.services.access import Principal
from control_plane.services.rollouts import NewRollout, RolloutDetail, Rollouts
from control_plane.store.rollouts import AssignmentRecord, RolloutRecord, Selection, VerdictRecord

TRACE_TYPE: Final = "application/jsonl"

Reader = Depends(requires("rollouts:read"))
Writer = Annotated[Principal, Depends(requires("rollouts:write"))]
Approver = Annotated[Principal, Depends(requires("rollouts:approve"))]


class RolloutWanted(Wanted):
    """What to roll out, to whom, and how. Without `group`, `labels` and `devices` it is meant for all."""

    model: str = Field(max_length=64)
    version: str = Field(max_length=64)
    policy: dict[str, Any] = Field(
        default_factory=dict, description="See docs/rollouts.md; an unknown key is refused."
    )
    group: str | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    devices: list[str] = Field(default_factory=list, max_length=100_000)
    start_at: int | None = Field(None, ge=0, description="Microseconds UTC; at once when null.")


class Decision(Wanted):
    """Why a person does something."""

    reason: str = Field("", max_length=1000)


class AssignmentView(View):
    """One device in the rollout. Times are microseconds UTC."""

    device: str
    stratum: str
    state: str
    arm: str = Field(description="`none`, `canary`, `control` or `hold_out`")
    stage: int | None = Field(description="In which stage it got the version, from 1.")
    activation: int
    attempt: int
    previous_version: str | None = Field(description="What a rollback brings back.")
    code: str | None
    detail: str
    aftermath: str | None = Field(description="Whether it still runs its last known good after a failure.")
    returning: bool = Field(description="It was told to go back and has not said that it did.")
    changed_at: int


class VerdictView(View):
    """One decision with its numbers."""

    id: int
    t: int
    stage: int = Field(description="From 1.")
    kind: str = Field(
        description="`gate`, `watch` (over earlier stages and after the longest soak), `guardrail`, `count`, "
        "`coverage`, `soak` or `person`"
    )
    verdict: str = Field(description="`advance`, `hold` or `halt`")
    bucket: int | None = Field(description="When it was decided, in buckets from the activation.")
    reason: str
    numbers: dict[str, Any]
    evidence_sha256: str | None = Field(description="Kept evidence; see `/verdicts/{id}/trace`.")


class RolloutView(View):
    """A rollout. Times are microseconds UTC."""

    id: str
    model: str
    version: str
    state: str
    stage: int = Field(description="From 1.")
    stages: int
    strategy: str
    pause: str = Field(description="Why it is paused: `not`, `operator`, `held`, `coverage` or `halted`")
    reason: str
    created_at: int
    created_by: str
    changed_at: int
    start_at: int | None
    offered_at: int | None
    activated_at: int | None
    soak_from: int | None
    soaked_buckets: int
    max_soak_buckets: int
    devices: int
    states: dict[str, int] = Field(description="Devices by state.")
    arms: dict[str, int]
    returns_to: dict[str, int] = Field(
        description="Devices by the version that a rollback brings back; `none` where there was none."
    )
    failures: list[AssignmentView]
    verdict: VerdictView | None = Field(description="The newest decision that says most.")
    selection: dict[str, Any]
    policy: dict[str, Any]


def router(rollouts: Rollouts) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/v1/rollouts", tags=["rollouts"])
    _reading(routes, rollouts)
    _deciding(routes, rollouts)
    return routes


def _reading(routes: APIRouter, rollouts: Rollouts) -> None:
    @routes.get("", summary="List rollouts, the newest first", dependencies=[Reader])
    def list_rollouts(
        model: str | None = None, state: str | None = None, cursor: str | None = None, limit: Limit = 50
    ) -> Page[RolloutView]:
        found = rollouts.page(model=model, state=state, before=cursor, limit=limit)
        return page([_view(detail) for detail in found], limit, lambda view: view.id)

    @routes.get("/{rollout_id}", summary="Show a rollout and how far it is", dependencies=[Reader])
    def show(rollout_id: str) -> RolloutView:
        return _view(rollouts.detail(rollout_id))

    @routes.get("/{rollout_id}/assignments", summary="Show its devices", dependencies=[Reader])
    def assignments(rollout_id: str) -> list[AssignmentView]:
        return [_assignment(record) for record in rollouts.assignments(rollout_id)]

    @routes.get(
        "/{rollout_id}/verdicts", summary="Show every decision with its numbers", dependencies=[Reader]
    )
    def verdicts(rollout_id: str) -> list[VerdictView]:
        return [_verdict(record) for record in rollouts.verdicts(rollout_id)]

    @routes.get(
        "/{rollout_id}/verdicts/{verdict_id}/trace",
        summary="Get what a decision was based on: a trace for `pithead rollouts replay`, or JSON",
        dependencies=[Reader],
        response_class=Response,
        responses={200: {"content": {TRACE_TYPE: {}}}},
    )
    def trace(rollout_id: str, verdict_id: int) -> Response:
        return Response(rollouts.trace(rollout_id, verdict_id), media_type=TRACE_TYPE)

    @routes.get(
        "/{rollout_id}/why",
        summary="Say what keeps a device from its update, and what would change it",
        dependencies=[Reader],
    )
    def why(rollout_id: str, device: Annotated[str, Query(max_length=64)]) -> dict[str, Any]:
        return _plain(rollouts.why(rollout_id, device))


def _deciding(routes: APIRouter, rollouts: Rollouts) -> None:
    @routes.post("", summary="Make a rollout", status_code=201)
    def create(wanted: RolloutWanted, principal: Writer) -> RolloutView:
        made = rollouts.create(actor=principal.name, new=_new(wanted))
        return _view(rollouts.detail(made.id))

    @routes.post(
        "/plan",
        summary="Say what a rollout would do and what its gate could find, without making it",
        dependencies=[Reader],
    )
    def plan(wanted: RolloutWanted) -> dict[str, Any]:
        return _plain(rollouts.plan(_new(wanted)))

    @routes.post(
        "/{rollout_id}/approve", summary="Let it start, or go on where it waits; acknowledges a halt"
    )
    def approve(rollout_id: str, principal: Approver, decision: Decision | None = None) -> RolloutView:
        rollouts.approve(actor=principal.name, rollout_id=rollout_id, reason=_reason(decision))
        return _view(rollouts.detail(rollout_id))

    @routes.post("/{rollout_id}/skip", summary="End the present stage as if the gate had advanced it")
    def skip(rollout_id: str, principal: Approver, decision: Decision | None = None) -> RolloutView:
        rollouts.skip(actor=principal.name, rollout_id=rollout_id, reason=_reason(decision))
        return _view(rollouts.detail(rollout_id))

    @routes.post("/{rollout_id}/pause", summary="Stop growth; guardrails and gate go on watching")
    def pause(rollout_id: str, principal: Writer, decision: Decision | None = None) -> RolloutView:
        rollouts.pause(actor=principal.name, rollout_id=rollout_id, reason=_reason(decision))
        return _view(rollouts.detail(rollout_id))

    @routes.post("/{rollout_id}/resume", summary="Go on after a pause that an operator ordered")
    def resume(rollout_id: str, principal: Writer, decision: Decision | None = None) -> RolloutView:
        rollouts.resume(actor=principal.name, rollout_id=rollout_id, reason=_reason(decision))
        return _view(rollouts.detail(rollout_id))

    @routes.post("/{rollout_id}/rollback", summary="Bring every device back to the version that it had")
    def rollback(rollout_id: str, principal: Writer, decision: Decision | None = None) -> RolloutView:
        rollouts.rollback(actor=principal.name, rollout_id=rollout_id, reason=_reason(decision))
        return _view(rollouts.detail(rollout_id))

    @routes.post(
        "/{rollout_id}/abort",
        summary="End it where it stands: what has not begun is withdrawn, what serves stays; "
        "one that goes back waits no longer for devices that are not heard of",
    )
    def abort(rollout_id: str, principal: Writer, decision: Decision | None = None) -> RolloutView:
        rollouts.abort(actor=principal.name, rollout_id=rollout_id, reason=_reason(decision))
        return _view(rollouts.detail(rollout_id))

    @routes.post(
        "/{rollout_id}/retry", summary="Offer it once more to devices that failed or were not reached"
    )
    def retry(rollout_id: str, principal: Writer) -> RolloutView:
        rollouts.retry(actor=principal.name, rollout_id=rollout_id)
        return _view(rollouts.detail(rollout_id))


def _new(wanted: RolloutWanted) -> NewRollout:
    return NewRollout(
        model_name=wanted.model,
        version=wanted.version,
        policy=wanted.policy,
        selection=Selection(group=wanted.group, labels=wanted.labels, devices=tuple(wanted.devices)),
        start_at=wanted.start_at,
    )


def _reason(decision: Decision | None) -> str:
    return decision.reason if decision is not None else ""


def _view(detail: RolloutDetail) -> RolloutView:
    record: RolloutRecord = detail.rollout
    return RolloutView(
        id=record.id,
        model=record.model_name,
        version=record.version,
        state=record.state.value,
        stage=record.stage + 1,
        stages=record.stages,
        strategy=record.policy.strategy,
        pause=record.pause.value,
        reason=record.reason,
        created_at=record.created_at,
        created_by=record.created_by,
        changed_at=record.changed_at,
        start_at=record.start_at,
        offered_at=record.offered_at,
        activated_at=record.ordered_at,
        soak_from=record.soak_from,
        soaked_buckets=detail.soaked_buckets,
        max_soak_buckets=record.policy.max_soak_buckets,
        devices=sum(detail.states.values()),
        states=detail.states,
        arms=detail.arms,
        returns_to=detail.returns_to,
        failures=[_assignment(failure) for failure in detail.failures],
        verdict=_verdict(detail.verdict) if detail.verdict is not None else None,
        selection=msgspec.to_builtins(record.selection),
        policy=msgspec.to_builtins(record.policy),
    )


def _assignment(record: AssignmentRecord) -> AssignmentView:
    return AssignmentView(
        device=record.device_id,
        stratum=record.stratum,
        state=record.state.value,
        arm=record.arm.value,
        stage=record.stage + 1 if record.stage is not None else None,
        activation=record.activation,
        attempt=record.attempt,
        previous_version=record.previous.version if record.previous is not None else None,
        code=record.code,
        detail=record.detail,
        aftermath=record.aftermath.value if record.aftermath is not None else None,
        returning=record.returning,
        changed_at=record.changed_at,
    )


def _verdict(record: VerdictRecord) -> VerdictView:
    return VerdictView(
        id=record.id,
        t=record.t,
        stage=record.stage + 1,
        kind=record.kind,
        verdict=record.verdict,
        bucket=record.bucket,
        reason=record.reason,
        numbers=record.numbers,
        evidence_sha256=record.evidence_sha256,
    )


def _plain(value: object) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(value)
    return fields
