"""What devices sent: receipts, anomalies, health, summaries, and what was refused."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from control_plane.api.auth import requires
from control_plane.api.pages import Limit, Page, RowCursor, View, page
from control_plane.services.telemetry import Telemetry
from control_plane.store.telemetry import Window


class ReceiptView(View):
    """One step of a device towards one version."""

    id: int
    device_id: str
    t_wall: int = Field(description="By the device's clock, microseconds UTC.")
    t_received: int
    model_name: str
    version: str
    state: str
    activation: int
    attempt: int
    rollout: str | None
    code: str | None
    detail: str
    aftermath: str | None
    facts: dict[str, Any]


class AnomalyView(View):
    """One alarm of one model on one device."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    model_name: str
    version: str
    t: int = Field(description="When the window ended, by the source's clock, microseconds UTC.")
    score: float
    threshold: float
    variant: str | None
    source: str
    source_ref: str | None
    contributions: dict[str, float] = Field(description="Share of the score by channel.")


class HealthView(View):
    """How a device was at one moment."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    body: dict[str, Any]


class SummaryView(View):
    """What one model did on one device during one bucket of time."""

    id: int
    device_id: str
    t_wall: int
    t_received: int
    model_name: str
    version: str
    activation: int
    bucket_start: int
    bucket_s: float
    count: int
    errors: int
    alarms: int
    missing: int
    suppressed: int
    muted: int = Field(description="Windows that were not scored, since the machine did not run.")
    queue: int
    variant: str | None
    accelerator: str | None
    source: str
    latency_p50_us: float | None
    latency_p95_us: float | None
    latency_p99_us: float | None
    score_p50: float | None
    score_p95: float | None


class DeadLetterView(View):
    """A message that was refused for good."""

    id: int
    device_id: str
    topic: str
    code: str
    detail: str
    length: int
    payload: str
    first_received: int
    last_received: int
    count: int


Micros = Annotated[int | None, Query(ge=0, le=2**62, description="Receipt time, microseconds UTC.")]


def window(
    device: str | None = None,
    model: str | None = None,
    version: str | None = None,
    since: Micros = None,
    until: Micros = None,
    cursor: RowCursor = None,
    limit: Limit = 100,
) -> Window:
    """Read the query parameters that all listings of telemetry share."""
    return Window(
        device=device,
        model=model,
        version=version,
        since=since,
        until=until,
        before=cursor,
        limit=limit,
    )


Part = Annotated[Window, Depends(window)]


def router(telemetry: Telemetry) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(
        prefix="/api/v1", tags=["telemetry"], dependencies=[Depends(requires("telemetry:read"))]
    )

    @routes.get("/receipts", summary="List receipts, the newest first")
    def receipts(part: Part) -> Page[ReceiptView]:
        rows = [ReceiptView.model_validate(row) for row in telemetry.receipts(part)]
        return page(rows, part.limit, lambda row: row.id)

    @routes.get("/anomalies", summary="List anomalies, the newest first")
    def anomalies(part: Part) -> Page[AnomalyView]:
        rows = [AnomalyView.model_validate(row) for row in telemetry.anomalies(part)]
        return page(rows, part.limit, lambda row: row.id)

    @routes.get("/device-health", summary="List samples of devices' health, the newest first")
    def health(
        device: str | None = None,
        since: Micros = None,
        until: Micros = None,
        cursor: RowCursor = None,
        limit: Limit = 100,
    ) -> Page[HealthView]:
        part = Window(device=device, since=since, until=until, before=cursor, limit=limit)
        rows = [HealthView.model_validate(row) for row in telemetry.health(part)]
        return page(rows, limit, lambda row: row.id)

    @routes.get("/summaries", summary="List summaries of models at work, the newest first")
    def summaries(part: Part) -> Page[SummaryView]:
        rows = [SummaryView.model_validate(row) for row in telemetry.summaries(part)]
        return page(rows, part.limit, lambda row: row.id)

    @routes.get("/dead-letters", summary="List messages that were refused, and why")
    def dead_letters(
        device: str | None = None, cursor: RowCursor = None, limit: Limit = 100
    ) -> Page[DeadLetterView]:
        rows = telemetry.dead_letters(Window(device=device, before=cursor, limit=limit))
        views = [DeadLetterView.model_validate(row) for row in rows]
        return page(views, limit, lambda row: row.id)

    return routes
