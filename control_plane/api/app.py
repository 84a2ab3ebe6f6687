"""Puts the routers together: one app for operators, one for devices."""

from collections.abc import Mapping, Sequence
from typing import Final

from fastapi import APIRouter, FastAPI

from control_plane.api import problems
from control_plane.api.auth import Identities
from control_plane.api.limits import BodyLimit, StorableAddress
from control_plane.services.access import Access
from control_plane.signing import image

OPENAPI: Final = "/api/v1/openapi.json"
UPLOADS: Final = ("/api/v1/staging/",)
"""Bodies that are streamed to a file, counted against the quota on the way."""
RELEASES: Final = "/api/v1/releases"
RELEASE_BYTES: Final = image.MAX_RELEASE * 4 // 3 + 64 * 1024
"""Of a release: its metadata name every file that was ever released, and travel in base64."""


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
    larger = {RELEASES: max(max_body_bytes, RELEASE_BYTES)}
    return _finish(app, routers, max_body_bytes, UPLOADS, larger)


def devices_app(
    version: str, identities: Identities, routers: Sequence[APIRouter], *, max_body_bytes: int
) -> FastAPI:
    """Return the devices' API: client certificates."""
    app = FastAPI(title="Pithead for devices", version=version, openapi_url=None)
    app.state.identities = identities
    return _finish(app, routers, max_body_bytes, (), {})


def _finish(
    app: FastAPI,
    routers: Sequence[APIRouter],
    limit: int,
    uncapped: Sequence[str],
    larger: Mapping[str, int],
) -> FastAPI:
    problems.install(app)
    for routes in routers:
        app.include_router(routes)
    app.add_middleware(BodyLimit, limit=limit, uncapped=uncapped, larger=larger)
    app.add_middleware(StorableAddress)
    return app
