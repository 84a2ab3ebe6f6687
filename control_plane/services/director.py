"""Sign what each device shall be, when it changed or grows old, and answer with all that it must check."""

import hashlib
import logging
import threading
from typing import Final

import msgspec
from sqlmodel import Session

from contract.bundle import Bundle, RepositoryMetadata
from contract.messages import PROTOCOL_VERSION, DesiredHint
from control_plane.ports import Clock, MetadataSigner
from control_plane.services import desired
from control_plane.services.image_repository import ImageRepository
from control_plane.signing import director
from control_plane.signing.director import DirectorMetadata
from control_plane.signing.image import ImageMetadata
from control_plane.store import tuf as store
from control_plane.store.database import Database

log = logging.getLogger(__name__)

MAX_REMEMBERED: Final = 200_000
"""Devices whose ETag is remembered."""

_Key = tuple[int, bytes | None, int, int]


class Director:
    """The director repository of every device."""

    def __init__(
        self, database: Database, signer: MetadataSigner, image_repository: ImageRepository, clock: Clock
    ) -> None:
        self._database = database
        self._signer = signer
        self._image = image_repository
        self._clock = clock
        self._lock = threading.Lock()
        self._etags: dict[str, tuple[_Key, str]] = {}

    def bundle(self, device_id: str) -> tuple[bytes, str]:
        """Return the device's bundle (msgpack) and its ETag, the SHA-256 in hex."""
        content, etag, _ = self._bundle(device_id)
        return content, etag

    def unchanged(self, device_id: str, etag: str) -> bool:
        """Whether the device's bundle still has this ETag, without building it; so nearly every poll ends."""
        with self._database.reading() as tx:
            signed = self._read(tx, device_id)
            if not director.is_current(signed, desired.read(tx, device_id), self._clock()):
                return False
            assert signed is not None
            key = self._key(signed, self._image.read(tx), self._image.director_roots(tx))
        with self._lock:
            return self._etags.get(device_id) == (key, etag)

    def hint(self, device_id: str) -> DesiredHint:
        """Return the hint that tells a device of its newest bundle."""
        _, etag, version = self._bundle(device_id)
        return DesiredHint(v=PROTOCOL_VERSION, device=device_id, version=version, sha256=etag)

    def _bundle(self, device_id: str) -> tuple[bytes, str, int]:
        with self._database.reading() as tx:
            signed = self._read(tx, device_id)
            image = self._image.read(tx)
            roots = self._image.director_roots(tx)
            current = director.is_current(signed, desired.read(tx, device_id), self._clock())
        if signed is None or not current:
            signed = self._sign(device_id)
        content = msgspec.msgpack.encode(
            Bundle(
                director=RepositoryMetadata(
                    roots=roots,
                    timestamp=signed.timestamp,
                    snapshot=signed.snapshot,
                    targets=signed.targets,
                ),
                image=image.for_device(),
            )
        )
        etag = hashlib.sha256(content).hexdigest()
        with self._lock:
            if len(self._etags) >= MAX_REMEMBERED:
                self._etags.clear()
            self._etags[device_id] = (self._key(signed, image, roots), etag)
        return content, etag, signed.version

    def _sign(self, device_id: str) -> DirectorMetadata:
        with self._database.transaction() as tx:
            wanted = desired.read(tx, device_id)
            signed = self._read(tx, device_id)
            now = self._clock()
            if signed is not None and director.is_current(signed, wanted, now):
                return signed
            new = director.build(wanted, 0 if signed is None else signed.version, now, self._signer)
            store.put_director(tx, device_id, store.DirectorRecord(**msgspec.structs.asdict(new)))
        log.info(
            "director.signed",
            extra={"facts": {"device": device_id, "version": new.version, "revision": wanted.revision}},
        )
        return new

    @staticmethod
    def _read(tx: Session, device_id: str) -> DirectorMetadata | None:
        record = store.director(tx, device_id)
        return None if record is None else DirectorMetadata(**msgspec.structs.asdict(record))

    @staticmethod
    def _key(signed: DirectorMetadata, image: ImageMetadata, roots: tuple[bytes, ...]) -> _Key:
        return signed.version, image.timestamp, len(image.roots), len(roots)
