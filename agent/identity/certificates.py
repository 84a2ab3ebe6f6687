"""Read certificates. Imports ``cryptography``: for short-lived processes only."""

from datetime import datetime
from pathlib import Path

from cryptography import x509

from contract.errors import PitheadError


def valid_until(path: Path) -> datetime:
    """Return when the first certificate in a PEM file expires, UTC. Raises ``storage.*``."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise PitheadError("storage.failed", f"reading {path}: {error.strerror}") from error
    except ValueError as error:
        raise PitheadError("storage.corrupt", f"{path}: {error}") from error
