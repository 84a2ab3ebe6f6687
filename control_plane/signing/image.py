"""The image repository: adopt what was signed offline, and sign snapshot and timestamp for it.

Everything here is a function of bytes; ``services.image_repository`` ties it
to the database.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from msgspec import Struct
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, TargetFile, Targets

from contract.bundle import RepositoryMetadata
from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, floor_path, target_path
from control_plane.ports import MetadataSigner
from control_plane.signing.metadata import next_version, sign, snapshot, timestamp
from provisioning.keys import RELEASE_ROLE

SNAPSHOT_LIFETIME: Final = timedelta(days=7)
RENEW_BEFORE: Final = timedelta(days=4)
MAX_RELEASE: Final = 3 * 1024 * 1024
"""Bytes of the release metadata: a device takes 4 MB of all metadata together."""
MAX_AHEAD_S: Final = 24 * 3600
"""How far a releaser's clock may be ahead: a version is a time, and the next one must be above it."""


class ImageMetadata(Struct, frozen=True):
    """The newest files of the image repository, byte for byte as signed."""

    roots: tuple[bytes, ...]
    targets: bytes
    release: bytes
    snapshot: bytes | None = None
    timestamp: bytes | None = None

    def for_device(self) -> RepositoryMetadata:
        """Return the part of the bundle."""
        if self.snapshot is None or self.timestamp is None:
            raise PitheadError("internal.error", "the image repository has no timestamp yet")
        return RepositoryMetadata(
            roots=self.roots,
            timestamp=self.timestamp,
            snapshot=self.snapshot,
            targets=self.targets,
            delegated={RELEASE_ROLE: self.release},
        )


class Release(Struct, frozen=True):
    """What a new release metadata file adds to the one before."""

    version: int
    """Of the metadata."""
    files: dict[str, tuple[int, str]]
    """Path in the package -> (length, sha256), with the manifest."""
    release_counter: int
    floor: int | None
    """The model's ``min_release_counter`` after this release."""


def check_roots(roots: Sequence[bytes]) -> Root:
    """Return the last root of a chain in which each is signed by the one before and by itself.

    Raises ``config.invalid``.
    """
    trusted: Root | None = None
    for number, data in enumerate(roots, start=1):
        metadata = _load(data, Root, f"{number}.root.json")
        try:
            if metadata.signed.version != number:
                raise PitheadError(
                    "config.invalid", f"{number}.root.json has version {metadata.signed.version}"
                )
            for delegator in (trusted, metadata.signed):
                if delegator is not None:
                    delegator.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
        except RepositoryError as error:
            raise PitheadError("config.invalid", f"{number}.root.json: {error}") from error
        trusted = metadata.signed
    if trusted is None:
        raise PitheadError("config.invalid", "no root metadata; hold the ceremony with `pithead keys init`")
    return trusted


def check_offline(roots: Sequence[bytes], targets: bytes, release: bytes) -> None:
    """Raise ``config.invalid`` unless the roots, targets and release metadata are signed as they must be."""
    root = check_roots(roots)
    top = _load(targets, Targets, "targets.json")
    delegated = _load(release, Targets, "release.json")
    try:
        root.verify_delegate("targets", top.signed_bytes, top.signatures)
        top.signed.verify_delegate(RELEASE_ROLE, delegated.signed_bytes, delegated.signatures)
    except (RepositoryError, ValueError) as error:
        raise PitheadError("config.invalid", f"image repository: {error}") from error


def publish(image: ImageMetadata, now: int, signer: MetadataSigner) -> ImageMetadata:
    """Return ``image`` with a new snapshot and timestamp; ``now`` in microseconds UTC."""
    last = max(version_of(data) for data in (image.snapshot, image.timestamp))
    version = next_version(last, now)
    meta = {
        "targets.json": (version_of(image.targets), image.targets),
        "release.json": (version_of(image.release), image.release),
    }
    shot = sign("image-snapshot", snapshot(version, now, SNAPSHOT_LIFETIME, meta), signer)
    stamp = sign("image-timestamp", timestamp(version, now, SNAPSHOT_LIFETIME, (version, shot)), signer)
    return ImageMetadata(image.roots, image.targets, image.release, shot, stamp)


def needs_renewal(image: ImageMetadata, now: int) -> bool:
    """Whether snapshot and timestamp are missing, soon to expire, or of other targets than there are."""
    if image.snapshot is None or image.timestamp is None:
        return True
    shot = Metadata[Any].from_bytes(image.snapshot).signed
    named = {name: reference.version for name, reference in shot.meta.items()}
    there = {"targets.json": version_of(image.targets), "release.json": version_of(image.release)}
    until = datetime.fromtimestamp(now / 1_000_000, UTC) + RENEW_BEFORE
    return named != there or bool(shot.is_expired(until))


def version_of(data: bytes | None) -> int:
    """Return the version of a signed file; 0 for none."""
    return 0 if data is None else int(Metadata[Any].from_bytes(data).signed.version)


def expiry_of(data: bytes) -> datetime:
    """Return when a signed file expires."""
    expires: datetime = Metadata[Any].from_bytes(data).signed.expires
    return expires


