"""Join tokens are taken exactly as often as they may be."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from contract.bundle import DeviceFacts, EnrolRequest
from contract.errors import PitheadError
from control_plane.services.devices import Devices
from control_plane.services.enrolment import Enrolment
from control_plane.store.database import Database
from provisioning import pki
from tests.services import request_for, utc_now

NOW = 1_790_000_000_000_000
SECOND = 1_000_000


class Anchors:
    """Roots are none of enrolment's business: it hands them on."""

    def first_roots(self) -> tuple[bytes, bytes]:
        return b"image root", b"director root"


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def enrolment(database: Database, clock: Clock) -> Enrolment:
    return Enrolment(
        database,
        clock,
        device_authority=pki.create_authority("devices", utc_now()),
        server_authority=pki.create_authority("servers", utc_now()),
        anchors=Anchors(),
        broker=("broker.example", 8883),
        certificate_days=30,
    )


@pytest.fixture
def devices(database: Database, clock: Clock) -> Devices:
    return Devices(database, clock)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def request(token: str, key: ec.EllipticCurvePrivateKey | None = None, name: str = "press 7") -> EnrolRequest:
    facts = DeviceFacts(hardware="rpi4", arch="aarch64", name=name)
    return EnrolRequest(token=token, csr=request_for(key or new_key()), facts=facts)


def code_of(enrolment: Enrolment, wanted: EnrolRequest) -> str:
    with pytest.raises(PitheadError) as caught:
        enrolment.enrol(wanted)
    return caught.value.code


def der(certificate: str) -> bytes:
    return x509.load_pem_x509_certificate(certificate.encode()).public_bytes(serialization.Encoding.DER)


def test_a_device_gets_an_identity_and_the_tokens_labels(enrolment: Enrolment, devices: Devices) -> None:
    token = enrolment.create_token(actor="test", labels={"site": "north"})
    answer = enrolment.enrol(request(token.token))
    assert devices.identify(der(answer.certificate)) == answer.device
    assert (answer.broker_host, answer.broker_port, answer.time) == ("broker.example", 8883, NOW)
    assert (answer.image_root, answer.director_root) == (b"image root", b"director root")
    known = devices.detail(answer.device).device
    assert (known.labels, known.name, known.hardware) == ({"site": "north"}, "press 7", "rpi4")


def test_a_token_used_twice_is_refused(enrolment: Enrolment) -> None:
    token = enrolment.create_token(actor="test", max_uses=2).token
    enrolment.enrol(request(token))
    enrolment.enrol(request(token))
    assert code_of(enrolment, request(token)) == "enrol.token_used"


def test_a_device_that_lost_the_answer_asks_again_and_takes_no_second_use(
    enrolment: Enrolment, devices: Devices
) -> None:
    token = enrolment.create_token(actor="test").token
    key = new_key()
    first = enrolment.enrol(request(token, key))
    second = enrolment.enrol(request(token, key))
    assert first.device == second.device
    assert first.certificate != second.certificate
    assert len(devices.page()) == 1
    assert code_of(enrolment, request(token)) == "enrol.token_used"
    devices.revoke(actor="test", device_id=first.device)
    assert code_of(enrolment, request(token, key)) == "enrol.token_used"


def test_an_expired_a_revoked_and_an_unknown_token(enrolment: Enrolment, clock: Clock) -> None:
    token = enrolment.create_token(actor="test", ttl_s=60)
    clock.now += 60 * SECOND
    assert code_of(enrolment, request(token.token)) == "enrol.token_expired"
    revoked = enrolment.create_token(actor="test")
    enrolment.revoke_token(actor="test", token_id=revoked.id)
    assert code_of(enrolment, request(revoked.token)) == "enrol.token_invalid"
    fingerprint = token.token.rsplit(".", 1)[1]
    assert code_of(enrolment, request(f"pj1.{'A' * 43}.{fingerprint}")) == "enrol.token_invalid"
    assert code_of(enrolment, request("hello")) == "enrol.token_invalid"


