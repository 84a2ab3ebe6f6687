"""A session with an OPC UA server, for the source and the sink of that kind."""

import contextlib
import logging
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from agent.engine.sources.credentials import credentials
from contract.errors import PitheadError

CERTIFICATES: Final = ("certificate_file", "key_file", "server_certificate_file")


class OpcuaServer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a server is, who asks, and how it is known to be the right one."""

    url: Annotated[str, Meta(pattern=r"^opc\.tcp://[^@]+$")]
    """As ``opc.tcp://host:4840/path``; credentials have a file of their own."""
    security_policy: Literal["Basic256Sha256", "Aes128Sha256RsaOaep", "Aes256Sha256RsaPss"] | None = None
    security_mode: Literal["Sign", "SignAndEncrypt"] = "SignAndEncrypt"
    certificate_file: str | None = None
    """The device's, PEM or DER; its URI among the alternative names is the application's."""
    key_file: str | None = None
    server_certificate_file: str | None = None
    """The server's own: nobody else is spoken to."""
    credentials_file: str | None = None
    """TOML with ``username`` and ``password``."""
    timeout_s: Annotated[float, Meta(ge=0.1, le=60)] = 4.0

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for certificates that would not be used, or are not there."""
        for key in CERTIFICATES:
            there = getattr(self, key) is not None
            if there and self.security_policy is None:
                raise ValueError(f"{key} stands without security_policy: nothing would be encrypted")
            if not there and self.security_policy is not None:
                raise ValueError(f"{key} is missing: the security policy needs it")


class Link:
    """Makes clients of one server. Errors have the ``code`` and name the ``table`` of the configuration."""

    def __init__(self, server: OpcuaServer, table: str, code: str) -> None:
        self._server, self._table, self._code = server, table, code
        self._login = None
        if server.credentials_file is not None:
            self._login = credentials(server.credentials_file, table, code)
        self._uri = None if server.certificate_file is None else self._application(server.certificate_file)
        try:
            self.library: Any = import_module("asyncua")
            self._policies: Any = import_module("asyncua.crypto.security_policies")
        except ImportError as error:
            raise PitheadError(code, "opcua: asyncua is missing; install the extra `opcua`") from error
        # What goes wrong is said by us, once; the library says much more.
        logging.getLogger("asyncua").setLevel(logging.CRITICAL)

    async def connected(self, **more: Any) -> Any:
        """Return a client with a session; ``more`` is for its constructor. Raises what asyncua does."""
        server = self._server
        client = self.library.Client(server.url, timeout=server.timeout_s, **more)
        client.name = client.description = "pithead"
        if self._login is not None:
            client.set_user(self._login.username)
            client.set_password(self._login.password)
        try:
            if server.security_policy is not None:
                await self._secure(client, server.security_policy)
            await client.connect()
        except BaseException:
            with contextlib.suppress(Exception):
                await client.disconnect()
            raise
        return client

    async def node(self, client: Any, address: str) -> Any:
        """Return the node id that ``address`` names; ``ValueError`` or asyncua's error where it is none."""
        if address.startswith("nsu="):
            uri, _, rest = address.removeprefix("nsu=").partition(";")
            address = f"ns={await client.get_namespace_index(uri)};{rest}"
        return self.library.ua.NodeId.from_string(address)

    async def _secure(self, client: Any, policy: str) -> None:
        server = self._server
        try:
            client.application_uri = self._uri or client.application_uri
            await client.set_security(
                getattr(self._policies, f"SecurityPolicy{policy}"),
                certificate=server.certificate_file,
                private_key=server.key_file,
                server_certificate=server.server_certificate_file,
                mode=self.library.ua.MessageSecurityMode[server.security_mode],
            )
        except (OSError, ValueError) as error:
            raise PitheadError(
                self._code, f"{self._table}: {', '.join(CERTIFICATES[:2])} or {CERTIFICATES[2]}: {error}"
            ) from error

    def _application(self, path: str) -> str | None:
        """Return the application's URI, which stands in its certificate, if one does."""
        from cryptography import x509  # noqa: PLC0415 - only those who use certificates pay for it

        try:
            certificate = Path(path).read_bytes()
            pem = certificate.lstrip().startswith(b"-----BEGIN")
            read = x509.load_pem_x509_certificate if pem else x509.load_der_x509_certificate
            names = read(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return None
        except (OSError, ValueError) as error:
            raise PitheadError(self._code, f"{self._table}.certificate_file {path}: {error}") from error
        return next(iter(names.get_values_for_type(x509.UniformResourceIdentifier)), None)
