"""Fetch one file that verified metadata name: resumed where it stopped, checked while it streams, durable."""

import fcntl
import hashlib
import http.client
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Self
from urllib.parse import urlsplit

from msgspec import Struct

from agent.core.layout import Layout
from agent.core.trusted_time import NO_CHECK_TIME, clock_is_right
from agent.update import verified
from agent.update.verified import VerifiedFile
from contract.bundle import artifact_path
from contract.errors import PitheadError

log = logging.getLogger(__name__)

CHUNK: Final = 256 * 1024
IDLE_S: Final = 20.0
"""The longest that the server may be silent."""

MISMATCH: Final = frozenset({"update.hash_mismatch", "update.length_mismatch"})

_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def fetch(layout: Layout, path: str, file: VerifiedFile, *, server: str, now: int, deadline_s: float) -> None:
    """Bring the file with this TUF target path from ``server`` into the objects.

    Only what the last refresh verified is fetched. Raises ``update.*`` and
    ``storage.*``; a partial download stays, to be resumed, unless it is
    known to be wrong or the disk is full. One that turns out to be wrong
    after it was resumed is fetched once more from its beginning: what was
    here may have been damaged, and the server's file be right. ``now`` in
    microseconds UTC.
    """
    known = verified.read(layout.tuf / "verified")
    expected = None if known is None else known.files.get(path)
    if known is None or expected is None:
        raise PitheadError("update.not_released", f"{path} is not in the verified metadata")
    if expected != file:
        raise PitheadError("update.repositories_disagree", f"{path}: asked for {file}, signed is {expected}")
    place = layout.object(file.sha256)
    try:
        verified.make_directory(place.parent)
        if place.exists():
            if _is_whole(layout, file):
                return
            place.unlink()
        source = _Source(layout, server, time.monotonic() + deadline_s, clock_is_right(now, known.time_floor))
        if not _fetched(source, file):
            _fetched(source, file)
    except OSError as error:
        raise verified.failed(error, f"writing {place}") from error


class _Source(Struct, frozen=True):
    """Where a file comes from, and until when."""

    layout: Layout
    server: str
    until: float
    """By the monotonic clock."""
    check_time: bool


def _fetched(source: _Source, file: VerifiedFile) -> bool:
    """Fetch the file, or return False when it was resumed and is wrong; then nothing of it is left."""
    with _Part(source.layout, file) as part:
        if source.layout.object(file.sha256).exists():
            return True  # another process has just finished it
        part.resume()
        part.check_room()
        resumed = part.length > 0
        try:
            if part.length < file.length:
                _download(source, file, part)
            part.finish()
        except PitheadError as error:
            if not resumed or error.code not in MISMATCH:
                raise
            log.warning("fetch.resumed_wrong", extra={"facts": {"sha256": file.sha256, "code": error.code}})
            return False
        return True


