"""``pithead release``: sign a model package here, then hand files and signature to the control plane.

Keys never leave this process. What the server says of earlier releases is
signed again together with the new one, so it is believed only when a release
key has signed it: one given here, or one that a root given here vouches for.
"""

import base64
import hashlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, TargetFile, Targets

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, Manifest, floor_path, target_path
from control_plane.cli.client import Client, ServerOption, TokenOption, connect
from control_plane.signing import image
from control_plane.signing.metadata import next_version
from provisioning.cli import passphrase_for
from provisioning.keys import RELEASE_DAYS, RELEASE_ROLE, load_key, sign, utc_now

CHUNK: Final = 256 * 1024

release_app = typer.Typer(add_completion=False, name="release", help="Sign a model package and publish it.")


class Package(msgspec.Struct, frozen=True):
    """A package on disk: its manifest and, by path, length and SHA-256 of every file."""

    directory: Path
    manifest: Manifest
    files: dict[str, tuple[int, str]]


@release_app.command()
def release_command(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE_DIR", help="Directory with manifest.json.")],
    key: Annotated[list[Path], typer.Option("--key", help="Release key; repeat for more signatures.")],
    min_release_counter: Annotated[
        int | None,
        typer.Option(help="Raise the model's floor: no device installs a lower release counter again."),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option("--root", help="Trusted root of the image repository, to believe other release keys."),
    ] = None,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Sign a model package with release keys and publish it."""
    console = Console(stderr=True)
    found = read_package(package)
    signers = [load_key(path, passphrase_for(path)) for path in key]
    trusted = root.read_bytes() if root is not None else None
    with connect(server, token) as client, _progress(console) as progress:
        done = publish(
            client, found, signers, min_release_counter=min_release_counter, root=trusted, progress=progress
        )
    console.print(
        f"released [bold]{done['model_name']} {done['version']}[/bold] "
        f"(release counter {done['release_counter']}, {len(found.files)} files)"
    )


def publish(
    client: Client,
    package: Package,
    signers: list[CryptoSigner],
    *,
    min_release_counter: int | None = None,
    root: bytes | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sign and upload ``package``; return the version as the API then shows it."""
    answer = client.get("/api/v1/release-metadata")
    current = trusted_release(
        base64.b64decode(answer["release"]),
        signers,
        roots=[base64.b64decode(data) for data in answer["roots"]],
        targets=base64.b64decode(answer["targets"]),
        root=root,
    )
    extend(current, package, min_release_counter)
    metadata = sign(current, signers)
    for path, (length, sha256) in package.files.items():
        task = progress.add_task(path, total=length) if progress is not None else None
        client.put(f"/api/v1/staging/{sha256}", content=_chunks(package.directory / path, progress, task))
    published: dict[str, Any] = client.post(
        "/api/v1/releases",
        {
            "name": package.manifest.name,
            "version": package.manifest.version,
            "release_metadata": base64.b64encode(metadata).decode(),
        },
    )
    return published


def read_package(directory: Path) -> Package:
    """Read a package's manifest, and check every file that it names.

    Raises ``package.*`` naming the file.
    """
    path = directory / MANIFEST_NAME
    try:
        raw = path.read_bytes()
        manifest = msgspec.json.decode(raw, type=Manifest)
    except OSError as error:
        raise PitheadError("package.file_missing", f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise PitheadError("package.manifest_invalid", f"{path}: {error}") from error
    files = {MANIFEST_NAME: (len(raw), hashlib.sha256(raw).hexdigest())}
    for ref in manifest.files():
        try:
            with (directory / ref.path).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                length = file.tell()
        except OSError as error:
            raise PitheadError("package.file_missing", f"{ref.path}: {error.strerror}") from error
        if (length, digest) != (ref.length, ref.sha256):
            raise PitheadError("package.file_mismatch", f"{ref.path} differs from the manifest")
        files[ref.path] = (length, digest)
    return Package(directory, manifest, files)


def trusted_release(
    data: bytes, signers: list[CryptoSigner], *, roots: list[bytes], targets: bytes, root: bytes | None
) -> Targets:
    """Return the server's newest release metadata once a release key that we trust has signed it."""
    try:
        metadata = Metadata[Any].from_bytes(data)
    except RepositoryError as error:
        raise PitheadError("release.signature_invalid", f"the server's metadata: {error}") from error
    if not isinstance(metadata.signed, Targets):
        raise PitheadError("release.signature_invalid", "the server's metadata is no release metadata")
    if root is not None:
        _check_from_root(metadata, roots, targets, root)
        return metadata.signed
    for signer in signers:
        signature = metadata.signatures.get(signer.public_key.keyid)
        if signature is not None:
            try:
                signer.public_key.verify_signature(signature, metadata.signed_bytes)
            except UnverifiedSignatureError as error:
                raise PitheadError(
                    "release.signature_invalid", "the server's metadata was changed"
                ) from error
            return metadata.signed
    raise PitheadError(
        "release.signature_invalid",
        "earlier releases are signed by none of the keys given; name the image repository's root with --root",
    )


def extend(current: Targets, package: Package, min_release_counter: int | None) -> None:
    """Add ``package`` to the release metadata, with the next version and a new expiry."""
    manifest = package.manifest
    for path, (length, digest) in package.files.items():
        target = target_path(manifest.name, manifest.version, path)
        custom = {"release_counter": manifest.release_counter} if path == MANIFEST_NAME else None
        current.targets[target] = _target(target, length, digest, custom)
    if min_release_counter is not None:
        floor: dict[str, Any] = {"min_release_counter": min_release_counter}
        text = msgspec.json.encode(floor)
        target = floor_path(manifest.name)
        current.targets[target] = _target(target, len(text), hashlib.sha256(text).hexdigest(), floor)
    current.version = next_version(current.version, round(utc_now().timestamp()) * 1_000_000)
    current.expires = utc_now() + timedelta(days=RELEASE_DAYS)


def _check_from_root(metadata: Metadata[Any], roots: list[bytes], targets: bytes, root: bytes) -> None:
    trusted = image.check_roots([root]) if not roots else image.check_roots(roots)
    if root not in roots:
        raise PitheadError("release.signature_invalid", "the server's roots do not hold the root given")
    try:
        top = Metadata[Any].from_bytes(targets)
        trusted.verify_delegate("targets", top.signed_bytes, top.signatures)
        top.signed.verify_delegate(RELEASE_ROLE, metadata.signed_bytes, metadata.signatures)
    except (RepositoryError, ValueError) as error:
        raise PitheadError("release.signature_invalid", f"the server's metadata: {error}") from error


def _target(path: str, length: int, digest: str, custom: dict[str, Any] | None) -> TargetFile:
    fields = None if custom is None else {"custom": custom}
    return TargetFile(length, {"sha256": digest}, path, fields)


def _chunks(path: Path, progress: Progress | None, task: TaskID | None) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk
            if progress is not None and task is not None:
                progress.update(task, advance=len(chunk))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    )
