"""What a device fetches: the metadata that it must check, and the files that they name."""

import logging
import re
from pathlib import Path
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Header, Response
from fastapi.responses import FileResponse

from contract.bundle import ARTIFACT_PATH, BUNDLE_PATH
from contract.errors import PitheadError
from control_plane.api.auth import device_identity
from control_plane.services.director import Director

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/msgpack"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class ArtifactResponse(FileResponse):
    """A file in chunks of 1 MB, which costs half the processor time of the default."""

    chunk_size = 1024 * 1024


def router(director: Director, objects: Path) -> APIRouter:
    """Return the routes of the devices' listener; ``objects`` holds the artifacts by their hash."""
    routes = APIRouter(tags=["device"])

    @routes.get(BUNDLE_PATH, response_class=Response)
    def bundle(
        device: Annotated[str, Depends(device_identity)],
        if_none_match: Annotated[str | None, Header(max_length=200)] = None,
    ) -> Response:
        """Return the device's bundle; 304 while it is the one that ``If-None-Match`` names."""
        known = (if_none_match or "").removeprefix("W/").strip('"')
        if known and director.unchanged(device, known):
            return _not_modified(known)
        content, etag = director.bundle(device)
        if known == etag:
            return _not_modified(etag)
        return Response(
            content, media_type=MEDIA_TYPE, headers={"ETag": f'"{etag}"', "Cache-Control": "no-cache"}
        )

    @routes.get(ARTIFACT_PATH + "{sha256}", response_class=FileResponse)
    def artifact(sha256: str, _device: Annotated[str, Depends(device_identity)]) -> FileResponse:
        """Return a file by its hash, or a part of it by ``Range``."""
        path = objects / sha256
        if not _SHA256.fullmatch(sha256) or not path.is_file():
            raise PitheadError("update.not_found", f"no artifact {sha256[:64]}")
        return ArtifactResponse(
            path,
            media_type="application/octet-stream",
            headers={"ETag": f'"{sha256}"', "Cache-Control": "no-transform, immutable"},
        )

    return routes


def _not_modified(etag: str) -> Response:
    return Response(status_code=304, headers={"ETag": f'"{etag}"'})
