"""Enrol a device: a key made here, a signing request, and a server that proves itself by the join token.

Everything is kept in memory until the server has answered; then the whole
identity appears by one rename. So a failure leaves the device as it was.
"""

import hashlib
import hmac
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.core.layout import Layout
from agent.identity.record import Identity, JoinToken, load, parse_token
from contract import codec, topics
from contract.bundle import CA_PATH, ENROL_PATH, DeviceFacts, EnrolRequest, EnrolResponse
from contract.errors import PitheadError

Call = Callable[[ssl.SSLContext, str, str, bytes | None], bytes]
"""(TLS, method, path, body) -> body of a good answer; raises ``PitheadError`` for any other."""
WriteDirectory = Callable[[Path, dict[str, tuple[bytes, int]]], None]

SECRET: Final = 0o600
PUBLIC: Final = 0o644


def enrol(
    layout: Layout,
    *,
    server: str,
    token: str,
    facts: DeviceFacts,
    call: Call,
    write_directory: WriteDirectory,
) -> tuple[Identity, bool]:
    """Return the device's identity and whether it is new.

    A device that is enrolled with this server already keeps what it has.
    Raises ``enrol.*``, ``update.unreachable``, ``request.conflict``,
    ``message.malformed`` and ``storage.*``; then nothing has changed.
    """
    known = load(layout.identity_file)
    if known is not None:
        if known.server.rstrip("/") == server.rstrip("/"):
            return known, False
        raise PitheadError(
            "request.conflict",
            f"this device is {known.device} of {known.server}; delete {layout.identity} to give it up",
        )
    parsed = parse_token(token)
    ca = trusted_ca(parsed, call)
    key = ec.generate_private_key(ec.SECP256R1())
    request = EnrolRequest(token=parsed.text, csr=_signing_request(key), facts=facts)
    answer = call(_verifying(ca), "POST", ENROL_PATH, codec.encode(request))
    response = codec.decode(answer, EnrolResponse)
    _check(response, key)
    identity = Identity(
        device=response.device,
        server=server.rstrip("/"),
        broker_host=response.broker_host,
        broker_port=response.broker_port,
        enrolled_at=response.time,
        name=facts.name,
        hardware=facts.hardware,
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_directory(
        layout.identity,
        {
            layout.key.name: (private, SECRET),
            layout.certificate.name: (response.certificate.encode(), PUBLIC),
            layout.server_ca.name: (ca.encode(), PUBLIC),
            layout.image_root.name: (response.image_root, PUBLIC),
            layout.director_root.name: (response.director_root, PUBLIC),
            layout.identity_file.name: (msgspec.json.encode(identity), PUBLIC),
        },
    )
    return identity, True


def trusted_ca(token: JoinToken, call: Call) -> str:
    """Return the server's CA (PEM) if it is the one that the token names, else ``enrol.server_not_trusted``.

    It is fetched without trust, since only its hash counts.
    """
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    text = call(blind, "GET", CA_PATH, None)
    try:
        pem = text.decode("ascii")
        der = ssl.PEM_cert_to_DER_cert(pem)
    except ValueError as error:
        raise PitheadError("enrol.server_not_trusted", f"the server sent no certificate: {error}") from error
    found = hashlib.sha256(der).hexdigest()
    if not hmac.compare_digest(found, token.ca_sha256):
        raise PitheadError(
            "enrol.server_not_trusted",
            f"the server's CA has the fingerprint {found}, the token names {token.ca_sha256}",
        )
    return pem


def _verifying(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca)


def _signing_request(key: ec.EllipticCurvePrivateKey) -> str:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pithead device")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM).decode()


def _check(response: EnrolResponse, key: ec.EllipticCurvePrivateKey) -> None:
    """Raise unless the answer is a certificate for our key and the id that it names."""
    if not topics.valid_device_id(response.device):
        raise PitheadError("message.malformed", f"{response.device!r} is not a device id")
    try:
        certificate = x509.load_pem_x509_certificate(response.certificate.encode())
    except ValueError as error:
        raise PitheadError(
            "message.malformed", f"the server's answer holds no certificate: {error}"
        ) from error
    names = [a.value for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if certificate.public_key() != key.public_key() or names != [response.device]:
        raise PitheadError(
            "message.malformed", "the server's answer is not a certificate for this device's key"
        )
