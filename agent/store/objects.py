"""The content-addressed store: a file lies under the SHA-256 of its content."""

import hashlib
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from agent.errors import from_os
from agent.store import durable
from contract.errors import PitheadError
from contract.messages import Sha256

log = logging.getLogger(__name__)
HASH: Final = re.compile(r"[0-9a-f]{64}")
CHUNK: Final = 1024 * 1024


class ObjectStore:
    """Objects of one device. Each becomes visible only when complete, so a name means a whole file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, sha256: Sha256) -> Path:
        """Return where an object lies, or would lie."""
        return self.directory / sha256

    def has(self, sha256: Sha256, length: int | None = None) -> bool:
        """Whether an object is here, by name and, where given, length."""
        try:
            status = self.path(sha256).stat()
        except OSError:
            return False
        return length is None or status.st_size == length

    def put(self, data: bytes) -> Sha256:
        """Store ``data`` durably and return its hash. Raises ``storage.*``."""
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.has(sha256, len(data)):
            durable.write(self.path(sha256), data)
        return sha256

    def read(self, sha256: Sha256, limit: int = 64 * 1024 * 1024) -> bytes:
        """Return an object's content, verified.

        Raises ``storage.failed`` and ``storage.corrupt``; a corrupt object is
        deleted, so that it is fetched again.
        """
        path = self.path(sha256)
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise from_os(error, f"reading {path}") from error
        if len(data) > limit or hashlib.sha256(data).hexdigest() != sha256:
            durable.remove(path)
            raise PitheadError(
                "storage.corrupt", f"object {sha256} was damaged and is deleted", sha256=sha256
            )
        return data

    def verify(self, sha256: Sha256) -> bool:
        """Whether the object is here and undamaged; a damaged one is deleted."""
        digest = hashlib.sha256()
        try:
            with self.path(sha256).open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError:
            return False
        if digest.hexdigest() == sha256:
            return True
        log.error("object.damaged", extra={"facts": {"sha256": sha256}})
        durable.remove(self.path(sha256))
        return False

    def collect(self, keep: Collection[Sha256]) -> int:
        """Delete every object and unfinished download whose hash is not in ``keep``; return how many."""
        removed = 0
        if not self.directory.is_dir():
            return removed
        for path in self.directory.iterdir():
            matched = HASH.match(path.name)
            if matched is None or matched.group() in keep or not path.is_file():
                continue
            path.unlink(missing_ok=True)
            removed += 1
        return removed
