"""Puts the routers together: one app for operators, one for devices."""

from collections.abc import Sequence
from typing import Final

from fastapi import APIRouter, FastAPI

from control_plane.api import problems
from control_plane.api.auth import Identities
from control_plane.api.limits import BodyLimit
from control_plane.services.access import Access

OPENAPI: Final = "/api/v1/openapi.json"
UPLOADS: Final = ("/api/v1/staging/",)
"""Bodies that are streamed to a file, counted against the quota on the way."""


def operators_app(
    version: str, access: Access, routers: Sequence[APIRouter], *, max_body_bytes: int
) -> FastAPI:
    """Return the operators' API: bearer tokens, OpenAPI at ``/api/v1/openapi.json``."""
    app = FastAPI(
        title="Pithead",
        version=version,
        summary="Machine-learning models on a fleet of devices.",
        openapi_url=OPENAPI,
        docs_url=None,  # the usual pages load scripts from the internet
        redoc_url=None,
    )
    app.state.access = access
    return _finish(app, routers, max_body_bytes, UPLOADS)


def devices_app(
    version: str, identities: Identities, routers: Sequence[APIRouter], *, max_body_bytes: int
) -> FastAPI:
    """Return the devices' API: client certificates."""
    app = FastAPI(title="Pithead for devices", version=version, openapi_url=None)
    app.state.identities = identities
    return _finish(app, routers, max_body_bytes, ())


def _finish(app: FastAPI, routers: Sequence[APIRouter], limit: int, uncapped: Sequence[str]) -> FastAPI:
    problems.install(app)
    for routes in routers:
        app.include_router(routes)
    app.add_middleware(BodyLimit, limit=limit, uncapped=uncapped)
    return app
