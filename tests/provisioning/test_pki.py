"""Certificates: what a device asks for is ignored but for its key."""

import base64
import datetime as dt
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.verification import PolicyBuilder, Store

from contract.errors import PitheadError
from contract.topics import valid_device_id
from provisioning import durable, pki
from provisioning.site import Site
from tests.services import request_for, utc_now

DEVICE = "device-one"


@pytest.fixture(scope="module")
def authority() -> pki.Authority:
    return pki.create_authority("Test CA", utc_now())


def issue(authority: pki.Authority, request: str) -> pki.IssuedCertificate:
    return pki.issue_device(authority, pki.read_request(request), DEVICE, utc_now(), 30)


def test_the_request_decides_nothing_but_the_key(authority: pki.Authority):
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "svc-ingest")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("urn:pithead:device:somebody-else")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
        .decode()
    )
    certificate = x509.load_pem_x509_certificate(issue(authority, request).pem)
    assert certificate.public_key() == key.public_key()
    assert certificate.subject.rfc4514_string() == f"CN={DEVICE}"
    extension = certificate.extensions.get_extension_for_class
    assert not extension(x509.BasicConstraints).value.ca
    assert list(extension(x509.ExtendedKeyUsage).value) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    names = extension(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:pithead:device:{DEVICE}"]
    lifetime = certificate.not_valid_after_utc - utc_now()
    assert dt.timedelta(days=29) < lifetime <= dt.timedelta(days=30)


def test_a_device_is_known_by_its_certificate(authority: pki.Authority):
    issued = issue(authority, request_for(ec.generate_private_key(ec.SECP256R1())))
    der = x509.load_pem_x509_certificate(issued.pem).public_bytes(serialization.Encoding.DER)
    assert pki.device_of(der) == (DEVICE, issued.serial)
    with pytest.raises(PitheadError, match=r"auth.invalid"):
        pki.device_of(authority.der)
    with pytest.raises(PitheadError, match=r"auth.invalid"):
        pki.device_of(b"nothing")


def test_foreign_and_broken_requests_are_refused():
    def refused(request: str) -> None:
        with pytest.raises(PitheadError) as caught:
            pki.read_request(request)
        assert caught.value.code == "enrol.csr_invalid"

    refused("")
    refused("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
    refused("Ünicode")
    refused(request_for(ec.generate_private_key(ec.SECP384R1())))
    subject = x509.Name([])
    big = rsa.generate_private_key(65537, 2048)
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    refused(builder.sign(big, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode())
    good = builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    der = bytearray(good.public_bytes(serialization.Encoding.DER))
    odd = bytes(der).replace(b"\x02\x01\x00", b"\x02\x01\x05", 1)  # a version that no standard knows
    refused(
        "-----BEGIN CERTIFICATE REQUEST-----\n"
        + base64.encodebytes(odd).decode()
        + "-----END CERTIFICATE REQUEST-----\n"
    )
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der))
    refused(broken.public_bytes(serialization.Encoding.PEM).decode())


@pytest.mark.parametrize("name", ["svc-ingest", "short", "UPPERCASE", "a/b/c/d/e", "x" * 41, "-starts-so"])
def test_no_certificate_for_a_name_that_is_no_device(authority: pki.Authority, name: str):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(PitheadError):
        pki.issue_device(authority, key, name, utc_now(), 30)
    with pytest.raises(PitheadError):
        pki.issue_service(authority, DEVICE, utc_now())


def test_chains_stand_up_to_an_independent_verifier(authority: pki.Authority):
    """By cryptography's own path builder, which follows the CA/Browser profile."""
    server, _key = pki.issue_server(authority, ["localhost", "127.0.0.1"], utc_now())
    leaf = x509.load_pem_x509_certificate(server)
    verifier = (
        PolicyBuilder().store(Store([authority.certificate])).build_server_verifier(x509.DNSName("localhost"))
    )
    assert verifier.verify(leaf, [])[0] == leaf


def test_new_ids_are_valid_and_differ():
    ids = {pki.new_device_id() for _ in range(200)}
    assert len(ids) == 200
    assert all(valid_device_id(device) for device in ids)


def test_secrets_are_for_the_owner_alone(tmp_path: Path):
    site = Site(tmp_path / "pki")
    site.create(["127.0.0.1"], utc_now())
    keys = sorted(path for path in tmp_path.rglob("*.key"))
    assert len(keys) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE(site.directory.stat().st_mode) == 0o700
    with pytest.raises(PitheadError, match="exists already"):
        site.create(["127.0.0.1"], utc_now())


def test_a_missing_authority_is_told(tmp_path: Path):
    with pytest.raises(PitheadError, match=r"config.invalid"):
        _ = Site(tmp_path).device_authority


def test_revocation_list(authority: pki.Authority):
    text = pki.make_crl(authority, [pki.Revocation("abc123", utc_now())], utc_now())
    revoked = x509.load_pem_x509_crl(text)
    assert revoked.get_revoked_certificate_by_serial_number(0xABC123) is not None
    assert revoked.is_signature_valid(authority.certificate.public_key())
    assert revoked.next_update_utc is not None
    assert revoked.next_update_utc - utc_now() > dt.timedelta(days=13)


def test_a_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "file"
    durable.write(path, b"old", durable.PRIVATE)
    (tmp_path / ".file.new").write_bytes(b"left by a power cut")
    durable.write(path, b"new", durable.PRIVATE)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
