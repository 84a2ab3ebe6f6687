"""Uploads on their way into the registry: hashed while they stream, within a quota, swept when forgotten."""

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from contract.errors import PitheadError
from contract.manifest import MAX_FILE_BYTES
from provisioning.durable import make_directory, sync_directory

log = logging.getLogger(__name__)

FORGOTTEN_S: Final = 24 * 3600
"""Age at which an upload that no release has taken is removed."""
SPARE_S: Final = 3600
"""Age at which it gives way to another upload when the quota is full."""
PART: Final = ".part"


class Staging:
    """A directory of uploaded files, each named by its SHA-256."""

    def __init__(self, directory: Path, quota_bytes: int) -> None:
        self.directory = directory
        self.quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._in_flight = 0
        self._uploads = 0

    def prepare(self) -> None:
        """Make the directory and remove what a crash or a forgotten release has left."""
        make_directory(self.directory, 0o700)
        for path in self.directory.glob(f"*{PART}"):
            path.unlink()
        self.sweep()

    def sweep(self, older_than_s: float = FORGOTTEN_S) -> int:
        """Remove finished uploads that no release has taken for so long; return how many."""
        oldest = time.time() - older_than_s
        removed = 0
        for path in self._finished():
            with contextlib.suppress(FileNotFoundError):  # a release has just taken it
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
        if removed:
            log.info("staging.swept", extra={"facts": {"files": removed}})
        return removed

    def discard(self, hashes: Iterable[str]) -> None:
        """Remove these uploads."""
        for sha256 in hashes:
            self.path(sha256).unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        """Return where an upload with this hash lies."""
        return self.directory / sha256

    def open(self, sha256: str) -> "Upload":
        """Begin an upload."""
        with self._lock:
            self._uploads += 1
            number = self._uploads
        return Upload(self, sha256, self.directory / f"{sha256}.{os.getpid()}.{number}{PART}")

    def reserve(self, count: int) -> None:
        """Count bytes of an upload that is going on; ``request.too_large`` beyond the quota."""
        if self._take(count) or (self.sweep(SPARE_S) and self._take(count)):
            return
        raise PitheadError(
            "request.too_large",
            f"uploads may hold {self.quota_bytes} bytes until they are released. Publish what was uploaded; "
            f"what nobody publishes gives way after {SPARE_S // 60} minutes; or raise quota_bytes",
            limit=self.quota_bytes,
        )

    def release(self, count: int) -> None:
        """Give back what ``reserve`` counted."""
        with self._lock:
            self._in_flight -= count

    def _take(self, count: int) -> bool:
        stored = 0
        for path in self._finished():
            with contextlib.suppress(FileNotFoundError):
                stored += path.stat().st_size
        with self._lock:
            if stored + self._in_flight + count > self.quota_bytes:
                return False
            self._in_flight += count
            return True

    def _finished(self) -> list[Path]:
        return [path for path in self.directory.iterdir() if path.suffix != PART and path.is_file()]


class Upload:
    """One upload. Leaving the ``with`` block without ``finish`` leaves nothing behind."""

    def __init__(self, staging: Staging, sha256: str, part: Path) -> None:
        self._staging = staging
        self._sha256 = sha256
        self._part = part
        self._hash = hashlib.sha256()
        self._length = 0
        self._file = part.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)
        self._staging.release(self._length)

    def write(self, chunk: bytes) -> None:
        """Add bytes; ``package.too_large`` or ``request.too_large`` beyond the limits."""
        if self._length + len(chunk) > MAX_FILE_BYTES:
            raise PitheadError("package.too_large", f"limit {MAX_FILE_BYTES} bytes", limit=MAX_FILE_BYTES)
        self._staging.reserve(len(chunk))
        self._length += len(chunk)
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> int:
        """Make the upload durable and return its length; ``package.file_mismatch`` if the hash is another."""
        got = self._hash.hexdigest()
        if got != self._sha256:
            raise PitheadError(
                "package.file_mismatch", f"the upload has SHA-256 {got}, not {self._sha256}", got=got
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._part.replace(self._staging.path(self._sha256))
        sync_directory(self._staging.directory)
        return self._length
