"""Errors as HTTP answers (RFC 9457). The only place that knows status codes of errors."""

import errno
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from contract.errors import ERRORS, PitheadError

log = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"

STATUS: Final[Mapping[str, int]] = {
    "auth.missing": 401,
    "auth.invalid": 401,
    "auth.forbidden": 403,
    "config.invalid": 500,
    "enrol.csr_invalid": 422,
    "enrol.server_not_trusted": 403,
    "enrol.token_expired": 403,
    "enrol.token_invalid": 403,
    "enrol.token_used": 403,
    "identity.revoked": 403,
    "internal.error": 500,
    "message.too_large": 413,
    "package.too_large": 413,
    "release.counter_not_rising": 409,
    "release.exists": 409,
    "release.not_admitted": 422,
    "release.signature_invalid": 403,
    "request.conflict": 409,
    "request.invalid": 422,
    "request.not_found": 404,
    "request.rate_limited": 429,
    "request.too_large": 413,
    "rollout.illegal_transition": 409,
    "rollout.no_devices": 409,
    "rollout.overlap": 409,
    "rollout.policy_invalid": 422,
    "server.disk_full": 507,
    "server.unavailable": 503,
    "signing.refused": 500,
    "signing.unavailable": 503,
    "update.disk_full": 507,
    "update.not_found": 404,
    "update.unreachable": 503,
}
"""What a code is in HTTP; all others are faults of the request's content (422)."""

DATABASE_FULL: Final = frozenset({"SQLITE_FULL", "53100"})
"""How SQLite and PostgreSQL name a full disk."""

_OF_STATUS: Final[Mapping[int, str]] = {
    400: "request.invalid",
    401: "auth.invalid",
    403: "auth.forbidden",
    404: "request.not_found",
    405: "request.invalid",
    413: "request.too_large",
    415: "request.invalid",
    429: "request.rate_limited",
}


def problem(
    code: str, detail: str, *, status: int | None = None, facts: Mapping[str, object] | None = None
) -> JSONResponse:
    """Return a problem document; ``type`` is the stable code."""
    spec = ERRORS[code]
    status = STATUS.get(code, 422) if status is None else status
    body: dict[str, object] = {
        "type": code,
        "title": spec.summary,
        "status": status,
        "detail": detail or spec.summary,
        "remedy": spec.remedy,
        "retryable": spec.retryable,
    }
    if facts:
        body["facts"] = {name: _plain(value) for name, value in facts.items()}
    headers: dict[str, str] = {}
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
        headers["Retry-After"] = "5"
    return JSONResponse(body, status_code=status, media_type=MEDIA_TYPE, headers=headers)


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem document."""
    app.add_exception_handler(PitheadError, _known)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(OperationalError, _database)
    app.add_exception_handler(InterfaceError, _database)
    app.add_exception_handler(PoolTimeout, _database)
    app.add_exception_handler(OSError, _machine)
    app.add_exception_handler(Exception, _unknown)


async def _known(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, PitheadError)
    return problem(error.code, error.detail, facts=error.facts)


async def _validation(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    kind = request.headers.get("Content-Type", "")
    if "json" not in kind and any(tuple(fault["loc"]) == ("body",) for fault in error.errors()):
        said = f"is {kind!r}" if kind else "is missing"
        return problem("request.invalid", f"the header Content-Type {said}; send application/json")
    faults = [
        {"path": ".".join(str(part) for part in fault["loc"]), "message": str(fault["msg"])}
        for fault in error.errors()
    ]
    detail = "; ".join(f"{fault['path']}: {fault['message']}" for fault in faults)
    return problem("request.invalid", detail, facts={"faults": faults})


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    failed = error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
    code = _OF_STATUS.get(error.status_code, "internal.error" if failed else "request.invalid")
    return problem(code, str(error.detail), status=error.status_code)


async def _database(request: Request, error: Exception) -> JSONResponse:
    reason = getattr(error, "orig", None) or error
    log.error(
        "request.database_failed", extra={"facts": {"path": request.url.path, "error": str(reason)[:500]}}
    )
    full = DATABASE_FULL & {getattr(reason, "sqlite_errorname", None), getattr(reason, "sqlstate", None)}
    return problem("server.disk_full" if full else "server.unavailable", "")


async def _machine(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        log.error("request.disk_full", extra={"facts": {"path": request.url.path, "error": str(error)}})
        return problem("server.disk_full", "")
    return await _unknown(request, error)


async def _unknown(request: Request, error: Exception) -> JSONResponse:
    log.error("request.failed", exc_info=error, extra={"facts": {"path": request.url.path}})
    return problem("internal.error", type(error).__name__)


def _plain(value: object) -> object:
    if value is None or isinstance(value, str | int | float | bool | list | dict):
        return value
    return str(value)
