"""The registry over HTTP: read models, upload files, publish a release."""

import base64
import logging
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from contract.errors import PitheadError
from control_plane.api.auth import requires
from control_plane.api.pages import Wanted
from control_plane.services.access import Principal
from control_plane.services.releases import Releases

log = logging.getLogger(__name__)

Sha256 = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]


class ReleaseMetadata(BaseModel):
    """The image repository's files that a releaser needs; all base64, so that signatures stay valid."""

    roots: list[str]
    targets: str
    release: str


class Staged(BaseModel):
    """An upload that was taken."""

    sha256: str
    length: int


class NewRelease(Wanted):
    """A release: which version, and the release role's new metadata (base64) that names its files."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    version: str = Field(pattern=r"^\d+\.\d+\.\d+([-+][0-9A-Za-z.+-]+)?$", max_length=64)
    release_metadata: str


class FileView(BaseModel):
    """A file of a version."""

    path: str
    sha256: str
    length: int


class VersionView(BaseModel):
    """A released version."""

    model_name: str
    version: str
    release_counter: int
    manifest_sha256: str
    manifest_length: int
    released_at: int
    """Microseconds UTC."""
    released_by: str


class VersionDetailView(VersionView):
    """A released version with its manifest, files, and the report of its admission."""

    manifest: dict[str, Any]
    report: dict[str, Any]
    files: list[FileView]


class ModelView(BaseModel):
    """A model and its versions, by rising release counter."""

    name: str
    min_release_counter: int | None
    versions: list[VersionView]


def router(releases: Releases) -> APIRouter:
    """Return the routes of the operators' listener."""
    routes = APIRouter(prefix="/api/v1", tags=["models"])

    @routes.get("/release-metadata", dependencies=[Depends(requires("models:read"))])
    def release_metadata() -> ReleaseMetadata:
        """Return what the next release must be signed upon."""
        found = releases.current()
        return ReleaseMetadata(
            roots=[_encode(root) for root in found.roots],
            targets=_encode(found.targets),
            release=_encode(found.release),
        )

    @routes.put("/staging/{sha256}", dependencies=[Depends(requires("models:release"))])
    async def stage(sha256: Sha256, request: Request) -> Staged:
        """Upload a file, its bytes as the body. It counts against a quota until a release takes it."""
        with await run_in_threadpool(releases.stage, sha256) as upload:
            async for chunk in request.stream():
                if chunk:
                    await run_in_threadpool(upload.write, chunk)
            length = await run_in_threadpool(upload.finish)
        await run_in_threadpool(releases.staged, sha256)
        return Staged(sha256=sha256, length=length)

    @routes.post("/releases", status_code=201)
    def publish(
        new: NewRelease, caller: Annotated[Principal, Depends(requires("models:release"))]
    ) -> VersionDetailView:
        """Publish a version whose files were uploaded and whose metadata a release key has signed."""
        try:
            metadata = base64.b64decode(new.release_metadata, validate=True)
        except ValueError as error:
            raise PitheadError("request.invalid", f"release_metadata: {error}") from error
        return _detail(releases.publish(caller.name, new.name, new.version, metadata))

    @routes.get("/models", dependencies=[Depends(requires("models:read"))])
    def models() -> list[ModelView]:
        """Return all models."""
        return [ModelView.model_validate(msgspec.to_builtins(model)) for model in releases.models()]

    @routes.get("/models/{name}", dependencies=[Depends(requires("models:read"))])
    def model(name: str) -> ModelView:
        """Return one model."""
        return ModelView.model_validate(msgspec.to_builtins(releases.model(name)))

    @routes.get("/models/{name}/versions/{version}", dependencies=[Depends(requires("models:read"))])
    def version(name: str, version: str) -> VersionDetailView:
        """Return one released version."""
        return _detail(releases.version(name, version))

    return routes


def _detail(found: Any) -> VersionDetailView:
    built = msgspec.to_builtins(found)
    return VersionDetailView.model_validate(built | built["record"])


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
