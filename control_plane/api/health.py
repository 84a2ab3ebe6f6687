"""Whether the control plane itself works: the one open path of the operators' listener."""

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

Check = Callable[[], bool]


class HealthView(BaseModel):
    """`degraded` when a part is down that everything else can wait for."""

    status: Literal["ok", "degraded"]
    version: str
    parts: dict[str, bool] = Field(description="Whether each part works now.")


def router(version: str, parts: dict[str, Check]) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(prefix="/api/v1", tags=["health"])

    @routes.get("/health", summary="Whether the control plane works")
    def health() -> HealthView:
        found = {name: check() for name, check in parts.items()}
        return HealthView(status="ok" if all(found.values()) else "degraded", version=version, parts=found)

    return routes
