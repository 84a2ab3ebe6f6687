"""The key ceremony: who may sign what in the two repositories (TUF, in the shape of Uptane).

Offline keys make the roots, the image repository's targets and the
releases; they leave this machine after the ceremony. Online keys sign what
changes by itself and are read by the signer process alone. Whoever holds all
online keys can hold a fleet back, but cannot make it run a model that was
not released.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from msgspec import Struct
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets

from contract.errors import PitheadError
from provisioning import durable

RELEASE_ROLE: Final = "release"
RELEASE_PATHS: Final = ("models/*/floor", *(f"models/*/*{'/*' * depth}" for depth in range(1, 6)))
"""What the release role may sign. ``*`` does not cross a ``/``, so each depth of a package has a pattern."""

ONLINE: Final = (
    "image-snapshot",
    "image-timestamp",
    "director-targets",
    "director-snapshot",
    "director-timestamp",
)
OFFLINE_ROLES: Final = ("image-root", "image-targets", "director-root")
OFFLINE: Final = (*(f"{role}-{n}" for role in OFFLINE_ROLES for n in (1, 2, 3)), "release-1")
METADATA: Final = (
    "image/1.root.json",
    "image/1.targets.json",
    "image/1.release.json",
    "director/1.root.json",
)
THRESHOLD: Final = 2
"""Of three, for every offline role but the release role, whose threshold is one."""

ROOT_DAYS: Final = 5 * 365
TARGETS_DAYS: Final = 2 * 365
RELEASE_DAYS: Final = 2 * 365
MINIMUM_PASSPHRASE: Final = 8
ENVIRONMENT_VARIABLE: Final = "PITHEAD_KEY_PASSPHRASE"
"""Holds the passphrase of the offline keys where nobody can be asked."""

NEWEST_RELEASE: Final = "image/newest.release.json"
"""A copy of the newest release metadata, below ``tuf``, for people: the control plane reads its database."""
WARN_BEFORE: Final = timedelta(days=90)
"""Offline metadata are signed by people who must be found first."""

Keys = dict[str, CryptoSigner]


class FileStatus(Struct, frozen=True):
    """A file of the ceremony and what is known of it."""

    path: Path
    what: str
    present: bool
    expires: datetime | None = None
    version: int | None = None

    def ends_soon(self, now: datetime) -> bool:
        """Whether it is time to sign it again."""
        return self.expires is not None and self.expires - now < WARN_BEFORE


def offline_directory(data_dir: Path) -> Path:
    """Return where the offline keys go unless another directory is named."""
    return data_dir / "offline"


def expected_files(data_dir: Path, offline: Path) -> dict[Path, str]:
    """Return every file that a ceremony makes, with what it is for."""
    return {
        **{offline / f"{name}.pem": f"offline key {name}, encrypted" for name in OFFLINE},
        **{data_dir / "signer" / f"{name}.pem": f"online key {name}" for name in ONLINE},
        **{data_dir / "tuf" / name: f"signed {name}" for name in METADATA},
    }


def init(data_dir: Path, offline: Path, passphrase: str, now: datetime) -> dict[Path, str]:
    """Hold the ceremony and return the files that it made.

    Metadata come last, so that an interrupted ceremony is never taken for a
    whole one. Raises ``request.conflict`` when any of the files is there.
    """
    if len(passphrase) < MINIMUM_PASSPHRASE:
        raise PitheadError("request.invalid", f"the passphrase needs {MINIMUM_PASSPHRASE} characters")
    durable.make_directory(data_dir, 0o755)
    with _alone(data_dir):
        return _init(data_dir, offline, passphrase, now)


def _init(data_dir: Path, offline: Path, passphrase: str, now: datetime) -> dict[Path, str]:
    files = expected_files(data_dir, offline)
    there = [str(path) for path in files if path.exists()]
    if there and not all((data_dir / "tuf" / name).exists() for name in METADATA):
        raise PitheadError(
            "request.conflict",
            "an earlier ceremony did not end. If no device was ever enrolled with these keys, delete what it "
            f"left and hold it again: {', '.join(there)}",
            files=there,
        )
    if there:
        raise PitheadError(
            "request.conflict", f"keys are never overwritten; already there: {', '.join(there)}", files=there
        )
    keys: Keys = {name: CryptoSigner.generate_ed25519() for name in (*OFFLINE, *ONLINE)}
    metadata = sign_metadata(keys, now)
    durable.make_directory(offline, 0o700)
    durable.make_directory(data_dir / "signer", 0o700)
    for name in METADATA:
        durable.make_directory((data_dir / "tuf" / name).parent, 0o755)
    locked = BestAvailableEncryption(passphrase.encode())
    for name in OFFLINE:
        durable.write(offline / f"{name}.pem", _pem(keys[name], locked), durable.PRIVATE)
    for name in ONLINE:
        durable.write(data_dir / "signer" / f"{name}.pem", _pem(keys[name], NoEncryption()), durable.PRIVATE)
    for name in METADATA:
        durable.write(data_dir / "tuf" / name, metadata[name])
    return files


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep a second ceremony out; ``request.conflict`` when one is going on."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise PitheadError("request.conflict", f"another ceremony is going on in {directory}") from error
    finally:
        os.close(descriptor)


def sign_metadata(keys: Keys, now: datetime) -> dict[str, bytes]:
    """Return the first metadata of both repositories, signed."""
    image = _root(keys, "image", now, targets=_three("image-targets"), targets_threshold=THRESHOLD)
    director = _root(keys, "director", now, targets=("director-targets",), targets_threshold=1)
    release_key = keys["release-1"].public_key
    role = DelegatedRole(
        RELEASE_ROLE, [release_key.keyid], threshold=1, terminating=True, paths=list(RELEASE_PATHS)
    )
    targets = Targets(
        expires=now + timedelta(days=TARGETS_DAYS),
        delegations=Delegations({release_key.keyid: release_key}, {RELEASE_ROLE: role}),
    )
    release = Targets(expires=now + timedelta(days=RELEASE_DAYS))
    return {
        "image/1.root.json": sign(image, [keys[name] for name in _three("image-root")[:THRESHOLD]]),
        "image/1.targets.json": sign(targets, [keys[name] for name in _three("image-targets")[:THRESHOLD]]),
        "image/1.release.json": sign(release, [keys["release-1"]]),
        "director/1.root.json": sign(director, [keys[name] for name in _three("director-root")[:THRESHOLD]]),
    }


def sign(signed: Root | Targets, signers: Sequence[CryptoSigner]) -> bytes:
    """Return ``signed`` as a metadata file with one signature of each of ``signers``."""
    metadata: Metadata[Any] = Metadata(signed)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes()


def load_key(path: Path, passphrase: str | None) -> CryptoSigner:
    """Read an ed25519 private key (PKCS#8, PEM).

    Raises ``request.invalid`` naming the file when it cannot be read, the
    passphrase is wrong, or it is of another kind.
    """
    try:
        private = load_pem_private_key(path.read_bytes(), passphrase.encode() if passphrase else None)
    except OSError as error:
        raise PitheadError("request.invalid", f"cannot read the key {path}: {error.strerror}") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise PitheadError(
            "request.invalid", f"cannot open the key {path}: wrong passphrase, or not a PKCS#8 key"
        ) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise PitheadError("request.invalid", f"{path} is not an ed25519 key")
    return CryptoSigner(private)


def is_encrypted(path: Path) -> bool:
    """Whether a private key's file needs a passphrase."""
    try:
        return b"ENCRYPTED PRIVATE KEY" in path.read_bytes()
    except OSError as error:
        raise PitheadError("request.invalid", f"cannot read the key {path}: {error.strerror}") from error


def status(data_dir: Path, offline: Path) -> list[FileStatus]:
    """Return what of the ceremony is there, and when the signed files expire.

    The release metadata are those of the newest release, where there is one.
    """
    files = expected_files(data_dir, offline)
    newest = data_dir / "tuf" / NEWEST_RELEASE
    if newest.exists():
        files.pop(data_dir / "tuf" / "image" / "1.release.json")
        files[newest] = "signed release metadata, the newest"
    return [_status(path, what) for path, what in files.items()]


def _status(path: Path, what: str) -> FileStatus:
    if not path.exists():
        return FileStatus(path, what, present=False)
    if path.suffix != ".json":
        return FileStatus(path, what, present=True)
    try:
        signed = Metadata[Any].from_bytes(path.read_bytes()).signed
    except RepositoryError as error:
        raise PitheadError("config.invalid", f"{path}: {error}") from error
    return FileStatus(path, what, present=True, expires=signed.expires, version=signed.version)


def _root(
    keys: Keys, repository: str, now: datetime, *, targets: Sequence[str], targets_threshold: int
) -> Root:
    root = Root(expires=now + timedelta(days=ROOT_DAYS), consistent_snapshot=False)
    for role, names, threshold in (
        ("root", _three(f"{repository}-root"), THRESHOLD),
        ("targets", targets, targets_threshold),
        ("snapshot", (f"{repository}-snapshot",), 1),
        ("timestamp", (f"{repository}-timestamp",), 1),
    ):
        for name in names:
            root.add_key(keys[name].public_key, role)
        root.roles[role].threshold = threshold
    return root


def _three(role: str) -> tuple[str, ...]:
    return tuple(f"{role}-{n}" for n in (1, 2, 3))


def _pem(key: CryptoSigner, encryption: KeySerializationEncryption) -> bytes:
    private = load_pem_private_key(key.private_bytes, None)
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def utc_now() -> datetime:
    """Return the time as TUF metadata have it: UTC, whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
