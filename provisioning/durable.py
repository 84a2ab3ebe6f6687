"""Files that are either the old or the new after a power cut, never something between."""

import os
from pathlib import Path

PRIVATE = 0o600
PUBLIC = 0o644


def write(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Replace ``path`` by ``data``: temporary file, fsync, rename, fsync of the directory.

    As root the file goes to the owner of its directory, so that a program
    that has given up root, such as the broker, can still read it.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        if os.geteuid() == 0:
            parent = path.parent.stat()
            os.fchown(descriptor, parent.st_uid, parent.st_gid)
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.rename(path)
    sync_directory(path.parent)


def make_directory(path: Path, mode: int) -> None:
    """Make ``path`` and what is above it, durably; ``path`` itself gets ``mode``."""
    missing = [part for part in (path, *path.parents) if not part.exists()]
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)
    for part in reversed(missing):
        sync_directory(part.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
