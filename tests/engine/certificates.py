"""Certificates for tests: authorities, and what they vouch for, as a plant would have them."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PEM, DER = serialization.Encoding.PEM, serialization.Encoding.DER
USAGE = {
    "digital_signature": True,
    "content_commitment": True,
    "key_encipherment": True,
    "data_encipherment": True,
    "key_agreement": False,
    "key_cert_sign": True,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


class Identity:
    """A certificate for localhost, of its own authority or of another's, and its key."""

    def __init__(self, directory: Path, name: str, *, by: "Identity | None" = None, uri: str = "") -> None:
        """With a ``uri`` it is an application of OPC UA: RSA, and DER beside PEM."""
        self.private: Any = (
            rsa.generate_private_key(65537, 2048) if uri else ec.generate_private_key(ec.SECP256R1())
        )
        self.subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now, issuer = datetime.now(UTC), by or self
        names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
        alternatives = x509.SubjectAlternativeName(
            [*names, x509.UniformResourceIdentifier(uri)] if uri else names
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(self.subject)
            .issuer_name(issuer.subject)
            .public_key(self.private.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(alternatives, critical=False)
            .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        )
        if uri:
            purposes = [x509.OID_SERVER_AUTH, x509.OID_CLIENT_AUTH]
            builder = builder.add_extension(x509.KeyUsage(**USAGE), critical=True).add_extension(
                x509.ExtendedKeyUsage(purposes), critical=False
            )
        made = builder.sign(issuer.private, hashes.SHA256())
        self.certificate = directory / f"{name}.{'der' if uri else 'crt'}"
        self.certificate.write_bytes(made.public_bytes(DER if uri else PEM))
        self.key = directory / f"{name}.pem"
        form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        self.key.write_bytes(self.private.private_bytes(PEM, form, secret))

    @property
    def files(self) -> dict[str, str]:
        """As the configuration names them."""
        return {"certificate_file": str(self.certificate), "key_file": str(self.key)}
