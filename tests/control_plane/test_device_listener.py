"""The devices' listener over real TLS: who has no certificate enrols, and nothing else."""

import hashlib
import http.client
import json
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from contract import codec, topics
from contract.bundle import (
    BUNDLE_PATH,
    CA_PATH,
    ENROL_PATH,
    Bundle,
    DeviceFacts,
    EnrolRequest,
    EnrolResponse,
    artifact_path,
)
from contract.messages import Status
from provisioning import join_tokens, pki
from provisioning.site import Site
from simulator.plant import Plant
from tests.services import BrokerSite, Connection, Identity, device_identity, request_for, utc_now, wait_for

pytestmark = pytest.mark.xdist_group("plant")


@dataclass
class Answer:
    status: int
    body: bytes
    etag: str

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["type"])


Call = Callable[..., Answer]


@pytest.fixture
def call(plant: Plant) -> Call:
    """Speak to the listener, with or without a certificate."""

    def call(
        method: str,
        path: str,
        *,
        identity: Identity | None = None,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        context = ssl.create_default_context(cafile=str(plant.data_dir / "pki" / "server-ca" / "ca.pem"))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if identity is not None:
            context.load_cert_chain(identity.certificate, identity.key)
        connection = http.client.HTTPSConnection("127.0.0.1", plant.ports.device, context=context, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), answer.getheader("ETag", ""))
        finally:
            connection.close()

    return call


def enrol(call: Call, token: str, directory: Path) -> tuple[EnrolResponse, Identity]:
    key = ec.generate_private_key(ec.SECP256R1())
    request = EnrolRequest(token=token, csr=request_for(key), facts=DeviceFacts(name="press 7"))
    answer = call("POST", ENROL_PATH, body=codec.encode(request))
    assert answer.status == 200, answer.body
    response = codec.decode(answer.body, EnrolResponse)
    identity = Identity(
        response.device, directory / f"{response.device}.pem", directory / f"{response.device}.key", ""
    )
    identity.certificate.write_text(response.certificate)
    identity.key.write_bytes(pki.private_pem(key))
    return response, identity


def test_enrolment_from_the_token_to_the_first_bundle(plant: Plant, call: Call, tmp_path: Path) -> None:
    token = plant.join_token(1, {"site": "north"})
    ca = call("GET", CA_PATH).body
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(ca.decode())).hexdigest()
    assert fingerprint == join_tokens.parse(token).fingerprint
    response, identity = enrol(call, token, tmp_path)
    assert response.server_ca.encode() == ca
    assert (response.broker_host, response.broker_port) == ("127.0.0.1", plant.ports.broker)
    bundle = call("GET", BUNDLE_PATH, identity=identity)
    assert bundle.status == 200
    roots = msgspec.msgpack.decode(bundle.body, type=Bundle)
    assert roots.image.roots[0] == response.image_root
    assert roots.director.roots[0] == response.director_root
    again = call("GET", BUNDLE_PATH, identity=identity, headers={"If-None-Match": bundle.etag})
    assert (again.status, again.body) == (304, b"")
    shown = plant.api.get(f"/api/v1/devices/{response.device}")
    assert (shown["name"], shown["labels"]) == ("press 7", {"site": "north"})
    assert enrolled_twice(call, token) == "enrol.token_used"


def enrolled_twice(call: Call, token: str) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    request = EnrolRequest(token=token, csr=request_for(key), facts=DeviceFacts())
    answer = call("POST", ENROL_PATH, body=codec.encode(request))
    assert answer.status == 403
    return answer.code


@pytest.mark.parametrize("path", [BUNDLE_PATH, artifact_path("0" * 64)])
def test_without_a_certificate_nothing_else_answers(call: Call, path: str) -> None:
    answer = call("GET", path)
    assert (answer.status, answer.code) == (401, "auth.missing")


def test_no_header_makes_a_certificate(call: Call) -> None:
    for name in ("X-Client-Cert", "X-SSL-Client-Cert", "X-Forwarded-Client-Cert", "pithead.peer_certificate"):
        answer = call("GET", BUNDLE_PATH, headers={name: "device-one"})
        assert (answer.status, answer.code) == (401, "auth.missing")


def test_a_certificate_of_another_authority_ends_the_handshake(call: Call, tmp_path: Path) -> None:
    stranger = Site(tmp_path / "other")
    stranger.create(["127.0.0.1"], utc_now())
    foreign = device_identity(stranger, "device-foreign", tmp_path)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        call("GET", BUNDLE_PATH, identity=foreign)


def test_a_certificate_that_is_not_in_the_book(plant: Plant, call: Call, tmp_path: Path) -> None:
    forged = device_identity(Site(plant.data_dir / "pki"), "device-forged", tmp_path)
    answer = call("GET", BUNDLE_PATH, identity=forged)
    assert (answer.status, answer.code) == (401, "auth.invalid")


def test_a_revoked_device_is_shut_out_of_both_ways_in(plant: Plant, call: Call, tmp_path: Path) -> None:
    response, identity = enrol(call, plant.join_token(1), tmp_path)
    assert call("GET", BUNDLE_PATH, identity=identity).status == 200
    site = BrokerSite(plant.data_dir, Site(plant.data_dir / "pki"), plant.ports.broker, plant.config)
    live = Connection(site, Identity(response.device, identity.certificate, identity.key, "")).open()
    plant.api.post(f"/api/v1/devices/{response.device}/revoke")
    answer = call("GET", BUNDLE_PATH, identity=identity)
    assert (answer.status, answer.code) == (403, "identity.revoked")
    wait_for(lambda: live.losses, "the broker to cut it off")
    wait_for(lambda: not live.client.is_connected(), "the device to be outside")
    live.close()
    listed = (plant.data_dir / "broker" / "crl.pem").read_bytes()
    assert listed.count(b"BEGIN X509 CRL") == 2
    assert plant.api.get(f"/api/v1/devices/{response.device}")["state"] == "revoked"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "message.malformed"),
        (b"[" * 100_000, 422, "message.malformed"),
        (b'{"token": 1}', 422, "message.malformed"),
        (b'{"token": "x", "csr": "x", "facts": {}}', 422, "enrol.csr_invalid"),
        (b"x" * 2_000_000, 413, "request.too_large"),
    ],
)
def test_a_bad_enrolment(call: Call, body: bytes, status: int, code: str) -> None:
    answer = call("POST", ENROL_PATH, body=body)
    assert (answer.status, answer.code) == (status, code)


def test_the_operators_api_is_not_here(call: Call) -> None:
    for path in ("/api/v1/devices", "/api/v1/openapi.json", "/openapi.json", "/docs"):
        assert call("GET", path).status == 404


def test_a_device_is_seen_online(plant: Plant, call: Call, tmp_path: Path) -> None:
    response, identity = enrol(call, plant.join_token(1), tmp_path)
    site = BrokerSite(plant.data_dir, Site(plant.data_dir / "pki"), plant.ports.broker, plant.config)
    device = Connection(site, Identity(response.device, identity.certificate, identity.key, "")).open()
    status = Status(v=1, device=response.device, online=True, boot_id="b", t_wall=response.time)
    device.publish(topics.status(response.device), codec.encode(status), retain=True)
    path = f"/api/v1/devices/{response.device}"
    wait_for(lambda: plant.api.get(path)["online"], "the device to be online")
    listed = plant.pages("/api/v1/devices", {"online": "true"})
    assert response.device in {entry["id"] for entry in listed}
    device.close()
