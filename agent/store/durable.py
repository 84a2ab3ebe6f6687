"""Writes that survive a power cut: whole or not at all."""

import contextlib
import os
import secrets
from pathlib import Path
from typing import Final

from agent.errors import from_os

TEMPORARY: Final = ".tmp-"
"""Names of unfinished files begin so; whatever a power cut left of them may be deleted."""


def write(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``data``: temporary file, fsync, rename, fsync of the directory.

    Raises ``storage.full`` or ``storage.failed``; then the old content stands.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}"
    try:
        make_directory(path.parent)
        _write_synced(temporary, data, mode)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise from_os(error, f"writing {path}") from error


def write_directory(path: Path, files: dict[str, tuple[bytes, int]]) -> None:
    """Make a directory appear whole, with ``files`` as name -> (content, mode).

    ``path`` must not exist or be empty. Raises ``storage.*`` and leaves nothing behind.
    """
    temporary = path.parent / f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}"
    try:
        make_directory(path.parent)
        temporary.mkdir(mode=0o700)
        for name, (data, mode) in files.items():
            _write_synced(temporary / name, data, mode)
        sync_directory(temporary)
        temporary.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        _remove_tree(temporary)
        raise from_os(error, f"writing {path}") from error


def remove(path: Path) -> None:
    """Delete a file, durably; one that is gone already is fine. Raises ``storage.failed``."""
    try:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_directory(path.parent)
    except OSError as error:
        raise from_os(error, f"deleting {path}") from error


def make_directory(path: Path) -> None:
    """Make a directory and its parents, durably. Raises ``OSError``."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises ``OSError``."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_reserve(path: Path, size: int) -> None:
    """Keep room that is given back when the disk is full, as far as there is room now."""
    try:
        with path.open("xb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except FileExistsError:
        return
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sweep(directory: Path) -> None:
    """Delete what interrupted writes left in a directory."""
    if not directory.is_dir():
        return
    for path in directory.glob(f"{TEMPORARY}*"):
        _remove_tree(path)


def _write_synced(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _remove_tree(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            for child in path.iterdir():
                _remove_tree(child)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
