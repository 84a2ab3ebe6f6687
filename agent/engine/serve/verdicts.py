"""Which files have been opened in the sandbox before, and passed: remembered across starts.

A verdict holds for these bytes, this runtime, its drivers and this system;
any other asks for a new probe. The file lies with the user's own caches, and is as
trustworthy as the user: whoever can write it can start programs as him.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from inference.circumstances import circumstances

MOST: Final = 1000
FORMAT: Final = 1


class Verdict(Struct, frozen=True):
    """What the probe found."""

    choice: str = ""
    """Of a package: the variant."""
    accelerator: str = "cpu"
    sandbox: str = ""
    """How well the probe was confined: ``full``, ``partial``, ``limits`` or ``none``."""


class _File(Struct):
    format: int
    verdicts: dict[str, Verdict]


class Verdicts:
    """The memory; ``path`` None forgets at the end of the process."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, Verdict] = self._read()
        self._here = hashlib.sha256(msgspec.json.encode(circumstances())).hexdigest()[:16]

    def find(self, sha256: str) -> Verdict | None:
        """Return the verdict on these bytes here, or None."""
        return self._known.get(self._key(sha256))

    def keep(self, sha256: str, verdict: Verdict) -> None:
        """Remember a verdict; a disk that does not take it only costs another probe."""
        with self._lock:
            self._known[self._key(sha256)] = verdict
            while len(self._known) > MOST:
                del self._known[next(iter(self._known))]
            if self._path is not None:
                with contextlib.suppress(OSError):
                    self._write(self._path)

    def _key(self, sha256: str) -> str:
        return f"{sha256} {self._here}"

    def _read(self) -> dict[str, Verdict]:
        if self._path is None:
            return {}
        try:
            said = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return {}
        return said.verdicts if said.format == FORMAT else {}

    def _write(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(_File(FORMAT, self._known)))
            Path(name).rename(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise


def default_path() -> Path:
    """Return where verdicts are kept unless told otherwise (the XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return cache / "pithead" / "probed.json"
