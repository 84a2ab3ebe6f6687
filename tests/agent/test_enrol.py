"""Enrolment when answers are lost and disks are full: a token is spent once, by who can keep what it buys."""

import datetime as dt
import hashlib
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agent.core.layout import Layout
from agent.identity import enrol as enrolment
from agent.identity.enrol import WriteDirectory
from agent.identity.record import Identity
from agent.store import durable
from contract import codec
from contract.bundle import CA_PATH, DeviceFacts, EnrolRequest, EnrolResponse
from contract.errors import PitheadError
from provisioning import pki

SERVER = "https://plant.example:8443"
NOW = dt.datetime.now(dt.UTC)


@dataclass
class Server:
    """Enrols one key, as often as it asks, and loses answers on demand."""

    lose: int = 0
    refuse: str | None = None
    keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.servers = pki.create_authority("servers", NOW)
        self.devices = pki.create_authority("devices", NOW)
        der = ssl.PEM_cert_to_DER_cert(self.servers.pem.decode())
        self.token = f"pj1.{'A' * 43}.{hashlib.sha256(der).hexdigest()}"

    def call(self, _tls: ssl.SSLContext, _method: str, path: str, body: bytes | None) -> bytes:
        if path == CA_PATH:
            return self.servers.pem
        assert body is not None
        key = pki.read_request(codec.decode(body, EnrolRequest).csr)
        if self.refuse is not None:
            raise PitheadError(self.refuse)
        self.keys.append(pki.key_hash(key))
        if len(set(self.keys)) > 1:
            raise PitheadError("enrol.token_used")
        self.lose -= 1
        if self.lose >= 0:
            raise PitheadError("update.unreachable", "the answer is lost")
        pem = pki.issue_device(self.devices, key, "device-0001", NOW, 30).pem.decode()
        return codec.encode(
            EnrolResponse("device-0001", pem, self.servers.pem.decode(), b"i", b"d", "broker", 8883, 1)
        )

    def enrol(self, root: Path, write: WriteDirectory = durable.write_directory) -> tuple[Identity, bool]:
        return enrolment.enrol(
            Layout(root),
            server=SERVER,
            token=self.token,
            facts=DeviceFacts(),
            call=self.call,
            check_time=True,
            write_directory=write,
        )


def test_a_lost_answer_does_not_burn_the_token(tmp_path: Path) -> None:
    server, layout = Server(lose=2), Layout(tmp_path)
    for _ in range(2):
        with pytest.raises(PitheadError, match="lost"):
            server.enrol(tmp_path)
    assert (layout.pending / "device.key").stat().st_mode & 0o777 == 0o600
    assert server.enrol(tmp_path)[0].device == "device-0001"
    assert len(set(server.keys)) == 1
    assert layout.key.exists()
    assert not layout.pending.exists()


def test_a_disk_that_cannot_keep_the_identity_spends_no_token(tmp_path: Path) -> None:
    server = Server()

    def full(path: Path, _files: dict[str, tuple[bytes, int]]) -> None:
        raise PitheadError("storage.full", str(path))

    with pytest.raises(PitheadError, match=r"storage\.full"):
        server.enrol(tmp_path, full)
    Layout(tmp_path).identity.mkdir(parents=True)
    (Layout(tmp_path).identity / "device.pem").touch()
    with pytest.raises(PitheadError, match="not whole"):
        server.enrol(tmp_path)
    assert server.keys == []


def test_a_refusal_leaves_nothing_and_a_damaged_key_is_replaced(tmp_path: Path) -> None:
    server, pending = Server(refuse="enrol.token_expired"), Layout(tmp_path).pending
    with pytest.raises(PitheadError, match="token_expired"):
        server.enrol(tmp_path)
    assert not pending.exists()
    server.refuse = None
    durable.write_directory(pending, {"device.key": (b"damaged", 0o600)})
    assert server.enrol(tmp_path)[1]
