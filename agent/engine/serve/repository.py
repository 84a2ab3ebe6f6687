"""Where served models come from: a directory, or whoever hands them over in this process.

A directory may hold, side by side and without any configuration:

- our packages (``manifest.json``), up to two levels deep;
- bare ``name.onnx`` and ``name.tflite`` files, served as version 1;
- Triton's layout, ``name/<number>/model.onnx`` or ``model.tflite``.

Nothing is opened here. What is found is a ``Candidate``: enough to say that
it exists, and a function that opens it elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from msgspec import Struct

from agent.engine.serve.opening import Opened, open_bare, open_package
from agent.engine.serve.statistics import Statistics
from agent.engine.serve.verdicts import Verdicts
from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME
from contract.package import MAX_MANIFEST, parse_manifest
from inference.registry import RUNTIMES, read_file

FORMATS: Final[Mapping[str, str]] = {".onnx": "onnx", ".tflite": "tflite"}
MAX_MODELS: Final = 10_000
"""Files and directories that a scan looks at; a model directory is not somebody's home."""
_DEPTH: Final = 2
_MAX_DIGITS: Final = 18


class Candidate(Struct, frozen=True):
    """A version of a model that could be served."""

    name: str
    version: str
    platform: str
    """As in the Open Inference Protocol."""
    identity: str
    """Another one means that the bytes have changed."""
    open: Callable[[], Opened]
    """Opens it, on a thread where nobody waits; raises ``PitheadError``."""
    statistics: Statistics | None = None
    """Where to count; None: where the version's other sessions were counted."""


class Source(Protocol):
    """Something that has models."""

    def scan(self) -> Sequence[Candidate]:
        """Return what there is now. May block: called on a thread. Raises ``serve.repository_unreadable``."""
        ...


class Memory:
    """Models that another part of this process hands over, such as the slots."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str], Candidate] = {}

    def put(self, candidate: Candidate) -> None:
        """Offer a version; an earlier one of the same name and version is replaced."""
        self._held = {**self._held, (candidate.name, candidate.version): candidate}

    def take_away(self, name: str, version: str) -> None:
        """No longer offer a version."""
        self._held = {key: c for key, c in self._held.items() if key != (name, version)}

    def scan(self) -> Sequence[Candidate]:
        """See ``Source``."""
        return tuple(self._held.values())


class Directory:
    """Models in a directory, or one model file, or one package."""

    def __init__(self, path: Path, verdicts: Verdicts, threads: int = 1) -> None:
        self._path = path.absolute()
        self._verdicts, self._threads = verdicts, threads

    def scan(self) -> Sequence[Candidate]:
        """See ``Source``. What is not a model is left out; two of one name and version are an error."""
        try:
            found = list(self._found())
        except OSError as error:
            raise PitheadError(
                "serve.repository_unreadable", f"{error.filename or self._path}: {error.strerror}"
            ) from error
        seen: dict[tuple[str, str], Candidate] = {}
        for candidate in found:
            key = (candidate.name, candidate.version)
            if key in seen and seen[key].identity != candidate.identity:
                raise PitheadError(
                    "serve.repository_unreadable", f"{key[0]} {key[1]} is there twice, as different files"
                )
            seen[key] = candidate
        return tuple(seen.values())

    def _found(self) -> Iterator[Candidate]:
        if self._path.is_file():
            if self._path.suffix not in FORMATS:
                raise PitheadError(
                    "serve.repository_unreadable", f"{self._path.name}: the suffix is none of {list(FORMATS)}"
                )
            yield self._bare(self._path.stem, "1", self._path)
            return
        yield from self._below(self._path, 0)

    def _below(self, directory: Path, depth: int) -> Iterator[Candidate]:
        manifest = directory / MANIFEST_NAME
        if manifest.is_file():
            candidate = self._package(manifest)
            if candidate is not None:
                yield candidate
            return
        entries = sorted(directory.iterdir())
        if len(entries) > MAX_MODELS:
            raise PitheadError("serve.repository_unreadable", f"{directory}: more than {MAX_MODELS} entries")
        for entry in entries:
            if entry.name.startswith(".") or not _is_text(entry.name):
                continue
            if entry.is_dir():
                if depth == 1 and _is_number(entry.name):
                    yield from self._numbered(directory.name, entry)
                if depth < _DEPTH:
                    yield from self._below(entry, depth + 1)
            elif depth == 0 and entry.suffix in FORMATS and entry.is_file():
                yield self._bare(entry.stem, "1", entry)

    def _numbered(self, name: str, directory: Path) -> Iterator[Candidate]:
        for suffix in FORMATS:
            file = directory / f"model{suffix}"
            if file.is_file():
                yield self._bare(name, str(int(directory.name)), file)
                return

    def _bare(self, name: str, version: str, file: Path) -> Candidate:
        model_format = FORMATS[file.suffix]
        return Candidate(
            name=name,
            version=version,
            platform=RUNTIMES[model_format].platform,
            identity=_identity(file),
            open=lambda: open_bare(file, model_format, self._verdicts, self._threads),
        )

    def _package(self, path: Path) -> Candidate | None:
        try:
            content = read_file(path)
            if len(content) > MAX_MANIFEST:
                return None
            manifest = parse_manifest(content)
        except PitheadError:
            return None
        return Candidate(
            name=manifest.name,
            version=manifest.version,
            platform=next(v.platform or RUNTIMES[v.format].platform for v in manifest.variants),
            identity=_identity(path),
            open=lambda: open_package(manifest, path.parent, self._verdicts, self._threads),
        )


def _is_text(name: str) -> bool:
    """Whether a file's name can be said to a client: names that are no UTF-8 cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) <= _MAX_DIGITS and int(name) > 0


def _identity(file: Path) -> str:
    found = file.stat()
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"


def newest(versions: Sequence[str]) -> list[str]:
    """Return versions, the newest first: by their numbers, a pre-release before its release."""
    return sorted(versions, key=_rank, reverse=True)


def _rank(version: str) -> tuple[list[tuple[int, int, str]], bool, str]:
    core, _, rest = version.partition("-")
    parts = [(1, int(p), "") if p.isdigit() and len(p) <= _MAX_DIGITS else (0, 0, p) for p in core.split(".")]
    return parts, not rest, rest
