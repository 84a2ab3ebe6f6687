"""An ONNX graph as the feature of a pipeline: its golden vectors, and what the manifest says of it.

Nobody knows the file, so it is opened in a confined process only, as the
files of ``models.wrap`` are.
"""

import tempfile
from io import BytesIO
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from contract.errors import PitheadError
from contract.manifest import Golden, Graph, TensorSpec
from inference import registry
from models.package import reference_to
from models.record import recorded

MOST_WINDOWS: Final = 16
"""Windows that become golden vectors."""
AXES: Final = 3


def graph_of(
    file: Path,
    windows: Path | None = None,
    *,
    name: str = "features",
    per_channel: bool = False,
    require_sandbox: bool = False,
) -> tuple[Graph, dict[str, bytes]]:
    """Return the feature that ``file`` is, and its files by their paths in the package.

    ``windows`` is a ``.npy`` of normalised windows (n, window, channels); without it golden vectors are of
    random numbers. Raises as ``recorded`` does, and ``inference.bad_input`` for windows that are none.
    """
    content = registry.read_file(file)
    this = reference_to(file.name, content)
    seen = recorded(file, this, "onnx", require_sandbox=require_sandbox)
    for which, tensors in (("inputs", seen.inputs), ("outputs", seen.outputs)):
        if len(tensors) != 1 or tensors[0].shape[:1] != (-1,):
            shapes = [list(t.shape) for t in tensors]
            raise PitheadError(
                "package.manifest_invalid",
                f"{file.name} has the {which} {shapes}; one is wanted, whose first axis is open",
                path=which,
            )
    if windows is not None:
        with tempfile.TemporaryDirectory() as scratch:
            given = _vectors(windows, seen.inputs[0].name, Path(scratch))
            seen = recorded(file, this, "onnx", given, require_sandbox=require_sandbox)
    model_path, golden_path = f"{name}.onnx", f"{name}.golden.npz"
    graph = Graph(
        file=reference_to(model_path, content),
        inputs=seen.inputs,
        outputs=(_shaped(seen.outputs[0], seen.golden),),
        golden=Golden(reference_to(golden_path, seen.golden), seen.vectors, seen.tolerance),
        per_channel=per_channel,
    )
    return graph, {model_path: content, golden_path: seen.golden}


def _vectors(path: Path, name: str, scratch: Path) -> Path:
    """Write windows as ``recorded`` wants them: by the name of the input, one window to each vector."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PitheadError("inference.bad_input", f"{path.name}: {error}") from error
    if not isinstance(found, np.ndarray) or found.ndim != AXES or not len(found):
        raise PitheadError("inference.bad_input", f"{path.name} is no array (n, window, channels)")
    kept = found[:MOST_WINDOWS, None].astype(np.float32)
    vectors = scratch / "windows.npz"
    np.savez(vectors, allow_pickle=False, **{name: kept})
    return vectors


def _shaped(output: TensorSpec, golden: bytes) -> TensorSpec:
    """Return ``output`` with the lengths that a file may leave open."""
    with np.load(BytesIO(golden), allow_pickle=False) as arrays:
        shape = arrays[f"out:{output.name}"].shape[2:]
    return msgspec.structs.replace(output, shape=(*output.shape[:1], *shape))
