"""Who is calling: a bearer token on the operators' listener, a client certificate on the devices'.

Both are dependencies; the services that decide are put on ``app.state`` by
``api.app``: ``access`` and ``identities``.
"""

from collections.abc import Callable
from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from contract.errors import PitheadError
from control_plane.services.access import ACTIONS, Access, Principal

PEER_CERTIFICATE = "pithead.peer_certificate"
"""Key of the ASGI scope: the verified client certificate (DER), put there by ``api.mtls``."""

_bearer = HTTPBearer(auto_error=False, description="API token, made by `pithead tokens create`")


class Identities(Protocol):
    """Knows the certificates that were issued and revoked."""

    def identify(self, certificate: bytes) -> str:
        """Return the id of the device whose verified certificate (DER) this is, or raise."""


def requires(action: str) -> Callable[..., Principal]:
    """Return a dependency that yields the caller if it may do ``action``, for example ``devices:read``.

    An action that is not in ``services.access.ROLES`` raises ``KeyError`` at
    import, so that no route can ask for a permission that nobody can have.
    """
    if action not in ACTIONS:
        raise KeyError(action)

    def principal(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Principal:
        if credentials is None:
            raise PitheadError("auth.missing", "send the header `Authorization: Bearer TOKEN`")
        access: Access = request.app.state.access
        caller = access.authenticate(credentials.credentials)
        access.authorise(caller, action)
        return caller

    return principal


def device_identity(request: Request) -> str:
    """Return the id of the device that calls, proved by its client certificate.

    Raises ``auth.missing`` without one and ``identity.revoked`` for a
    revoked one.
    """
    certificate = request.scope.get(PEER_CERTIFICATE)
    if not isinstance(certificate, bytes):
        raise PitheadError("auth.missing", "this path needs a client certificate")
    identities: Identities = request.app.state.identities
    return identities.identify(certificate)
