"""Models of other frameworks: converted by the ecosystem's own tools, checked against the original, wrapped.

Converters are large and want other versions than ours, so each runs as a
program by itself (``models.converters``), in this interpreter or in one that
the caller names. What loads the original may run its code, so that program
writes to a folder of ours only and reaches no network (``models.apart``), and
what comes out of it is foreign.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from contract.errors import PitheadError
from models import apart, converters
from models.optimise.worker import Model, ask
from models.package import reference_to, vacant
from models.wrap import wrap

TIMEOUT_S: Final = 900
ATOL, RTOL = 1e-4, 1e-3
GOLDEN_VECTORS: Final = 8
_LAST: Final = 400
_LONGEST: Final = 1500
_MOST_SAID: Final = 1024 * 1024
_CODES: Final = ("import.failed", "import.untrusted")
_INHERITED: Final = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")


class Framework(Struct, frozen=True):
    """Where models come from."""

    name: str
    program: str
    suffixes: tuple[str, ...]
    packages: tuple[str, ...]
    """What the converter needs; for pip."""
    pickles: tuple[str, ...] = ()
    """Suffixes of formats that run whatever code is in them."""


FRAMEWORKS: Final = (
    Framework(
        "scikit-learn",
        "scikit_learn",
        (".joblib", ".pkl", ".pickle", ".skops"),
        ("scikit-learn", "skl2onnx"),
        (".joblib", ".pkl", ".pickle"),
    ),
    Framework("PyTorch", "pytorch", (".pt2", ".pt", ".ts"), ("torch", "onnx", "onnxscript")),
    Framework("TensorFlow", "tensorflow", (".keras", ".h5", ""), ("tensorflow", "tf2onnx")),
)


class Checked(Struct, frozen=True):
    """What was seen when both models got the same rows."""

    directory: str
    framework: str
    source: str
    rows: int
    worst: float
    """The largest difference of any value."""
    differing: float
    """Share of values beyond the tolerance."""
    inputs: str
    """``given`` or ``random``."""


def framework_of(path: Path) -> Framework:
    """Return whose model a file (or a SavedModel's directory) is; raises ``config.invalid``."""
    if path.is_dir() and (path / "saved_model.pb").is_file():
        return FRAMEWORKS[-1]
    for framework in FRAMEWORKS:
        if path.suffix and path.suffix in framework.suffixes:
            return framework
    known = ", ".join(s for f in FRAMEWORKS for s in f.suffixes if s)
    raise PitheadError("config.invalid", f"{path.name} is neither a SavedModel nor one of {known}")


def bring_in(
    path: Path,
    out: Path,
    *,
    name: str,
    version: str,
    licence: str,
    release_counter: int = 1,
    python: str = sys.executable,
    trusted: bool = False,
    inputs: Path | None = None,
    shapes: Sequence[Sequence[int]] = (),
    differing: float = 0.0,
    require_sandbox: bool = False,
) -> Checked:
    """Convert a model to ONNX, and write a package to OUT/<name>/<version>.

    ``inputs`` is an .npy or .npz of rows (one array for each input, in their
    order) that both models get; random numbers otherwise. ``differing`` is
    the share of output values that may be beyond ``ATOL`` + ``RTOL`` x.
    Raises ``import.*``, and ``wrap``'s errors for the converted model.
    """
    framework = framework_of(path)
    if not path.exists():
        raise PitheadError("config.invalid", f"{path} is not there")
    if path.suffix in framework.pickles and not trusted:
        raise PitheadError(
            "import.untrusted",
            f"{path.name} is a pickle: loading it runs its code; --trust-pickle says that it may",
        )
    directory = vacant(out / name / version)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = _converted(
            framework, path, folder, python, inputs, shapes, trusted=trusted, require_sandbox=require_sandbox
        )
        file, check = _brought(folder, path.stem)
        model = Model(file, reference_to(file.name, file.read_bytes()), "onnx")
        rows, found = _answers(model, check, folder, require_sandbox=require_sandbox)
        worst, share = compared([check[k] for k in check if k.startswith("out:")], list(found.values()))
        if share > differing:
            raise PitheadError(
                "import.differs",
                f"{share:.3%} of the values differ by more than {ATOL:g} + {RTOL:g} x, {worst:.3g} at most",
            )
        golden = folder / "golden.npz"
        np.savez(golden, allow_pickle=False, **{key: a[:GOLDEN_VECTORS, None] for key, a in rows.items()})
        wrap(
            [file],
            directory,
            name=name,
            version=version,
            release_counter=release_counter,
            licence=licence,
            source=f"{path.name}: {source}",
            inputs=golden,
            require_sandbox=require_sandbox,
        )
        count = len(next(iter(rows.values())))
    given = "random" if inputs is None else "given"
    return Checked(str(directory), framework.name, source, count, worst, share, given)


def _brought(folder: Path, stem: str) -> tuple[Path, dict[str, NDArray[Any]]]:
    """Return the converted model's file, and inputs and outputs of the original; raises ``import.failed``."""
    made, file = folder / "model.onnx", folder / f"{stem}.onnx"
    try:
        made.rename(file)
        with (folder / "check.npz").open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            check = {key: arrays[key] for key in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PitheadError("import.failed", f"the converter left no model and answers: {error}") from error
    if file.is_symlink() or not all(len(check.get(f"{kind}:0", ())) for kind in ("in", "out")):
        raise PitheadError("import.failed", "the converter left a model without answers")
    return file, check


def _converted(
    framework: Framework,
    path: Path,
    folder: Path,
    python: str,
    inputs: Path | None,
    shapes: Sequence[Sequence[int]],
    *,
    trusted: bool,
    require_sandbox: bool,
) -> str:
    """Run the converter; returns what it says of the original."""
    request = {
        "model": str(path.absolute()),
        "out": str(folder),
        "inputs": None if inputs is None else str(_as_npz(inputs, folder)),
        "shapes": [list(shape) for shape in shapes],
        "trusted": trusted,
    }
    program = Path(converters.__file__).parent / f"{framework.program}.py"
    interpreter = shutil.which(python)
    if interpreter is None:
        raise PitheadError("config.invalid", f"--python {python} is no interpreter that is there")
    command = [str(Path(interpreter).absolute()), "-I", str(program)]  # a link is an environment of its own
    said = _said(_run(command, json.dumps(request), folder, require_sandbox=require_sandbox), framework)
    if said.get("code") == "import.converter_missing":
        packages = " ".join((*framework.packages, *filter(None, [said.get("also")])))
        raise PitheadError("import.converter_missing", f"{said.get('detail')}; pip install {packages}")
    if "code" in said:
        code = said["code"] if said["code"] in _CODES else "import.failed"
        raise PitheadError(code, str(said.get("detail"))[:_LONGEST])
    return str(said.get("source"))[:_LONGEST]


def _run(command: Sequence[str], request: str, folder: Path, *, require_sandbox: bool) -> tuple[str, str]:
    """Return what a converter wrote on standard output and standard error.

    It begins with an environment that holds nothing of the caller's but where libraries are, and
    everything that it started ends with it.
    """
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment |= {"PATH": os.defpath, "LANG": "C.UTF-8", "HOME": str(folder), "TMPDIR": str(folder)}
    strict = [apart.STRICT] if require_sandbox else []
    command = [sys.executable, "-I", "-m", "models.apart", *strict, str(folder), *command]
    # Files, not pipes: whatever it started may hold a pipe open for ever.
    with TemporaryFile() as asked, TemporaryFile() as out, TemporaryFile() as err:
        asked.write(request.encode())
        asked.seek(0)
        child = subprocess.Popen(
            command, stdin=asked, stdout=out, stderr=err, env=environment, cwd=folder, start_new_session=True
        )
        try:
            child.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise PitheadError("import.failed", f"the converter took more than {TIMEOUT_S} s") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said = _end(out), _end(err)
    if child.returncode == apart.UNCONFINED and require_sandbox:
        raise PitheadError(
            "probe.unconfined", "a converter cannot be confined here: Landlock or seccomp is missing"
        )
    return said


def _end(file: IO[bytes]) -> str:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _MOST_SAID))
    return file.read().decode(errors="replace")


