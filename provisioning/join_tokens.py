"""Join tokens: what a technician types on a new device.

``pj1.<secret>.<fingerprint>``: 32 random bytes in base64url, and the SHA-256
of the server authority's certificate (DER) in hex. So the token proves the
device to the server, and the server to the device. Only a hash of the
secret is ever stored.
"""

import base64
import hashlib
import re
import secrets
from typing import Final, NamedTuple

from contract.errors import PitheadError

FORMAT: Final = re.compile(r"pj1\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")


class JoinToken(NamedTuple):
    """A token taken apart."""

    secret: str
    fingerprint: str
    """SHA-256 of the server authority's certificate, in hex."""

    def __str__(self) -> str:
        return f"pj1.{self.secret}.{self.fingerprint}"

    @property
    def secret_hash(self) -> str:
        """What the control plane stores."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


def create(server_ca: bytes) -> JoinToken:
    """Return a new token that pins ``server_ca`` (DER)."""
    secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    return JoinToken(secret, hashlib.sha256(server_ca).hexdigest())


def parse(token: str) -> JoinToken:
    """Take a token apart; ``enrol.token_invalid`` when it is none."""
    matched = FORMAT.fullmatch(token.strip())
    if matched is None:
        raise PitheadError("enrol.token_invalid", "this is not a join token (pj1.<secret>.<fingerprint>)")
    return JoinToken(*matched.groups())
