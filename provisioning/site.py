"""The authorities and certificates of one site, as they lie in the data directory.

``pki/{device-ca,server-ca,service-ca}/{ca.pem,ca.key}``, ``pki/server.{pem,key}``
for both of the site's TLS listeners, ``pki/svc-ingest.{pem,key}``.
"""

import datetime as dt
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

from contract.errors import PitheadError
from provisioning import durable, pki
from provisioning.broker import INGEST_SERVICE, BrokerFiles

RENEW_BEFORE: Final = dt.timedelta(days=pki.SERVER_DAYS / 3)


class Site:
    """A site's keys and certificates. Reading a key that is missing raises ``config.invalid``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server_certificate = directory / "server.pem"
        self.server_key = directory / "server.key"
        self.ingest_certificate = directory / f"{INGEST_SERVICE}.pem"
        self.ingest_key = directory / f"{INGEST_SERVICE}.key"
        self.server_ca_file = directory / "server-ca" / "ca.pem"
        self.device_ca_file = directory / "device-ca" / "ca.pem"

    @property
    def exists(self) -> bool:
        """Whether ``create`` has ended here."""
        return self.ingest_certificate.exists()

    @cached_property
    def device_authority(self) -> pki.Authority:
        """Issues the identities of devices."""
        return pki.load_authority(self.directory / "device-ca")

    @cached_property
    def server_authority(self) -> pki.Authority:
        """Issues the certificates of our listeners; a join token names it."""
        return pki.load_authority(self.directory / "server-ca")

    @cached_property
    def service_authority(self) -> pki.Authority:
        """Issues the identities of our own clients of the broker."""
        return pki.load_authority(self.directory / "service-ca")

    def create(self, names: Sequence[str], now: dt.datetime) -> None:
        """Make everything; ``config.invalid`` when it is there already."""
        if self.exists:
            raise PitheadError("config.invalid", f"{self.directory} exists already; nothing was changed")
        durable.make_directory(self.directory, 0o700)
        for name in ("device", "server", "service"):
            pki.save_authority(pki.create_authority(f"Pithead {name} CA", now), self.directory / f"{name}-ca")
        self.write_crl([], now)
        self._write_server(names, now)
        self._write_ingest(now)

    def renew(self, names: Sequence[str], now: dt.datetime) -> bool:
        """Issue the site's own certificates again when it is time; say whether.

        That is when a third of their life is left, or a name is missing.
        """
        renewed = False
        named = pki.has_names(self.server_certificate.read_bytes(), names)
        if not named or self._is_due(self.server_certificate, now):
            self._write_server(names, now)
            renewed = True
        if self._is_due(self.ingest_certificate, now):
            self._write_ingest(now)
            renewed = True
        return renewed

    def write_crl(self, revoked: Iterable[pki.Revocation], now: dt.datetime) -> bytes:
        """Write the device authority's revocation list; return the lists that the broker needs."""
        devices = pki.make_crl(self.device_authority, revoked, now)
        durable.write(self.directory / "device-ca" / "crl.pem", devices)
        return devices + pki.make_crl(self.service_authority, (), now)

    def broker_files(self, revoked: Iterable[pki.Revocation], now: dt.datetime) -> BrokerFiles:
        """Return what the broker needs of this site."""
        return BrokerFiles(
            trusted=self.device_authority.pem + self.service_authority.pem,
            certificate=self.server_certificate.read_bytes(),
            key=self.server_key.read_bytes(),
            revoked=self.write_crl(revoked, now),
        )

    @staticmethod
    def _is_due(certificate: Path, now: dt.datetime) -> bool:
        return pki.expires(certificate.read_bytes()) - now < RENEW_BEFORE

    def _write_server(self, names: Sequence[str], now: dt.datetime) -> None:
        certificate, key = pki.issue_server(self.server_authority, names, now)
        durable.write(self.server_key, key, durable.PRIVATE)
        durable.write(self.server_certificate, certificate + self.server_authority.pem)

    def _write_ingest(self, now: dt.datetime) -> None:
        certificate, key = pki.issue_service(self.service_authority, INGEST_SERVICE, now)
        durable.write(self.ingest_key, key, durable.PRIVATE)
        durable.write(self.ingest_certificate, certificate)