def _said(output: tuple[str, str], framework: Framework) -> dict[str, Any]:
    out, err = output
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads((out.splitlines() or [""])[-1])
        if isinstance(said, dict):
            return said
    last = (err.strip().splitlines() or ["no answer"])[-1][:_LAST]
    raise PitheadError("import.failed", f"{framework.name}'s converter: {last}")


def _as_npz(inputs: Path, folder: Path) -> Path:
    try:
        with inputs.open("rb") as opened:
            loaded: Any = np.load(opened, allow_pickle=False)
            found = dict(loaded) if inputs.suffix == ".npz" else {"0": loaded}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PitheadError("inference.bad_input", f"{inputs.name}: {error}") from error
    file = BytesIO()
    np.savez(file, allow_pickle=False, **found)
    path = folder / "inputs.npz"
    path.write_bytes(file.getvalue())
    return path


def _answers(
    model: Model, check: Mapping[str, NDArray[Any]], folder: Path, *, require_sandbox: bool
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Return the rows by the converted model's tensors, and what it gives for them."""
    asked, _ = ask(model, None, require_sandbox=require_sandbox)
    given = [check[key] for key in check if key.startswith("in:")]
    if len(given) != len(asked.inputs):
        raise PitheadError(
            "import.failed", f"the converted model has {len(asked.inputs)} inputs, the original {len(given)}"
        )
    rows = {spec.name: array for spec, array in zip(asked.inputs, given, strict=True)}
    for spec in asked.inputs:
        array = rows[spec.name]
        if array.ndim > len(spec.shape):  # whole calls, as PyTorch's are
            rows[spec.name] = array.reshape(-1, *array.shape[2:])
    path = folder / "rows.npz"
    np.savez(path, allow_pickle=False, **rows)
    _, found = ask(model, path, require_sandbox=require_sandbox)
    return rows, found


def compared(want: Sequence[NDArray[Any]], got: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Return the largest difference, and the share of values beyond ``ATOL`` + ``RTOL`` x.

    Texts, such as a classifier's labels, are not compared: their probabilities are.
    Raises ``import.differs`` where outputs are missing or have other sizes.
    """
    numbers = [a for a in want if a.dtype.kind in "fiub"]
    if len(numbers) != len(got) or any(a.size != b.size for a, b in zip(numbers, got, strict=True)):
        sizes = f"{[a.shape for a in numbers]} and {[b.shape for b in got]}"
        raise PitheadError("import.differs", f"the outputs of the two models do not correspond: {sizes}")
    worst, beyond, count = 0.0, 0, 0
    for a, b in zip(numbers, got, strict=True):
        wanted, found = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        delta = np.where(wanted == found, 0.0, np.abs(wanted - found))
        worst = max(worst, float(np.nan_to_num(delta, nan=np.inf).max(initial=0.0)))
        beyond += int((~(delta <= ATOL + RTOL * np.abs(wanted))).sum())
        count += delta.size
    return worst, beyond / max(1, count)
