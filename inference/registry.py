"""Which runtimes there are, what each can use, and how to open a model. Light until a model is opened."""

import contextlib
import hashlib
import importlib
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from msgspec import Struct

from contract.errors import PitheadError
from contract.manifest import MAX_FILE_BYTES, FileRef
from inference.accelerators import (
    FORMATS,
    NO_LIMITS,
    ONNX,
    TFLITE,
    Accelerator,
    CustomTable,
    Format,
    Resources,
    for_format,
)

if TYPE_CHECKING:
    from inference.session import Opener, Session


class Runtime(Struct, frozen=True):
    """A runtime: the packages that can provide it (first wins) and its accelerators, best first."""

    packages: tuple[str, ...]
    module: str
    session: str
    platform: str
    accelerators: tuple[Accelerator, ...]


RUNTIMES: Final[Mapping[str, Runtime]] = {
    "onnx": Runtime(
        packages=(
            "onnxruntime",
            "onnxruntime-gpu",
            "onnxruntime-openvino",
            "onnxruntime-qnn",
            "onnxruntime-directml",
        ),
        module="inference.runtimes.onnx",
        session="OnnxSession",
        platform="onnxruntime_onnx",
        accelerators=ONNX,
    ),
    "tflite": Runtime(
        packages=("ai-edge-litert", "tflite-runtime"),
        module="inference.runtimes.tflite",
        session="TfliteSession",
        platform="litert_tflite",
        accelerators=TFLITE,
    ),
}
"""By the manifest's ``format``."""


def installed() -> dict[str, str]:
    """Return package -> version of each runtime that is installed, without importing any."""
    from importlib import metadata  # noqa: PLC0415 - a megabyte that most callers do not need

    found = {}
    for runtime in RUNTIMES.values():
        for package in runtime.packages:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
            break
    return found


def accelerators(custom: CustomTable | None = None) -> tuple[str, ...]:
    """Return the names of all accelerators that this machine may have, best first, ``cpu`` last.

    ``custom`` is the ``[accelerators]`` table of the device's settings. A
    device file is a hint only: whether a model really runs there is the probe's word.
    """
    names: dict[str, None] = {}
    for model_format, package in formats().items():
        names |= dict.fromkeys(for_format(model_format, package, custom))
    names.pop("cpu", None)
    return (*names, "cpu")


def formats() -> dict[Format, str]:
    """Return each format that this machine can open, and the package that opens it."""
    here = installed()
    found: dict[Format, str] = {}
    for model_format in FORMATS:
        package = next((p for p in RUNTIMES[model_format].packages if p in here), None)
        if package is not None:
            found[model_format] = package
    return found


def plain(model_format: str) -> tuple[str, ...]:
    """Return what a runtime has in itself, without any driver, best first."""
    table = RUNTIMES[model_format].accelerators
    return tuple(a.name for a in table if a.name == "cpu" or not (a.library or a.provider))


def arch() -> str:
    """Return this machine's architecture, as in the manifest."""
    return platform.machine()


def load_runtime(
    model_format: str, *, warm_up: bool = False, accelerator: Accelerator | None = None
) -> "Opener":
    """Import the runtime of a format; returns what opens a model.

    ``warm_up`` before a sandbox closes, which loads the driver of ``accelerator`` too.
    Raises ``inference.runtime_missing``, ``inference.accelerator_missing``.
    """
    runtime = RUNTIMES.get(model_format)
    if runtime is None:
        raise PitheadError("inference.runtime_missing", f"no runtime opens the format {model_format!r}")
    try:
        module = importlib.import_module(runtime.module)
    except ImportError as error:
        raise PitheadError(
            "inference.runtime_missing", f"install {' or '.join(runtime.packages)}: {error}"
        ) from error
    if warm_up:
        module.warm_up(*(() if accelerator is None else (accelerator,)))
    return cast("Opener", getattr(module, runtime.session))


def open_session(
    model: Path | str | bytes,
    model_format: str,
    accelerator: str | Accelerator = "cpu",
    threads: int | None = None,
    resources: Resources = NO_LIMITS,
) -> "Session":
    """Open a model; a path is read once and handed over as bytes, so that nothing can change under it.

    ``threads`` overrides that of ``resources``; the threads that a runtime starts stay on the processors
    of ``resources``.
    Raises ``package.unsafe_model``, ``package.file_missing``, ``package.too_large`` and ``inference.*``.
    """
    content = model if isinstance(model, bytes) else read_file(Path(model))
    from inference.screening import SCREENS  # noqa: PLC0415 - not before a model is opened

    opener = load_runtime(model_format)
    SCREENS[model_format](content)
    with on_cpus(resources.cpus):
        return opener(content, accelerator, threads or resources.threads, resources)


@contextlib.contextmanager
def on_cpus(cpus: Collection[int]) -> Iterator[None]:
    """Keep the calling thread, and whatever threads it starts meanwhile, on some processors.

    Those that the machine lacks do not count; where none is left, nothing changes.
    """
    if not cpus or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before & set(cpus) or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def read_file(path: Path, wanted: FileRef | None = None) -> bytes:
    """Return a file's bytes, checked against its reference on the very descriptor that was read.

    Raises ``package.file_missing``, ``package.too_large``, ``package.file_mismatch``.
    """
    limit = MAX_FILE_BYTES if wanted is None else wanted.length
    try:
        with path.open("rb") as file:
            # As much as there is, since room is made for all that is asked for.
            content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise PitheadError(
            "package.file_missing", f"{path.name}: {error.strerror}", path=str(path)
        ) from error
    if wanted is None:
        if len(content) > limit:
            raise PitheadError("package.too_large", f"{path.name}: more than {limit} bytes", limit=limit)
        return content
    if len(content) != wanted.length:
        size = path.stat().st_size
        raise PitheadError(
            "package.file_mismatch",
            f"{wanted.path}: {size} bytes, the manifest says {wanted.length}",
            path=wanted.path,
        )
    digest = hashlib.sha256(content).hexdigest()
    if digest != wanted.sha256:
        raise PitheadError(
            "package.file_mismatch",
            f"{wanted.path}: SHA-256 {digest}, the manifest says {wanted.sha256}",
            path=wanted.path,
        )
    return content
