"""Hands the verified client certificate to the app; uvicorn by itself does not.

Believed only because this process ended the TLS connection itself: no
header can set it.
"""

import asyncio
import ssl
from pathlib import Path
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from control_plane.api.auth import PEER_CERTIFICATE


class CertificateProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with the client certificate (DER) in every request's scope."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Read the certificate once per connection."""
        super().connection_made(cast("asyncio.Transport", transport))
        tls = transport.get_extra_info("ssl_object")
        certificate = None if tls is None else tls.getpeercert(binary_form=True)
        app = self.app

        async def with_certificate(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, PEER_CERTIFICATE: certificate}, receive, send)

        self.app = with_certificate


def server_context(certificate: Path, key: Path, device_ca: Path) -> ssl.SSLContext:
    """Return TLS settings for the devices' listener.

    A client without a certificate may connect, since it has none before it
    enrols; a certificate of another authority is refused in the handshake.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(device_ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def device_config(app: Any, context: ssl.SSLContext) -> Config:
    """Return uvicorn's configuration for the devices' listener."""
    return Config(
        app,
        http=CertificateProtocol,
        ssl_context_factory=lambda _config, _default: context,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
    )