class _Part:
    """The file while it is on its way: what is here already, and the hash of it."""

    def __init__(self, layout: Layout, file: VerifiedFile) -> None:
        self._place = layout.object(file.sha256)
        self._path = self._place.with_name(f"{file.sha256}.part")
        self._file = file
        self._stream = self._path.open("a+b", buffering=0)
        self._hash = hashlib.sha256()
        self.length = 0

    def __enter__(self) -> Self:
        try:
            fcntl.flock(self._stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._stream.close()
            raise PitheadError("install.interrupted", "another process is fetching this file") from error
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._stream.close()
        if self.length == 0 or isinstance(error, OSError):
            # What does not fit shall not keep the room from others.
            self._path.unlink(missing_ok=True)

    def resume(self) -> None:
        """Take up what an earlier attempt has left."""
        size = os.fstat(self._stream.fileno()).st_size
        if size > self._file.length:
            self.restart()
            return
        self._stream.seek(0)
        while chunk := self._stream.read(CHUNK):
            self._hash.update(chunk)
            self.length += len(chunk)
        if self.length:
            log.info("fetch.resumed", extra={"facts": {"sha256": self._file.sha256, "from": self.length}})

    def restart(self) -> None:
        """Forget what is here."""
        self._stream.truncate(0)
        self._hash = hashlib.sha256()
        self.length = 0

    def check_room(self) -> None:
        """Raise ``update.disk_full`` when the rest does not fit."""
        room = os.fstatvfs(self._stream.fileno())
        free, needed = room.f_bavail * room.f_frsize, self._file.length - self.length
        if free < needed:
            raise PitheadError(
                "update.disk_full", f"{needed} bytes to come, {free} free", needed=needed, free=free
            )

    def write(self, chunk: bytes) -> None:
        """Add bytes; ``update.length_mismatch`` when there are more than were signed."""
        if self.length + len(chunk) > self._file.length:
            self._refuse("update.length_mismatch", f"more than the signed {self._file.length} bytes")
        rest = memoryview(chunk)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._hash.update(chunk)
        self.length += len(chunk)

    def refuse_length(self, got: int) -> None:
        """Raise ``update.length_mismatch``, and leave nothing."""
        self._refuse("update.length_mismatch", f"the server has {got} bytes, signed are {self._file.length}")

    def finish(self) -> None:
        """Check the hash and give the file its name."""
        digest = self._hash.hexdigest()
        if digest != self._file.sha256:
            self._refuse("update.hash_mismatch", f"got {digest}, signed is {self._file.sha256}")
        os.fsync(self._stream.fileno())
        self._path.rename(self._place)
        verified.sync_directory(self._place.parent)

    def _refuse(self, code: str, detail: str) -> None:
        self._path.unlink(missing_ok=True)
        raise PitheadError(code, detail, sha256=self._file.sha256)


def _download(source: _Source, file: VerifiedFile, part: _Part) -> None:
    until = source.until
    with _connection(source) as connection:
        headers = {"Range": f"bytes={part.length}-"} if part.length else {}
        connection.request("GET", artifact_path(file.sha256), headers=headers)
        response = connection.getresponse()
        _check_answer(response, file, part)
        while part.length < file.length:
            left = until - time.monotonic()
            if left <= 0:
                raise PitheadError("update.unreachable", f"deadline passed at {part.length} bytes")
            if connection.sock is not None:
                connection.sock.settimeout(min(IDLE_S, left))
            chunk = response.read1(CHUNK)
            if not chunk:
                raise PitheadError("update.unreachable", f"the connection ended at {part.length} bytes")
            part.write(chunk)


def _check_answer(response: http.client.HTTPResponse, file: VerifiedFile, part: _Part) -> None:
    if response.status == http.client.NOT_FOUND:
        raise PitheadError("update.not_found", f"the server has no {file.sha256}", sha256=file.sha256)
    if response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
        # The server's file ends before the signed length: nothing of it can be right.
        part.refuse_length(part.length)
    if response.status == http.client.PARTIAL_CONTENT:
        matched = _RANGE.fullmatch(response.getheader("Content-Range") or "")
        if matched is None or int(matched[1]) != part.length:
            raise PitheadError("update.unreachable", "the server answered another range than was asked")
        total: int | None = int(matched[3])
    elif response.status == http.client.OK:
        part.restart()
        total = response.length
    else:
        raise PitheadError("update.unreachable", f"the server answered {response.status} {response.reason}")
    if total is not None and total != file.length:
        part.refuse_length(total)


@contextmanager
def _connection(source: _Source) -> Iterator[http.client.HTTPSConnection]:
    """Connect to the server with the device's certificate; every network error is ``update.unreachable``."""
    layout = source.layout
    try:
        address = urlsplit(source.server)
        port = address.port or 443
        tls = ssl.create_default_context(cafile=str(layout.server_ca))
        tls.load_cert_chain(layout.certificate, layout.key)
    except (OSError, ValueError) as error:
        raise PitheadError("storage.corrupt", f"the device's identity: {error}") from error
    if not source.check_time:
        # With a clock that is known to be wrong no certificate is valid. What
        # arrives is checked by its signed hash all the same.
        tls.verify_flags |= NO_CHECK_TIME
    timeout = max(0.1, min(IDLE_S, source.until - time.monotonic()))
    connection = http.client.HTTPSConnection(address.hostname or "", port, timeout=timeout, context=tls)
    try:
        connection.connect()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise PitheadError("update.unreachable", f"{source.server}: {error}") from error
    try:
        yield connection
    except (ssl.SSLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise PitheadError("update.unreachable", f"{source.server}: {error}") from error
    finally:
        connection.close()


def _is_whole(layout: Layout, file: VerifiedFile) -> bool:
    with layout.object(file.sha256).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256
