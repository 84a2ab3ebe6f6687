"""Enrol a device: a key made here, a signing request, and a server that proves itself by the join token.

The key is durable before the server hears of it: when the answer is lost, the
next try asks with the same key, and the token is not spent twice. The whole
identity appears by one rename, so the device is enrolled or not.
"""

import contextlib
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
from agent.core.trusted_time import NO_CHECK_TIME
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
    check_time: bool,
    write_directory: WriteDirectory,
) -> tuple[Identity, bool]:
    """Return the device's identity and whether it is new.

    A device that is enrolled with this server already keeps what it has.
    Without ``check_time``, since the clock is wrong, the server's certificate
    is trusted for the join token's sake, whenever it is valid.
    Raises ``enrol.*``, ``update.unreachable``, ``request.conflict``,
    ``message.malformed`` and ``storage.*``; then nothing has changed but that
    a key may wait for the next try.
    """
    known = load(layout.identity_file)
    if known is not None:
        if known.server.rstrip("/") == server.rstrip("/"):
            return known, False
        raise PitheadError(
            "request.conflict",
            f"this device is {known.device} of {known.server}; delete {layout.identity} to give it up",
        )
    if layout.identity.is_dir() and any(layout.identity.iterdir()):
        raise PitheadError("request.conflict", f"{layout.identity} is not whole; delete it first")
    parsed = parse_token(token)
    ca = trusted_ca(parsed, call)
    key, new = _pending_key(layout, write_directory)
    request = EnrolRequest(token=parsed.text, csr=_signing_request(key), facts=facts)
    try:
        answer = call(_verifying(ca, check_time=check_time), "POST", ENROL_PATH, codec.encode(request))
    except PitheadError as error:
        if new and error.code.startswith("enrol."):
            _forget_pending(layout)  # refused: no certificate was made for this key
        raise
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
    write_directory(
        layout.identity,
        {
            layout.key.name: (_pem(key), SECRET),
            layout.certificate.name: (response.certificate.encode(), PUBLIC),
            layout.server_ca.name: (ca.encode(), PUBLIC),
            layout.image_root.name: (response.image_root, PUBLIC),
            layout.director_root.name: (response.director_root, PUBLIC),
            layout.identity_file.name: (msgspec.json.encode(identity), PUBLIC),
        },
    )
    _forget_pending(layout)
    return identity, True


def _pending_key(layout: Layout, write_directory: WriteDirectory) -> tuple[ec.EllipticCurvePrivateKey, bool]:
    """Return the key of an earlier try, or a new one that is durable, and whether it is new.

    Raises ``storage.*``, so a device that could not keep its identity spends no token.
    """
    path = layout.pending / layout.key.name
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key, False
    except (OSError, ValueError):
        pass  # there is none, or none that can be used
    _forget_pending(layout)
    fresh = ec.generate_private_key(ec.SECP256R1())
    write_directory(layout.pending, {layout.key.name: (_pem(fresh), SECRET)})
    return fresh, True


def _forget_pending(layout: Layout) -> None:
    with contextlib.suppress(OSError):
        (layout.pending / layout.key.name).unlink(missing_ok=True)
        layout.pending.rmdir()


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


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


def _verifying(ca: str, *, check_time: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cadata=ca)
    if not check_time:
        context.verify_flags |= NO_CHECK_TIME
    return context


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
