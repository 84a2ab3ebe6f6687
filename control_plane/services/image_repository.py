"""The image repository in the database: taken over from a ceremony, extended by releases, kept fresh."""

import logging
import re
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from sqlmodel import Session

from contract.errors import PitheadError
from control_plane.ports import Clock, MetadataSigner
from control_plane.services import events
from control_plane.signing import image
from control_plane.signing.image import ImageMetadata
from control_plane.store import tuf as store
from control_plane.store.database import Database
from provisioning import durable
from provisioning.keys import NEWEST_RELEASE, RELEASE_ROLE, WARN_BEFORE

log = logging.getLogger(__name__)

IMAGE: Final = "image"
DIRECTOR: Final = "director"
KEPT: Final = 8
"""Versions kept of snapshot and timestamp."""

_FILE: Final = re.compile(r"(\d+)\.(root|targets|release)\.json")


class ImageRepository:
    """Answers with the newest signed metadata of all models, and keeps them fresh."""

    def __init__(self, database: Database, signer: MetadataSigner, tuf_dir: Path, clock: Clock) -> None:
        self._database = database
        self._signer = signer
        self._tuf_dir = tuf_dir
        self._clock = clock
        self._lock = threading.Lock()
        self._cached: tuple[dict[str, int], ImageMetadata] | None = None

    def prepare(self) -> None:
        """Take over the files that a ceremony has left in the data directory, and renew what is due.

        Raises ``config.invalid`` naming the command when there are none, or
        when they do not belong to this database.
        """
        with self._database.transaction() as tx:
            for repository in (IMAGE, DIRECTOR):
                self._take_over(tx, repository)
            found = self._load(tx)
            image.check_offline(found.roots, found.targets, found.release)
            image.check_roots(store.all_versions(tx, DIRECTOR, "root"))
        self.renew()
        self.show()

    def show(self) -> None:
        """Put a copy of the newest release metadata where `pithead keys status` finds it."""
        with self._database.reading() as tx:
            release = self.read(tx).release
        try:
            durable.write(self._tuf_dir / NEWEST_RELEASE, release)
        except OSError as error:
            log.warning("image_repository.not_shown", extra={"facts": {"error": str(error)}})

    def warn(self) -> list[str]:
        """Log and return what was signed offline and will expire before long."""
        with self._database.reading() as tx:
            found = self.read(tx)
            signed = {
                "image root": found.roots[-1],
                "image targets": found.targets,
                "release metadata": found.release,
                "director root": self.director_roots(tx)[-1],
            }
        now = datetime.fromtimestamp(self._clock() / 1_000_000, UTC)
        ending = {name: image.expiry_of(data) for name, data in signed.items()}
        ending = {name: until for name, until in ending.items() if until - now < WARN_BEFORE}
        for name, until in ending.items():
            log.warning(
                "image_repository.expires_soon",
                extra={
                    "facts": {"what": name, "expires": until.isoformat(), "days_left": (until - now).days}
                },
            )
        return list(ending)

    def renew(self) -> bool:
        """Sign snapshot and timestamp again when they are due; whether they were."""
        with self._database.reading() as tx:
            if not image.needs_renewal(self.read(tx), self._clock()):
                return False
        with self._database.transaction() as tx:
            found = self._load(tx)
            if not image.needs_renewal(found, self._clock()):
                return False
            self._store(tx, image.publish(found, self._clock(), self._signer))
        log.info("image_repository.renewed")
        return True

    def adopt(self, tx: Session, release: bytes) -> ImageMetadata:
        """Take in checked release metadata, in the caller's transaction."""
        found = self._load(tx)
        store.put(tx, IMAGE, RELEASE_ROLE, image.version_of(release), release, self._clock())
        new = image.publish(
            ImageMetadata(found.roots, found.targets, release, found.snapshot, found.timestamp),
            self._clock(),
            self._signer,
        )
        self._store(tx, new)
        return new

    def read(self, tx: Session) -> ImageMetadata:
        """Return the newest files. They are read again only when a version has risen."""
        versions = store.state(tx, IMAGE)
        with self._lock:
            cached = self._cached
        if cached is not None and cached[0] == versions:
            return cached[1]
        found = self._load(tx)
        with self._lock:
            self._cached = (versions, found)
        return found

    def director_roots(self, tx: Session) -> tuple[bytes, ...]:
        """Return every version of the director's root."""
        return store.all_versions(tx, DIRECTOR, "root")

    def _load(self, tx: Session) -> ImageMetadata:
        targets = store.newest(tx, IMAGE, "targets")
        release = store.newest(tx, IMAGE, RELEASE_ROLE)
        if targets is None or release is None:
            raise PitheadError(
                "config.invalid",
                f"no signed metadata in {self._tuf_dir}; hold the ceremony: pithead keys init",
            )
        return ImageMetadata(
            roots=store.all_versions(tx, IMAGE, "root"),
            targets=targets,
            release=release,
            snapshot=store.newest(tx, IMAGE, "snapshot"),
            timestamp=store.newest(tx, IMAGE, "timestamp"),
        )

    def _store(self, tx: Session, new: ImageMetadata) -> None:
        for role, content in (("snapshot", new.snapshot), ("timestamp", new.timestamp)):
            assert content is not None
            store.put(tx, IMAGE, role, image.version_of(content), content, self._clock())
            store.prune(tx, IMAGE, role, KEPT)

    def _take_over(self, tx: Session, repository: str) -> None:
        for path in sorted((self._tuf_dir / repository).glob("*.json")):
            matched = _FILE.fullmatch(path.name)
            if matched is None:
                continue
            try:
                new = store.put(tx, repository, matched[2], int(matched[1]), path.read_bytes(), self._clock())
            except PitheadError as error:
                raise PitheadError(
                    "config.invalid",
                    f"{path} is not of the ceremony that this database knows: {error.detail}",
                ) from error
            if new:
                events.record(tx, actor="system", kind="metadata.taken_over", subject=str(path.name))