def check_release(image: ImageMetadata, data: bytes, name: str, version: str, now: int) -> Release:
    """Return what ``data`` releases, after every check that needs no file.

    Raises ``release.signature_invalid`` for a key that is no release key,
    ``request.conflict`` when another release came first, ``release.exists``
    for a version that is published, ``release.counter_not_rising``,
    ``request.too_large`` for what no device would take, and
    ``request.invalid`` for anything else.

    The version of the metadata must rise, by as much as the releaser likes:
    it is a time, so that after a database was restored no version can come
    that devices have seen with another content.
    """
    if len(data) > MAX_RELEASE:
        raise PitheadError(
            "request.too_large",
            f"the release metadata have {len(data)} bytes; devices take {MAX_RELEASE}",
            limit=MAX_RELEASE,
        )
    try:
        new = _load(data, Targets, "release metadata")
    except PitheadError as error:
        raise PitheadError("request.invalid", error.detail) from error
    top = _load(image.targets, Targets, "targets.json")
    try:
        top.signed.verify_delegate(RELEASE_ROLE, new.signed_bytes, new.signatures)
    except RepositoryError as error:
        raise PitheadError("release.signature_invalid", str(error)) from error
    old = _load(image.release, Targets, "release.json").signed
    if new.signed.version <= old.version:
        raise PitheadError(
            "request.conflict",
            f"release metadata {new.signed.version} does not follow {old.version}; fetch and sign again",
        )
    if new.signed.version > next_version(old.version, now + MAX_AHEAD_S * 1_000_000):
        raise PitheadError(
            "request.invalid",
            f"version {new.signed.version} of the release metadata is a time in the future; check your clock",
        )
    if new.signed.is_expired(datetime.fromtimestamp(now / 1_000_000, UTC)):
        raise PitheadError("request.invalid", "the release metadata has expired")
    if new.signed.delegations is not None:
        raise PitheadError("request.invalid", "the release role may not delegate")
    return _added(top.signed, old, new.signed, name, version)


def release_counter(target: TargetFile | None) -> int | None:
    """Return the signed counter of a manifest's target."""
    return _number(target, "release_counter")


def minimum_counter(target: TargetFile | None) -> int | None:
    """Return the signed floor of a floor's target."""
    return _number(target, "min_release_counter")


def _added(top: Targets, old: Targets, new: Targets, name: str, version: str) -> Release:
    prefix, floor = target_path(name, version, ""), floor_path(name)
    if target_path(name, version, MANIFEST_NAME) in old.targets:
        raise PitheadError("release.exists", f"{name} {version}")
    for path, target in old.targets.items():
        if path not in new.targets:
            raise PitheadError(
                "request.conflict", f"{path} is missing: another release came first; fetch and sign again"
            )
        if path != floor and new.targets[path] != target:
            raise PitheadError("request.invalid", f"{path}: a released file never changes")
    added = {
        path: target for path, target in new.targets.items() if path not in old.targets and path != floor
    }
    for path in added:
        if not path.startswith(prefix):
            raise PitheadError("request.invalid", f"{path} is not of {name} {version}")
        assert top.delegations is not None
        if not list(top.delegations.get_roles_for_target(path)):
            raise PitheadError("request.invalid", f"{path}: the release role may not sign this path")
    counter = release_counter(added.get(target_path(name, version, MANIFEST_NAME)))
    if counter is None:
        raise PitheadError(
            "request.invalid", f"no signed manifest of {name} {version} with a release counter"
        )
    newest = max((_counters(old, name)), default=0)
    if counter <= newest:
        raise PitheadError("release.counter_not_rising", f"{counter} after {newest}", newest=newest)
    return Release(
        version=new.version,
        files={
            path.removeprefix(prefix): (target.length, _sha256(path, target))
            for path, target in added.items()
        },
        release_counter=counter,
        floor=_floor(old, new, floor, counter),
    )


def _counters(targets: Targets, name: str) -> list[int]:
    prefix = target_path(name, "", "").removesuffix("/")
    found = (
        release_counter(target)
        for path, target in targets.targets.items()
        if path.startswith(prefix) and path.endswith(f"/{MANIFEST_NAME}")
    )
    return [counter for counter in found if counter is not None]


def _floor(old: Targets, new: Targets, path: str, counter: int) -> int | None:
    before, after = minimum_counter(old.targets.get(path)), minimum_counter(new.targets.get(path))
    if before is not None and (after is None or after < before):
        raise PitheadError("request.invalid", f"{path}: the floor {before} never falls")
    if after is not None and after > counter:
        raise PitheadError(
            "request.invalid", f"{path}: the floor {after} is above the newest release, {counter}"
        )
    return after


def _sha256(path: str, target: TargetFile) -> str:
    digest = target.hashes.get("sha256")
    if digest is None:
        raise PitheadError("request.invalid", f"{path}: no SHA-256 in the signed metadata")
    return digest


def _number(target: TargetFile | None, field: str) -> int | None:
    custom = None if target is None else target.custom
    value = custom.get(field) if isinstance(custom, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _load(data: bytes, kind: type[Any], name: str) -> Metadata[Any]:
    try:
        metadata = Metadata[Any].from_bytes(data)
    except RepositoryError as error:
        raise PitheadError("config.invalid", f"{name}: {error}") from error
    if not isinstance(metadata.signed, kind):
        raise PitheadError("config.invalid", f"{name} is of the type {metadata.signed.type}")
    return metadata
