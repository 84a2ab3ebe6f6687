"""Verify the metadata of one repository as they stand in the bundle, with python-tuf.

Each verification starts from the pinned root and from nothing else, in a
directory that is thrown away. What was seen before is the business of
``marks``, so that no local file can weaken the check.
"""

import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from agent.errors import FULL
from agent.update.marks import Authority, Key, Mark
from contract.bundle import RepositoryMetadata
from contract.errors import PitheadError

LIMITS: Final = UpdaterConfig(
    max_root_rotations=128,
    max_delegations=8,
    root_max_length=64 * 1024,
    timestamp_max_length=16 * 1024,
    snapshot_max_length=64 * 1024,
    targets_max_length=4 * 1024 * 1024,
)
_FILE: Final = re.compile(r"(?:(\d+)\.)?(.+)\.json")
_TOP: Final = ("timestamp", "snapshot", "targets")


class BundleFetcher(FetcherInterface):
    """Hands python-tuf the files of a bundle as if they came from a server."""

    def __init__(self, files: RepositoryMetadata) -> None:
        self._files = files

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return a file of the bundle, without the detour by a temporary file."""
        data = b"".join(self.fetch(url))
        if len(data) > max_length:
            raise DownloadLengthMismatchError(f"{url}: {len(data)} bytes, expected at most {max_length}")
        return data

    def _fetch(self, url: str) -> Iterator[bytes]:
        matched = _FILE.fullmatch(url.rpartition("/")[2])
        data = None if matched is None else self._find(unquote(matched[2]), matched[1])
        if data is None:
            raise DownloadHTTPError(f"the bundle has no {url}", 404)
        return iter((data,))

    def _find(self, role: str, version: str | None) -> bytes | None:
        if role == Root.type:
            number = int(version or 0)
            return self._files.roots[number - 1] if 0 < number <= len(self._files.roots) else None
        if role in _TOP:
            data: bytes = getattr(self._files, role)
            return data
        return self._files.delegated.get(role)


class RepositoryFiles:
    """The parsed files of one repository, and who signed them. Says nothing of their trust."""

    def __init__(self, name: str, files: RepositoryMetadata) -> None:
        """Parse the top roles; raises ``RepositoryError``."""
        self.name = name
        self._files = files
        self._loaded: dict[str, Metadata[Any]] = {
            Root.type: Metadata.from_bytes(files.roots[-1]),
            "timestamp": Metadata.from_bytes(files.timestamp),
            "snapshot": Metadata.from_bytes(files.snapshot),
            "targets": Metadata.from_bytes(files.targets),
        }

    def load(self, role: str) -> None:
        """Parse a delegated role too, where the bundle has it and the top role knows it."""
        data = self._files.delegated.get(role)
        delegations = self._loaded["targets"].signed.delegations
        if data is not None and delegations is not None and role in (delegations.roles or {}):
            self._loaded[role] = Metadata.from_bytes(data)

    @property
    def top_targets(self) -> Mapping[str, TargetFile]:
        """The targets that the top role names itself."""
        targets: Mapping[str, TargetFile] = self._loaded["targets"].signed.targets
        return targets

    def paths(self, prefix: str) -> list[str]:
        """Return the paths below ``prefix`` that any role names."""
        found = {
            path
            for metadata in self._loaded.values()
            if isinstance(metadata.signed, Targets)
            for path in metadata.signed.targets
            if path.startswith(prefix)
        }
        return sorted(found)

    def authorities(self) -> dict[Key, Authority]:
        """Return who may sign each role but the root."""
        found: dict[Key, Authority] = {}
        for role in self._loaded:
            if role != Root.type:
                delegated = self._delegator(role).get_delegated_role(role)
                found[self.name, role] = Authority(frozenset(delegated.keyids), delegated.threshold)
        return found

    def marks(self) -> dict[Key, Mark]:
        """Return version, content and signers of every role."""
        found: dict[Key, Mark] = {}
        for role, metadata in self._loaded.items():
            payload = metadata.signed_bytes
            result = self._delegator(role).get_verification_result(role, payload, metadata.signatures)
            signed_at = metadata.signed.unrecognized_fields.get("signed_at", 0)
            found[self.name, role] = Mark(
                version=metadata.signed.version,
                digest=sha256(payload).hexdigest(),
                keyids=frozenset(result.signed),
                signed_at=signed_at if role == "timestamp" and isinstance(signed_at, int) else 0,
            )
        return found

    def check_expiry(self, now: int) -> None:
        """Raise ``update.metadata_expired`` for a role that has expired at ``now``, microseconds UTC."""
        for role, metadata in self._loaded.items():
            expires = metadata.signed.expires
            if int(expires.timestamp()) * 1_000_000 <= now:
                raise PitheadError(
                    "update.metadata_expired",
                    f"{self.name} {role} expired at {expires:%Y-%m-%dT%H:%M:%SZ}",
                    repository=self.name,
                    role=role,
                )

    def _delegator(self, role: str) -> Any:
        return self._loaded[Root.type if role in (Root.type, *_TOP) else "targets"].signed


class VerifiedRepository(RepositoryFiles):
    """A repository whose files have all been verified against each other and the pinned root.

    Expiry is checked by the system's clock here; ``check_expiry`` checks it
    again by the time that the device can be sure of.
    """

    def __init__(self, name: str, files: RepositoryMetadata, pinned_root: bytes, directory: Path) -> None:
        """Verify, using ``directory``, which must not exist.

        Raises ``update.metadata_*``; ``update.disk_full`` and
        ``storage.failed`` when the directory cannot be written.
        """
        _check_lengths(name, files)
        if not files.roots:
            raise PitheadError("update.metadata_invalid", f"{name}: no root", repository=name)
        try:
            directory.mkdir()
            self._updater = Updater(
                str(directory),
                f"bundle:///{name}/",
                fetcher=BundleFetcher(files),
                config=LIMITS,
                bootstrap=pinned_root,
            )
            self._updater.refresh()
            used = (directory / "root.json").read_bytes()
            version = Metadata[Any].from_bytes(used).signed.version
            super().__init__(name, files)
        except (RepositoryError, DownloadError, ValueError, OSError) as error:
            raise translate(error, name) from error
        if version > len(files.roots):
            raise PitheadError(
                "update.metadata_rollback", f"{name} root {len(files.roots)}, but {version} is pinned"
            )
        if used != files.roots[-1]:
            # python-tuf stops at the first root that is missing; what follows it was never looked at.
            raise PitheadError("update.metadata_invalid", f"{name}: roots are not in order", repository=name)

    def target(self, path: str) -> TargetFile | None:
        """Return what the repository says of a path, by way of its delegations."""
        try:
            return self._updater.get_targetinfo(path)
        except (RepositoryError, DownloadError, ValueError, OSError) as error:
            raise translate(error, self.name) from error

    def load_delegated(self, role: str, path: str) -> None:
        """Verify the role to which ``path`` is delegated, so that its version counts too."""
        self.target(path)
        self.load(role)


def translate(error: Exception, repository: str) -> PitheadError:
    """Return our error for one of python-tuf's, so that each attack has one code."""
    cause = error.__cause__ if isinstance(error, DownloadError) and error.__cause__ else error
    if isinstance(cause, OSError):
        code = "update.disk_full" if cause.errno in FULL else "storage.failed"
    elif isinstance(error, ExpiredMetadataError):
        code = "update.metadata_expired"
    elif isinstance(error, BadVersionNumberError | LengthOrHashMismatchError | DownloadLengthMismatchError):
        code = "update.metadata_inconsistent"
    else:
        code = "update.metadata_invalid"
    return PitheadError(code, f"{repository}: {error}", repository=repository)


def _check_lengths(name: str, files: RepositoryMetadata) -> None:
    limits = [
        *((f"root {number}", root, LIMITS.root_max_length) for number, root in enumerate(files.roots, 1)),
        ("timestamp", files.timestamp, LIMITS.timestamp_max_length),
        ("snapshot", files.snapshot, LIMITS.snapshot_max_length),
        ("targets", files.targets, LIMITS.targets_max_length),
        *((role, data, LIMITS.targets_max_length) for role, data in files.delegated.items()),
    ]
    for role, data, limit in limits:
        if len(data) > limit:
            raise PitheadError(
                "update.metadata_too_large", f"{name} {role}: {len(data)} bytes, limit {limit}", limit=limit
            )
