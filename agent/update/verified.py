"""What the last successful refresh verified, as one file: whole, or not there."""

import os
import secrets
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.errors import FULL
from contract.errors import PitheadError
from contract.messages import Count, Desired, Micros, Sha256


class VerifiedFile(Struct, frozen=True, array_like=True):
    """A file that may be fetched."""

    sha256: Sha256
    length: Count


class Verified(Struct, frozen=True):
    """The outcome of a refresh. ``fetch`` needs no more than this."""

    desired: Desired
    files: dict[str, VerifiedFile]
    """By TUF target path: the files of every assigned version, and no others."""
    time_floor: Micros
    bundle: bytes
    """The metadata themselves."""


_decoder = msgspec.msgpack.Decoder(Verified)


def read(path: Path) -> Verified | None:
    """Return the newest; None when there is none. A damaged one is ``storage.corrupt``."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PitheadError("storage.failed", f"reading {path}: {error.strerror}") from error
    try:
        return _decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise PitheadError("storage.corrupt", f"{path}: {error}; check for updates again") from error


def write(path: Path, verified: Verified) -> None:
    """Replace the newest, durably. On failure the old one stands."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(msgspec.msgpack.encode(verified))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise failed(error, f"writing {path}") from error


def sweep(directory: Path) -> None:
    """Delete what an interrupted write has left."""
    for left in directory.glob("*.tmp"):
        left.unlink(missing_ok=True)


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def failed(error: OSError, doing: str) -> PitheadError:
    """Return our error for a failed write."""
    code = "update.disk_full" if error.errno in FULL else "storage.failed"
    return PitheadError(code, f"{doing}: {error.strerror or error}", errno=error.errno)