def test_a_bad_request_takes_no_use(enrolment: Enrolment) -> None:
    token = enrolment.create_token(actor="test").token
    bad = EnrolRequest(token=token, csr="nonsense", facts=DeviceFacts())
    assert code_of(enrolment, bad) == "enrol.csr_invalid"
    enrolment.enrol(request(token))


@pytest.mark.parametrize("uses", [1, 3])
def test_many_at_once_take_a_token_exactly_as_often_as_it_may_be(
    enrolment: Enrolment, devices: Devices, uses: int
) -> None:
    token = enrolment.create_token(actor="test", max_uses=uses).token
    wanted = [request(token) for _ in range(12)]

    def attempt(one: EnrolRequest) -> str:
        try:
            return enrolment.enrol(one).certificate
        except PitheadError as error:
            return error.code

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(attempt, wanted))
    assert answers.count("enrol.token_used") == 12 - uses
    assert len([answer for answer in answers if answer.startswith("-----BEGIN")]) == uses
    assert len(devices.page()) == uses


def test_no_secret_is_stored(enrolment: Enrolment, tmp_path: Path) -> None:
    token = enrolment.create_token(actor="test").token
    secret = token.split(".")[1].encode()
    stored = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret in content for content in stored)


def test_a_revoked_device_is_nobody(enrolment: Enrolment, devices: Devices) -> None:
    token = enrolment.create_token(actor="test", max_uses=2).token
    answer = enrolment.enrol(request(token))
    devices.revoke(actor="test", device_id=answer.device)
    with pytest.raises(PitheadError) as caught:
        devices.identify(der(answer.certificate))
    assert caught.value.code == "identity.revoked"
    serial = pki.device_of(der(answer.certificate))[1]
    assert [entry.serial for entry in devices.revocations()] == [serial]


def test_a_certificate_of_the_right_authority_that_was_never_issued_here(
    enrolment: Enrolment, devices: Devices
) -> None:
    """As after a restored backup, or a stolen authority: what is not in the book does not count."""
    authority = pki.create_authority("devices", utc_now())
    issued = pki.issue_device(authority, new_key().public_key(), "device-ghost", utc_now(), 30)
    with pytest.raises(PitheadError) as caught:
        devices.identify(der(issued.pem.decode()))
    assert caught.value.code == "auth.invalid"


@pytest.mark.parametrize(
    ("labels", "ttl_s", "uses"),
    [({"Bad Name": "x"}, 60, 1), ({"site": "no spaces"}, 60, 1), ({}, 0, 1), ({}, 60, 0), ({}, 1e9, 1)],
)
def test_a_token_that_makes_no_sense(
    enrolment: Enrolment, labels: dict[str, str], ttl_s: float, uses: int
) -> None:
    with pytest.raises(PitheadError) as caught:
        enrolment.create_token(actor="test", labels=labels, ttl_s=ttl_s, max_uses=uses)
    assert caught.value.code == "request.invalid"


def test_groups_select_by_labels(enrolment: Enrolment, devices: Devices) -> None:
    for site in ("north", "north", "south"):
        token = enrolment.create_token(actor="test", labels={"site": site}).token
        enrolment.enrol(request(token))
    devices.put_group(
        actor="test", name="up-north", selector={"site": "north"}, description="", replace=False
    )
    assert len(devices.page(group="up-north")) == 2
    assert len(devices.page(labels={"site": "south"})) == 1
    first = devices.page(limit=2)
    rest = devices.page(limit=2, after=first[-1].id)
    assert len({device.id for device in (*first, *rest)}) == 3
    changed = devices.change(
        actor="test", device_id=rest[0].id, labels={"site": None, "line": "4"}, name="new"
    )
    assert (changed.labels, changed.name) == ({"line": "4"}, "new")
    with pytest.raises(PitheadError, match=r"request\.conflict"):
        devices.put_group(actor="test", name="up-north", selector={}, description="", replace=False)
    devices.delete_group(actor="test", name="up-north")
    with pytest.raises(PitheadError, match=r"request\.not_found"):
        devices.page(group="up-north")
