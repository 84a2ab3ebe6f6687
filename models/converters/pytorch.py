"""PyTorch (.pt2, TorchScript) to ONNX by torch.onnx; see the package's docstring for how it is called."""

import json
import sys
from pathlib import Path
from typing import Any

ROWS = 16


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        import numpy as np  # noqa: PLC0415 - its absence is an answer
        import onnx  # noqa: PLC0415
        import onnxscript  # noqa: F401, PLC0415 - torch.onnx says later, and less well, that it is not there
        import torch  # noqa: PLC0415
    except ImportError as error:
        answer(code="import.converter_missing", detail=str(error))
        return
    path = Path(request["model"])
    exported = torch.export.load(path) if path.suffix == ".pt2" else None
    module: Any = torch.jit.load(path, map_location="cpu").eval() if exported is None else exported.module()
    rows = samples(np, request, exported)
    if rows is None:
        answer(
            code="import.failed",
            detail="TorchScript does not say its inputs' shapes: give --shape or --inputs",
        )
        return
    example = tuple(torch.from_numpy(a[0]) for a in rows)
    file = Path(request["out"], "model.onnx")
    if exported is None:
        torch.onnx.export(module, example, str(file), dynamo=False, opset_version=17)
    else:
        torch.onnx.export(exported, args=example, f=str(file), dynamo=True, external_data=False)
    onnx.checker.check_model(str(file))
    wanted: list[list[Any]] = []
    with torch.no_grad():
        for i in range(len(rows[0])):
            found = module(*(torch.from_numpy(a[i]) for a in rows))
            wanted.append([t.numpy() for t in (found if isinstance(found, tuple | list) else [found])])
    arrays: dict[str, Any] = {f"in:{i}": a for i, a in enumerate(rows)}
    arrays |= {f"out:{i}": np.stack([w[i] for w in wanted]) for i in range(len(wanted[0]))}
    np.savez(Path(request["out"], "check.npz"), **arrays)
    answer(source=f"{'torch.export' if exported else 'TorchScript'}, torch {torch.__version__}")


def samples(np: Any, request: dict[str, Any], exported: Any) -> list[Any] | None:
    """Return whole calls for each input, the calls on a leading axis; None where shapes are not known."""
    if request["inputs"]:
        with np.load(request["inputs"], allow_pickle=False) as arrays:
            return [np.asarray(arrays[name], np.float32)[:, None] for name in arrays.files]
    shapes = request["shapes"]
    if not shapes and exported is not None and exported.example_inputs is not None:
        shapes = [list(t.shape) for t in exported.example_inputs[0]]
    random = np.random.default_rng(7)
    return [random.standard_normal((ROWS, *shape)).astype(np.float32) for shape in shapes] or None


def answer(**facts: str) -> None:
    """Write the answer."""
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
