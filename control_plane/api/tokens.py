"""Tokens: of operators for this API, and of devices for joining. A secret is shown once, when it is made."""

from typing import Annotated

from fastapi import APIRouter, Depends
from pydantic import Field

from control_plane.api.auth import requires
from control_plane.api.pages import View, Wanted
from control_plane.services.access import Access, Principal
from control_plane.services.enrolment import Enrolment

Admin = Annotated[Principal, Depends(requires("tokens:write"))]
Operator = Annotated[Principal, Depends(requires("join-tokens:write"))]


class ApiTokenView(View):
    """An API token without its secret."""

    id: str
    name: str
    roles: tuple[str, ...]
    created_at: int
    created_by: str
    expires_at: int | None
    revoked_at: int | None
    last_used: int | None


class NewApiToken(Wanted):
    """An API token to be made."""

    name: str = Field(min_length=1, max_length=64)
    roles: list[str] = Field(min_length=1, description="viewer, operator, releaser, approver, admin")
    ttl_s: float | None = Field(None, gt=0, le=10 * 365 * 86400, description="Never expires when null.")


class IssuedApiToken(View):
    """An API token with its secret."""

    id: str
    name: str
    token: str
    roles: tuple[str, ...]
    expires_at: int | None


class JoinTokenView(View):
    """A join token without its secret."""

    id: str
    description: str
    labels: dict[str, str]
    created_at: int
    created_by: str
    expires_at: int
    max_uses: int
    uses: int
    revoked_at: int | None


class NewJoinToken(Wanted):
    """A join token to be made."""

    labels: dict[str, str] = Field(default={}, description="The devices get these.")
    ttl_s: float = Field(24 * 3600, gt=0)
    max_uses: int = Field(1, ge=1)
    description: str = Field("", max_length=200)


class IssuedJoinTokenView(View):
    """A join token with its secret."""

    id: str
    token: str
    labels: dict[str, str]
    expires_at: int
    max_uses: int


def router(access: Access, enrolment: Enrolment) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/v1")

    @routes.get(
        "/tokens",
        summary="List API tokens",
        tags=["tokens"],
        dependencies=[Depends(requires("tokens:read"))],
    )
    def list_tokens() -> list[ApiTokenView]:
        return [ApiTokenView.model_validate(token) for token in access.tokens()]

    @routes.post("/tokens", summary="Make an API token", status_code=201, tags=["tokens"])
    def create_token(wanted: NewApiToken, principal: Admin) -> IssuedApiToken:
        issued = access.create(actor=principal.name, name=wanted.name, roles=wanted.roles, ttl_s=wanted.ttl_s)
        return IssuedApiToken.model_validate(issued)

    @routes.delete("/tokens/{token_id}", summary="Revoke an API token", status_code=204, tags=["tokens"])
    def revoke_token(token_id: str, principal: Admin) -> None:
        access.revoke(actor=principal.name, token_id=token_id)

    @routes.get(
        "/join-tokens",
        summary="List join tokens",
        tags=["join tokens"],
        dependencies=[Depends(requires("join-tokens:write"))],
    )
    def list_join_tokens() -> list[JoinTokenView]:
        return [JoinTokenView.model_validate(token) for token in enrolment.tokens()]

    @routes.post("/join-tokens", summary="Make a join token", status_code=201, tags=["join tokens"])
    def create_join_token(wanted: NewJoinToken, principal: Operator) -> IssuedJoinTokenView:
        issued = enrolment.create_token(
            actor=principal.name,
            labels=wanted.labels,
            ttl_s=wanted.ttl_s,
            max_uses=wanted.max_uses,
            description=wanted.description,
        )
        return IssuedJoinTokenView.model_validate(issued)

    @routes.delete(
        "/join-tokens/{token_id}", summary="Revoke a join token", status_code=204, tags=["join tokens"]
    )
    def revoke_join_token(token_id: str, principal: Operator) -> None:
        enrolment.revoke_token(actor=principal.name, token_id=token_id)

    return routes
