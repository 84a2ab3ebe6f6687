"""Groups: named label selectors."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field

from control_plane.api.auth import requires
from control_plane.api.pages import View, Wanted
from control_plane.services.access import Principal
from control_plane.services.devices import Devices

Writer = Annotated[Principal, Depends(requires("groups:write"))]


class GroupView(View):
    """A group: the devices that have all labels of `selector`."""

    name: str
    selector: dict[str, str]
    description: str
    created_at: int


class GroupWanted(Wanted):
    """A group to be."""

    selector: dict[str, str]
    description: str = Field("", max_length=500)


class NewGroup(GroupWanted):
    """A group to be made."""

    name: str


def router(devices: Devices) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/v1/groups", tags=["groups"])
    readers = [Depends(requires("groups:read"))]

    @routes.get("", summary="List groups", dependencies=readers)
    def list_groups() -> list[GroupView]:
        return [GroupView.model_validate(group) for group in devices.groups()]

    @routes.post("", summary="Make a group", status_code=201)
    def create(wanted: NewGroup, principal: Writer) -> GroupView:
        group = devices.put_group(
            actor=principal.name,
            name=wanted.name,
            selector=wanted.selector,
            description=wanted.description,
            replace=False,
        )
        return GroupView.model_validate(group)

    @routes.get("/{name}", summary="Show a group", dependencies=readers)
    def show(name: str) -> GroupView:
        return GroupView.model_validate(devices.group(name))

    @routes.put("/{name}", summary="Change a group")
    def replace(name: str, wanted: GroupWanted, principal: Writer) -> GroupView:
        group = devices.put_group(
            actor=principal.name,
            name=name,
            selector=wanted.selector,
            description=wanted.description,
            replace=True,
        )
        return GroupView.model_validate(group)

    @routes.delete("/{name}", summary="Delete a group; its devices stay as they are", status_code=204)
    def delete(name: str, principal: Writer) -> None:
        devices.delete_group(actor=principal.name, name=name)

    return routes
