"""Publish a version: check all that was signed and uploaded, then let it stand, or leave no trace."""

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from sqlmodel import Session

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, Manifest, target_path
from contract.messages import ModelAssignment, Role
from control_plane.ports import Clock
from control_plane.services import admission, events
from control_plane.services.image_repository import ImageRepository
from control_plane.services.staging import Staging, Upload
from control_plane.signing import image
from control_plane.store import registry as store
from control_plane.store.database import Database
from control_plane.store.ids import new_id
from provisioning.durable import make_directory, sync_directory

log = logging.getLogger(__name__)

CHUNK: Final = 1024 * 1024
USELESS: Final = frozenset({"release.not_admitted", "package.manifest_invalid", "package.file_mismatch"})
"""What cannot become better by publishing the same files again: they leave the staging directory."""


class Releases:
    """The registry as a service. Uploads go to a staging directory, released files to ``objects``."""

    def __init__(
        self,
        database: Database,
        image_repository: ImageRepository,
        objects: Path,
        staging: Staging,
        clock: Clock,
        admit: Callable[[Path], dict[str, Any]] = admission.validate,
    ) -> None:
        self._database = database
        self._image = image_repository
        self.objects = objects
        self._staging = staging
        self._clock = clock
        self._admit = admit
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Make the directories, and sweep what earlier uploads have left."""
        make_directory(self.objects, 0o755)
        self._staging.prepare()
        for left in self._staging.directory.glob("admit-*"):
            shutil.rmtree(left)

    def sweep(self) -> int:
        """Remove uploads that nobody published; return how many."""
        return self._staging.sweep()

    def current(self) -> image.ImageMetadata:
        """Return the newest metadata of the image repository, for whoever signs the next release."""
        with self._database.reading() as tx:
            return self._image.read(tx)

    def stage(self, sha256: str) -> Upload:
        """Begin the upload of a file with this hash."""
        return self._staging.open(sha256)

    def staged(self, sha256: str) -> None:
        """Take note that an upload has finished.

        A file that is released already goes to its place at once: so a file
        that was damaged in storage is mended by uploading it again.
        """
        with self._database.reading() as tx:
            known = store.is_artifact(tx, sha256)
        if known:
            self._keep([sha256])
            log.info("artifact.restored", extra={"facts": {"sha256": sha256}})

    def publish(self, actor: str, name: str, version: str, metadata: bytes) -> store.VersionDetail:
        """Publish what ``metadata`` (signed by a release key) adds: exactly the files of one version.

        Raises the codes of ``signing.image.check_release``, and
        ``package.*`` or ``release.not_admitted`` for the package itself.
        """
        with self._lock:
            current = self.current()
            release = image.check_release(current, metadata, name, version, self._clock())
            try:
                manifest, raw = self._check_files(release, name, version)
                with self._assembled(release) as directory:
                    report = self._admit(directory)
            except PitheadError as error:
                if error.code in USELESS:
                    self._staging.discard(sha256 for _, sha256 in release.files.values())
                raise
            self._keep([sha256 for _, sha256 in release.files.values()])
            record = store.VersionRecord(
                model_name=name,
                version=version,
                release_counter=manifest.release_counter,
                manifest_sha256=release.files[MANIFEST_NAME][1],
                manifest_length=release.files[MANIFEST_NAME][0],
                released_at=self._clock(),
                released_by=actor,
            )
            self._commit(actor, record, release, metadata, current.release, raw, report)
        self._image.show()
        log.info("model.released", extra={"facts": {"model": name, "version": version, "actor": actor}})
        return self.version(name, version)

    def models(self) -> list[store.ModelRecord]:
        """Return all models with their versions."""
        with self._database.reading() as tx:
            return store.models(tx)

    def model(self, name: str) -> store.ModelRecord:
        """Return one model; ``request.not_found``."""
        with self._database.reading() as tx:
            found = store.models(tx, name)
        if not found:
            raise PitheadError("request.not_found", f"no model {name}")
        return found[0]

    def version(self, name: str, version: str) -> store.VersionDetail:
        """Return one released version with its manifest; ``request.not_found``."""
        with self._database.reading() as tx:
            found = store.detail(tx, name, version)
        if found is None:
            raise PitheadError("request.not_found", f"no version {version} of a model {name}")
        return found

    def _check_files(self, release: image.Release, name: str, version: str) -> tuple[Manifest, bytes]:
        for path, (length, sha256) in release.files.items():
            staged = self._find(sha256)
            if staged is None:
                raise PitheadError("package.file_missing", f"{path} ({sha256}) was not uploaded", path=path)
            if (staged.stat().st_size, _sha256(staged)) != (length, sha256):
                raise PitheadError(
                    "package.file_mismatch", f"{path} differs from its signed length or hash", path=path
                )
            os.utime(staged)  # no sweep takes it away while the package is looked at
        found = self._find(release.files[MANIFEST_NAME][1])
        assert found is not None
        raw = found.read_bytes()
        try:
            manifest = msgspec.json.decode(raw, type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PitheadError("package.manifest_invalid", str(error)) from error
        said = (manifest.name, manifest.version, manifest.release_counter)
        if said != (name, version, release.release_counter):
            raise PitheadError(
                "package.manifest_invalid",
                f"the manifest says {said}, the release {(name, version, release.release_counter)}",
            )
        named = {ref.path: (ref.length, ref.sha256) for ref in manifest.files()}
        signed = {path: entry for path, entry in release.files.items() if path != MANIFEST_NAME}
        if named != signed:
            differing = sorted(
                path for path in named.keys() | signed.keys() if named.get(path) != signed.get(path)
            )
            raise PitheadError("package.file_mismatch", f"manifest and signed files differ: {differing}")
        return manifest, raw

    def _find(self, sha256: str) -> Path | None:
        for path in (self._staging.path(sha256), self.objects / sha256):
            if path.is_file():
                return path
        return None

    @contextmanager
    def _assembled(self, release: image.Release) -> Iterator[Path]:
        """Put the package together as it was, by links, for as long as somebody looks at it."""
        directory = self._staging.directory / f"admit-{new_id()}"
        try:
            for path, (_, sha256) in release.files.items():
                found = self._find(sha256)
                assert found is not None
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                os.link(found, directory / path)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _keep(self, hashes: list[str]) -> None:
        for sha256 in hashes:
            staged = self._staging.path(sha256)
            if staged.is_file():
                staged.chmod(0o644)
                staged.replace(self.objects / sha256)
        sync_directory(self.objects)

    def _commit(
        self,
        actor: str,
        record: store.VersionRecord,
        release: image.Release,
        metadata: bytes,
        follows: bytes,
        manifest: bytes,
        report: dict[str, Any],
    ) -> None:
        with self._database.transaction() as tx:
            if self._image.read(tx).release != follows:
                raise PitheadError("request.conflict", "another release came first; fetch and sign again")
            store.add_version(
                tx,
                record,
                manifest=manifest.decode(),
                report=msgspec.json.encode(report).decode(),
                files=[
                    store.FileRecord(path=path, sha256=sha256, length=length)
                    for path, (length, sha256) in sorted(release.files.items())
                ],
            )
            if release.floor is not None:
                store.set_floor(tx, record.model_name, release.floor)
            self._image.adopt(tx, metadata)
            events.record(
                tx,
                actor=actor,
                kind="model.released",
                subject=f"{record.model_name} {record.version}",
                facts={"release_counter": record.release_counter, "floor": release.floor},
            )


def assignment(tx: Session, name: str, version: str, role: Role = Role.ACTIVE) -> ModelAssignment:
    """Return the assignment of a released version, to be completed by ``msgspec.structs.replace``.

    Raises ``request.not_found`` when it was never released, and
    ``update.below_floor`` when devices would refuse it.
    """
    record = store.version(tx, name, version)
    if record is None:
        raise PitheadError("request.not_found", f"no version {version} of a model {name}")
    floor = store.models(tx, name)[0].min_release_counter
    if floor is not None and record.release_counter < floor:
        raise PitheadError(
            "update.below_floor",
            f"{name} {version} has the release counter {record.release_counter}",
            floor=floor,
        )
    return ModelAssignment(
        model_name=name,
        version=version,
        role=role,
        manifest_path=target_path(name, version, MANIFEST_NAME),
        manifest_sha256=record.manifest_sha256,
        manifest_length=record.manifest_length,
        release_counter=record.release_counter,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
