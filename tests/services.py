"""Real services for tests: PostgreSQL, mosquitto, identities and connections. Nothing here is a stand-in."""

import contextlib
import datetime as dt
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import paho.mqtt.client as mqtt
import psycopg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from psycopg import sql

from provisioning import broker, pki
from provisioning.site import Site

T = TypeVar("T")
DEADLINE_S = 15.0


def wait_for(check: Callable[[], T | None], what: str, timeout_s: float = DEADLINE_S) -> T:
    """Return the first true answer of ``check``, or fail saying ``what`` did not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = check()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        time.sleep(0.02)


def utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


# --------------------------------------------------------------- PostgreSQL


def postgres_programs() -> Path | None:
    """Return the directory of initdb and pg_ctl, if PostgreSQL is installed."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


@dataclass
class Postgres:
    """A server of our own on a Unix socket, without durability: it lives as long as the tests."""

    directory: Path
    programs: Path
    _count: int = field(default=0)

    def start(self) -> None:
        user = self._user()
        if user is not None:
            shutil.chown(self.directory, user)
        data = self.directory / "data"
        self._run("initdb", "-D", data, "-U", "pithead", "-A", "trust", "-E", "UTF8", "--no-sync")
        self.run_server()

    def run_server(self) -> None:
        """Run the server, again after ``stop``."""
        options = f"-c listen_addresses='' -c unix_socket_directories='{self.directory}' -c fsync=off"
        data = self.directory / "data"
        self._run("pg_ctl", "-D", data, "-l", self.directory / "log", "-w", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self.directory / "data", "-m", "immediate", "stop")

    def new_database(self) -> str:
        """Return the address of an empty database."""
        self._count += 1
        name = f"test_{self._count}"
        with psycopg.connect(self._address("postgres"), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._address(name)

    def _address(self, name: str) -> str:
        return f"postgresql://pithead@/{name}?host={self.directory}"

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [str(self.programs / program), *map(str, arguments)]
        user = self._user()
        if user is not None:
            record = pwd.getpwnam(user)
            command = [
                "setpriv",
                f"--reuid={record.pw_uid}",
                f"--regid={record.pw_gid}",
                "--clear-groups",
                *command,
            ]
        done = subprocess.run(
            command,
            cwd="/",
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if program != "pg_ctl" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )
        if done.returncode != 0:
            log = self.directory / "log"
            raise AssertionError(f"{program}: {done.stdout!r} {log.read_text() if log.exists() else ''}")

    @staticmethod
    def _user() -> str | None:
        """Return whom PostgreSQL runs as: it refuses root."""
        if os.geteuid() != 0:
            return None
        names = {entry.pw_name for entry in pwd.getpwall()}
        return "postgres" if "postgres" in names else "nobody"


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres | None]:
    """Run a PostgreSQL server; None when it is not installed."""
    programs = postgres_programs()
    if programs is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as directory:
        server = Postgres(Path(directory), programs)
        server.start()
        try:
            yield server
        finally:
            server.stop()


# --------------------------------------------------------------- identities


def request_for(key: ec.EllipticCurvePrivateKey, name: str = "whatever") -> str:
    """Return a signing request (PEM)."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


@dataclass(frozen=True)
class Identity:
    """A name with its certificate and key on disk."""

    name: str
    certificate: Path
    key: Path
    serial: str


def device_identity(site: Site, device: str, directory: Path) -> Identity:
    """Issue an identity as enrolment does."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = pki.issue_device(
        site.device_authority, pki.read_request(request_for(key)), device, utc_now(), 30
    )
    directory.mkdir(parents=True, exist_ok=True)
    identity = Identity(device, directory / f"{device}.pem", directory / f"{device}.key", issued.serial)
    identity.certificate.write_bytes(issued.pem)
    identity.key.write_bytes(pki.private_pem(key))
    return identity


def ingest_identity(site: Site) -> Identity:
    return Identity(broker.INGEST_SERVICE, site.ingest_certificate, site.ingest_key, "")


# --------------------------------------------------------------- broker


@dataclass
class BrokerSite:
    """A site's authorities and its running broker."""

    directory: Path
    site: Site
    port: int
    config: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = broker.start(self.config)

    def stop(self) -> None:
        if self.process is not None:
            broker.stop(self.process)
            self.process = None

    def revoke(self, *serials: str) -> None:
        revoked = [pki.Revocation(serial, utc_now()) for serial in serials]
        broker.write_revocations(self.config.parent, self.site.write_crl(revoked, utc_now()))


def make_broker_site(directory: Path) -> BrokerSite:
    """Make authorities and a broker's configuration; the broker is not started."""
    site = Site(directory / "pki")
    site.create(["127.0.0.1", "localhost"], utc_now())
    port = broker.free_port()
    config = broker.write(directory / "broker", site.broker_files((), utc_now()), port=port)
    return BrokerSite(directory, site, port, config)


class Connection:
    """A paho client (MQTT 5) that remembers what it got."""

    def __init__(self, site: BrokerSite, identity: Identity, client_id: str | None = None) -> None:
        self.messages: list[mqtt.MQTTMessage] = []
        self.refused = ""
        self.losses = 0
        self._site = site
        self.client = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id or identity.name, protocol=mqtt.MQTTv5
        )
        self.client.tls_set(str(site.site.server_ca_file), str(identity.certificate), str(identity.key))
        self.client.on_message = lambda _client, _data, message: self.messages.append(message)
        self.client.on_disconnect = self._lost

    def _lost(self, *_arguments: object) -> None:
        self.losses += 1

    def open(self, *, clean: bool = True, expiry_s: int = 0) -> "Connection":
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = expiry_s
        self.client.connect("127.0.0.1", self._site.port, clean_start=clean, properties=properties)
        self.client.loop_start()
        wait_for(self.client.is_connected, "the connection")
        return self

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()
        self.client.on_message = self.client.on_disconnect = self.client.on_subscribe = None  # no circle

    def subscribe(self, topic: str) -> None:
        done: list[bool] = []
        self.client.on_subscribe = lambda *_arguments: done.append(True)
        self.client.subscribe(topic, qos=1)
        wait_for(lambda: done, "the subscription")

    def publish(
        self, topic: str, payload: bytes, *, retain: bool = False, content_type: str | None = None
    ) -> None:
        """Publish at QoS 1 and wait for the broker's answer, which comes for a forbidden topic too."""
        properties = None
        if content_type is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.ContentType = content_type
        self.client.publish(topic, payload, qos=1, retain=retain, properties=properties).wait_for_publish(
            DEADLINE_S
        )

    def got(self, topic: str) -> list[bytes]:
        return [bytes(message.payload) for message in self.messages if message.topic == topic]
