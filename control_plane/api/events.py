"""What people and the control plane did."""

from typing import Any

from fastapi import APIRouter, Depends

from control_plane.api.auth import requires
from control_plane.api.pages import Limit, Page, RowCursor, View, page
from control_plane.api.telemetry import Micros
from control_plane.services.telemetry import Telemetry


class EventView(View):
    """One deed: who did what to whom."""

    id: int
    t: int
    actor: str
    kind: str
    subject: str
    facts: dict[str, Any]


def router(telemetry: Telemetry) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(
        prefix="/api/v1/events", tags=["events"], dependencies=[Depends(requires("events:read"))]
    )

    @routes.get("", summary="List events, the newest first")
    def list_events(
        kind: str | None = None,
        subject: str | None = None,
        since: Micros = None,
        until: Micros = None,
        cursor: RowCursor = None,
        limit: Limit = 100,
    ) -> Page[EventView]:
        rows = telemetry.events(
            since=since, until=until, kind=kind, subject=subject, before=cursor, limit=limit
        )
        return page([EventView.model_validate(row) for row in rows], limit, lambda row: row.id)

    return routes
