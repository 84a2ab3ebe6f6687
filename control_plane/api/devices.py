"""Devices: who they are, what they shall be, what they are."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from contract.errors import PitheadError
from control_plane.api.auth import requires
from control_plane.api.pages import Limit, Page, View, Wanted, page
from control_plane.api.telemetry import ReceiptView, SummaryView
from control_plane.services.access import Principal
from control_plane.services.devices import DeviceDetail, Devices
from control_plane.store.devices import DeviceRecord

Labels = Annotated[
    list[str] | None, Query(alias="label", description="`name=value`; may be repeated, all must match.")
]


class DeviceView(View):
    """A device. Times are microseconds UTC."""

    id: str
    name: str
    state: str = Field(description="`active` or `revoked`")
    hardware: str
    arch: str
    accelerators: tuple[str, ...]
    agent_version: str
    labels: dict[str, str]
    enrolled_at: int
    online: bool
    online_at: int | None = Field(description="When `online` changed last.")
    last_seen: int | None
    clock_skew_us: int | None = Field(description="Receipt time less the device's own, of its newest record.")
    reported: dict[str, Any] | None = Field(description="What it says that it is; see docs/asyncapi.yaml.")
    reported_at: int | None
    health: dict[str, Any] | None = Field(
        description="Its newest. `bypass` is there while its controls are not written, by hand at the "
        "device, and `ailing` lists what does not work; see docs/asyncapi.yaml."
    )
    health_at: int | None


class DeviceDetailView(DeviceView):
    """A device with what it shall be and its last steps."""

    desired: dict[str, Any]
    receipts: list[ReceiptView]
    summaries: list[SummaryView] = Field(
        description="The newest of each model, of its lanes and of what applications asked."
    )


class RevocationPending(View):
    """A device that is revoked, of which the broker has not been seen to know."""

    device: str
    warning: str


class DeviceChange(Wanted):
    """What to change of a device."""

    labels: dict[str, str | None] | None = Field(None, description="Merged; null takes a label away.")
    name: str | None = Field(None, max_length=64)


def router(devices: Devices) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/v1/devices", tags=["devices"])

    @routes.get("", summary="List devices", dependencies=[Depends(requires("devices:read"))])
    def list_devices(
        label: Labels = None,
        group: str | None = None,
        state: Annotated[str | None, Query(pattern="^(active|revoked)$")] = None,
        online: Annotated[bool | None, Query()] = None,
        name: Annotated[str | None, Query(max_length=64)] = None,
        troubled: Annotated[
            bool | None, Query(description="Whether its health tells of a bypass, or of what does not work.")
        ] = None,
        cursor: str = "",
        limit: Limit = 100,
    ) -> Page[DeviceView]:
        found = devices.page(
            labels=parse_labels(label),
            group=group,
            state=state,
            online=online,
            name=name,
            troubled=troubled,
            after=cursor,
            limit=limit,
        )
        return page([_view(record) for record in found], limit, lambda view: view.id)

    @routes.get(
        "/{device_id}",
        summary="Show a device: facts, desired, reported, health, last steps",
        dependencies=[Depends(requires("devices:read"))],
    )
    def show(device_id: str) -> DeviceDetailView:
        return _detail(devices.detail(device_id))

    @routes.patch("/{device_id}", summary="Change a device's labels or name")
    def change(
        device_id: str,
        wanted: DeviceChange,
        principal: Annotated[Principal, Depends(requires("devices:write"))],
    ) -> DeviceView:
        return _view(
            devices.change(actor=principal.name, device_id=device_id, labels=wanted.labels, name=wanted.name)
        )

    @routes.post(
        "/{device_id}/revoke",
        summary="Take a device's identity away; 202 while the broker does not know of it",
        status_code=204,
        response_class=Response,
        responses={202: {"model": RevocationPending}},
    )
    def revoke(
        device_id: str, principal: Annotated[Principal, Depends(requires("devices:write"))]
    ) -> Response:
        if devices.revoke(actor=principal.name, device_id=device_id):
            return Response(status_code=204)
        pending = RevocationPending(
            device=device_id,
            warning="revoked, but the broker was not seen to shut it out: it may still be connected. "
            "This is tried until it is done; `revocations` in /api/v1/health says when. "
            "If the broker runs elsewhere, reload it (SIGHUP) or restart it.",
        )
        return JSONResponse(pending.model_dump(), status_code=202)

    return routes


def parse_labels(pairs: list[str] | None) -> dict[str, str]:
    """Return ``name=value`` pairs as a mapping."""
    labels = {}
    for pair in pairs or ():
        name, separator, value = pair.partition("=")
        if not separator:
            raise PitheadError("request.invalid", f"label: {pair!r} is not name=value")
        labels[name] = value
    return labels


def _view(record: DeviceRecord) -> DeviceView:
    return DeviceView(**_fields(record))


def _fields(record: DeviceRecord) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return fields


def _detail(detail: DeviceDetail) -> DeviceDetailView:
    return DeviceDetailView(
        **_fields(detail.device),
        desired=msgspec.to_builtins(detail.desired),
        receipts=[ReceiptView.model_validate(receipt) for receipt in detail.receipts],
        summaries=[SummaryView.model_validate(summary) for summary in detail.summaries],
    )
