"""The three authorities (devices, servers, services) and the certificates they issue.

P-256 throughout. What a device asks for in its request is ignored but for
its key: the id, the extensions and the lifetime are ours to choose.
"""

import datetime as dt
import ipaddress
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from contract.errors import PitheadError
from contract.topics import SERVICE_PREFIX, valid_device_id
from provisioning import durable

DEVICE_URI: Final = "urn:pithead:device:"
AUTHORITY_DAYS: Final = 20 * 365
SERVER_DAYS: Final = 397
CRL_DAYS: Final = 14
BACKDATE: Final = dt.timedelta(hours=1)
"""Certificates begin a little earlier, for clocks that are a little behind."""

Moment = dt.datetime


class Authority(NamedTuple):
    """A certification authority with its key in memory."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        """The authority's certificate."""
        return self.certificate.public_bytes(serialization.Encoding.DER)


class IssuedCertificate(NamedTuple):
    """A certificate just issued."""

    pem: bytes
    serial: str
    not_after: Moment


class Revocation(NamedTuple):
    """A serial number (hex) and when it was revoked."""

    serial: str
    at: Moment


def create_authority(name: str, now: Moment) -> Authority:
    """Make an authority; its certificates can issue no further authorities."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public = key.public_key()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + dt.timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def save_authority(authority: Authority, directory: Path) -> None:
    """Write ``ca.pem`` and ``ca.key`` (readable by the owner alone)."""
    durable.make_directory(directory, 0o700)
    durable.write(directory / "ca.key", private_pem(authority.key), durable.PRIVATE)
    durable.write(directory / "ca.pem", authority.pem)


def load_authority(directory: Path) -> Authority:
    """Read what ``save_authority`` has written; ``config.invalid`` when it is not there or no such thing."""
    try:
        certificate = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise PitheadError("config.invalid", f"{directory}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PitheadError("config.invalid", f"{directory}/ca.key is not an elliptic-curve key")
    return Authority(certificate, key)


def issue_server(
    authority: Authority, names: Iterable[str], now: Moment, days: int = SERVER_DAYS
) -> tuple[bytes, bytes]:
    """Return ``(certificate, key)`` in PEM for a server of these host names and addresses."""
    wanted = list(dict.fromkeys(names))
    if not wanted:
        raise PitheadError("config.invalid", "a server's certificate needs at least one name")
    key = ec.generate_private_key(ec.SECP256R1())
    issued = _issue(
        authority,
        key.public_key(),
        wanted[0][:64],
        x509.SubjectAlternativeName([_general_name(name) for name in wanted]),
        ExtendedKeyUsageOID.SERVER_AUTH,
        now,
        days,
    )
    return issued.pem, private_pem(key)


def issue_service(
    authority: Authority, name: str, now: Moment, days: int = SERVER_DAYS
) -> tuple[bytes, bytes]:
    """Return ``(certificate, key)`` in PEM for a service; its name begins with ``svc-``."""
    if not name.startswith(SERVICE_PREFIX):
        raise PitheadError("config.invalid", f"a service is named {SERVICE_PREFIX}..., not {name!r}")
    key = ec.generate_private_key(ec.SECP256R1())
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:pithead:service:{name}")])
    issued = _issue(authority, key.public_key(), name, san, ExtendedKeyUsageOID.CLIENT_AUTH, now, days)
    return issued.pem, private_pem(key)


def issue_device(
    authority: Authority, request: ec.EllipticCurvePublicKey, device: str, now: Moment, days: float
) -> IssuedCertificate:
    """Issue a certificate for ``device`` and the key of a request that ``read_request`` has checked."""
    if not valid_device_id(device):
        raise PitheadError("request.invalid", f"{device!r} is not a device id")
    san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(DEVICE_URI + device)])
    return _issue(authority, request, device, san, ExtendedKeyUsageOID.CLIENT_AUTH, now, days)


def read_request(pem: str) -> ec.EllipticCurvePublicKey:
    """Return the key of a PKCS#10 request; ``enrol.csr_invalid`` unless it is P-256 and signed by it."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise PitheadError("enrol.csr_invalid", str(error)) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise PitheadError("enrol.csr_invalid", "the key is not P-256")
    if not valid:
        raise PitheadError("enrol.csr_invalid", "the request is not signed by its own key")
    return key


def device_of(certificate: bytes) -> tuple[str, str]:
    """Return ``(device id, serial in hex)`` of a verified certificate (DER), or raise ``auth.invalid``."""
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound) as error:
        raise PitheadError("auth.invalid", f"not a device's certificate: {error}") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    devices = [uri.removeprefix(DEVICE_URI) for uri in uris if uri.startswith(DEVICE_URI)]
    if len(devices) != 1 or not valid_device_id(devices[0]):
        raise PitheadError("auth.invalid", "not a device's certificate")
    return devices[0], f"{parsed.serial_number:x}"


def make_crl(authority: Authority, revoked: Iterable[Revocation], now: Moment) -> bytes:
    """Return the authority's revocation list (PEM), valid for ``CRL_DAYS``."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.certificate.subject)
        .last_update(now - BACKDATE)
        .next_update(now + dt.timedelta(days=CRL_DAYS))
        .add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        .add_extension(_authority_key(authority), critical=False)
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(
            x509.RevokedCertificateBuilder()
            .serial_number(int(entry.serial, 16))
            .revocation_date(entry.at)
            .build()
        )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def expires(certificate: bytes) -> Moment:
    """Return when a certificate (PEM) ends."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def has_names(certificate: bytes, names: Iterable[str]) -> bool:
    """Whether a server's certificate (PEM) is good for all of these host names and addresses."""
    parsed = x509.load_pem_x509_certificate(certificate)
    found = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {_general_name(name) for name in names} <= set(found)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a key as unencrypted PKCS#8."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def utc_now() -> Moment:
    """Return the time."""
    return dt.datetime.now(dt.UTC)


def moment(micros: int) -> Moment:
    """Return microseconds since 1970-01-01 UTC as certificates want them."""
    return dt.datetime.fromtimestamp(micros // 1_000_000, dt.UTC)


def key_hash(key: ec.EllipticCurvePublicKey) -> str:
    """Return the SHA-256 of the key's SubjectPublicKeyInfo, in hex."""
    spki = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    return digest.finalize().hex()


def new_device_id() -> str:
    """Return an id that no device has: ``dev-`` and 60 random bits."""
    letters = "0123456789abcdefghjkmnpqrstvwxyz"
    return "dev-" + "".join(secrets.choice(letters) for _ in range(12))


def _issue(
    authority: Authority,
    key: ec.EllipticCurvePublicKey,
    name: str,
    san: x509.SubjectAlternativeName,
    usage: x509.ObjectIdentifier,
    now: Moment,
    days: float,
) -> IssuedCertificate:
    not_after = (now + dt.timedelta(days=days)).replace(microsecond=0)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(san, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_authority_key(authority), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return IssuedCertificate(
        pem=certificate.public_bytes(serialization.Encoding.PEM),
        serial=f"{certificate.serial_number:x}",
        not_after=not_after,
    )


def _authority_key(authority: Authority) -> x509.AuthorityKeyIdentifier:
    own = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise PitheadError("config.invalid", f"{name!r} is no host name") from error
