"""Verify a bundle and, when all of it holds, remember it and return what this device shall be."""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from tuf.api.exceptions import RepositoryError

from agent.core.layout import Layout
from agent.core.trusted_time import BUILT
from agent.update import agreement, marks, verified
from agent.update.marks import Key, Mark, MarkStore
from agent.update.tuf_client import RepositoryFiles, VerifiedRepository
from agent.update.verified import Verified, VerifiedFile
from contract.bundle import Bundle
from contract.errors import PitheadError
from contract.manifest import target_path
from contract.messages import Desired

log = logging.getLogger(__name__)

MAX_BUNDLE: Final = 4 * 1024 * 1024
RELEASE_ROLE: Final = "release"
WORK: Final = "update-work-"
DIRECTOR: Final = "director"
IMAGE: Final = "image"


class Anchors(Struct, frozen=True):
    """Who the device is, and the roots that it got at enrolment."""

    device: str
    image_root: bytes
    director_root: bytes


class _Identity(Struct):
    """What this process needs of ``identity.json``."""

    device: str


def refresh(layout: Layout, bundle: Path, now: int) -> Verified:
    """Verify the bundle in a file; ``now`` is the system's time, microseconds UTC.

    On success metadata and marks are durable before this returns. On any
    error, ``update.*`` or ``storage.*``, nothing has changed.
    """
    anchors = read_anchors(layout)
    try:
        with bundle.open("rb") as file:
            raw = file.read(MAX_BUNDLE + 1)
    except OSError as error:
        raise PitheadError("storage.failed", f"reading {bundle}: {error.strerror}") from error
    if len(raw) > MAX_BUNDLE:
        raise PitheadError("update.metadata_too_large", f"bundle: limit {MAX_BUNDLE} bytes", limit=MAX_BUNDLE)
    try:
        verified.make_directory(layout.tuf)
        verified.make_directory(layout.run_dir)
        with _alone(layout.tuf), _work_directory(layout.run_dir) as work:
            return _refresh(layout.tuf, anchors, raw, now, work)
    except OSError as error:
        raise verified.failed(error, f"using {layout.tuf}") from error


def read_anchors(layout: Layout) -> Anchors:
    """Return the device's identity, as far as updates need it; ``storage.corrupt`` when it is not whole."""
    try:
        identity = msgspec.json.decode(layout.identity_file.read_bytes(), type=_Identity)
        return Anchors(identity.device, layout.image_root.read_bytes(), layout.director_root.read_bytes())
    except OSError as error:
        raise PitheadError(
            "storage.corrupt", f"the device's identity is not whole: {error}; enrol it"
        ) from error
    except msgspec.MsgspecError as error:
        raise PitheadError("storage.corrupt", f"{layout.identity_file}: {error}; enrol again") from error


def marks_path(tuf: Path) -> Path:
    """Return where the high-water marks lie."""
    return tuf / "marks.db"


def verified_path(tuf: Path) -> Path:
    """Return where the outcome of the last refresh lies."""
    return tuf / "verified"


def _refresh(tuf: Path, anchors: Anchors, raw: bytes, now: int, work: Path) -> Verified:
    bundle = _decode(raw)
    store = MarkStore(marks_path(tuf))
    earlier = _earlier(tuf)
    seen = store.read() or _remembered(earlier)
    director = VerifiedRepository(DIRECTOR, bundle.director, anchors.director_root, work / DIRECTOR)
    image = VerifiedRepository(IMAGE, bundle.image, anchors.image_root, work / IMAGE)
    image.load_delegated(RELEASE_ROLE, target_path("-", "-", "-"))
    # First of all: versions are counted per device, so another device's say nothing here.
    desired = agreement.desired_of(anchors.device, director.top_targets)
    new = director.marks() | image.marks()
    authorities = director.authorities() | image.authorities()
    marks.check(seen, new, authorities)
    floor = max(BUILT, marks.time_floor(seen, authorities), marks.time_floor(new, authorities))
    for repository in (director, image):
        repository.check_expiry(max(now, floor))
    for assignment in desired.models:
        agreement.check_assignment(assignment, image.target)
    verified.sweep(tuf)
    outcome = Verified(desired=desired, files=_files(desired, image), time_floor=floor, bundle=raw)
    if outcome != earlier:
        verified.write(verified_path(tuf), outcome)
    if any(seen.get(key) != mark for key, mark in new.items()) or not store.path.exists():
        store.write(new)
    return outcome


def _decode(raw: bytes) -> Bundle:
    try:
        return msgspec.msgpack.decode(raw, type=Bundle)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PitheadError("update.metadata_invalid", f"bundle: {error}") from error


def _files(desired: Desired, image: VerifiedRepository) -> dict[str, VerifiedFile]:
    found: dict[str, VerifiedFile] = {}
    for assignment in desired.models:
        for path in image.paths(target_path(assignment.model_name, assignment.version, "")):
            target = image.target(path)
            if target is not None and "sha256" in target.hashes:
                found[path] = VerifiedFile(target.hashes["sha256"], target.length)
    return found


def _earlier(tuf: Path) -> Verified | None:
    try:
        return verified.read(verified_path(tuf))
    except PitheadError as error:
        log.warning("verified.unreadable", extra={"facts": {"code": error.code, "detail": error.detail}})
        return None


def _remembered(earlier: Verified | None) -> dict[Key, Mark]:
    """Return the marks as the stored metadata show them, for a device whose marks were lost."""
    if earlier is None:
        return {}
    log.warning("marks.lost")
    found: dict[Key, Mark] = {}
    try:
        bundle = msgspec.msgpack.decode(earlier.bundle, type=Bundle)
        for name, files in ((DIRECTOR, bundle.director), (IMAGE, bundle.image)):
            stored = RepositoryFiles(name, files)
            for role in files.delegated:
                stored.load(role)
            found |= stored.marks()
    except (msgspec.MsgspecError, RepositoryError, ValueError) as error:
        log.warning("verified.unreadable", extra={"facts": {"detail": str(error)}})
    return found


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait until no other process works in ``directory``."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _work_directory(parent: Path) -> Iterator[Path]:
    """Give a directory that is gone afterwards; what a power cut left of earlier ones goes too."""
    for left in parent.glob(f"{WORK}*"):
        shutil.rmtree(left, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=WORK, dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
