"""Which runtimes there are, what each can use, and how to open a model. Light until a model is opened."""

import hashlib
import importlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from msgspec import Struct

from contract.errors import PitheadError
from contract.manifest import MAX_FILE_BYTES, FileRef

if TYPE_CHECKING:
    from inference.session import Session


class Accelerator(Struct, frozen=True):
    """Something that a runtime can use; it can be here only where one of the paths ``needs`` exists."""

    name: str
    needs: tuple[str, ...] = ()


class Runtime(Struct, frozen=True):
    """A runtime: the packages that can provide it (first wins) and its accelerators, best first."""

    packages: tuple[str, ...]
    module: str
    session: str
    platform: str
    accelerators: tuple[Accelerator, ...]


RUNTIMES: Final[Mapping[str, Runtime]] = {
    "onnx": Runtime(
        packages=("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-qnn"),
        module="inference.runtimes.onnx",
        session="OnnxSession",
        platform="onnxruntime_onnx",
        accelerators=(
            Accelerator("tensorrt", ("/dev/nvidia0", "/dev/nvhost-gpu")),
            Accelerator("cuda", ("/dev/nvidia0", "/dev/nvhost-gpu")),
            Accelerator("openvino", ("/dev/dri/renderD128",)),
            Accelerator("qnn", ("/dev/fastrpc-cdsp",)),
            Accelerator("acl", ("/usr/lib/libarm_compute.so",)),
            Accelerator("cpu"),
        ),
    ),
    "tflite": Runtime(
        packages=("ai-edge-litert", "tflite-runtime"),
        module="inference.runtimes.tflite",
        session="TfliteSession",
        platform="litert_tflite",
        accelerators=(
            Accelerator("edgetpu", ("/dev/apex_0", "/dev/bus/usb")),
            Accelerator("ethosu", ("/dev/ethosu0",)),
            Accelerator("vx", ("/dev/galcore",)),
            Accelerator("gpu", ("/dev/mali0", "/dev/dri/renderD128")),
            Accelerator("xnnpack"),
            Accelerator("cpu"),
        ),
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


def accelerators() -> tuple[str, ...]:
    """Return the names of all accelerators that this machine may have, best first, ``cpu`` last.

    A device file is a hint only: whether a model really runs there is the probe's word.
    """
    here = installed()
    names = dict.fromkeys(
        accelerator.name
        for runtime in RUNTIMES.values()
        if any(package in here for package in runtime.packages)
        for accelerator in runtime.accelerators
        if not accelerator.needs or any(Path(path).exists() for path in accelerator.needs)
    )
    names.pop("cpu", None)
    return (*names, "cpu")


def arch() -> str:
    """Return this machine's architecture, as in the manifest."""
    return platform.machine()


def load_runtime(model_format: str, *, warm_up: bool = False) -> Callable[[bytes, str, int], "Session"]:
    """Import the runtime of a format; returns what opens (content, accelerator, threads).

    ``warm_up`` before a sandbox closes. Raises ``inference.runtime_missing``.
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
        module.warm_up()
    return cast("Callable[[bytes, str, int], Session]", getattr(module, runtime.session))


def open_session(
    model: Path | str | bytes, model_format: str, accelerator: str = "cpu", threads: int = 1
) -> "Session":
    """Open a model; a path is read once and handed over as bytes, so that nothing can change under it.

    Raises ``package.unsafe_model``, ``package.file_missing``, ``package.too_large`` and ``inference.*``.
    """
    content = model if isinstance(model, bytes) else read_file(Path(model))
    from inference.screening import SCREENS  # noqa: PLC0415 - not before a model is opened

    opener = load_runtime(model_format)
    SCREENS[model_format](content)
    return opener(content, accelerator, threads)


def read_file(path: Path, wanted: FileRef | None = None) -> bytes:
    """Return a file's bytes, checked against its reference on the very descriptor that was read.

    Raises ``package.file_missing``, ``package.too_large``, ``package.file_mismatch``.
    """
    limit = MAX_FILE_BYTES if wanted is None else wanted.length
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
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
