"""scikit-learn to ONNX by skl2onnx; see the package's docstring for how it is called."""

import json
import sys
from pathlib import Path
from typing import Any

ROWS = 64
OPSETS = {"": 17, "ai.onnx.ml": 3}


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    try:
        import numpy as np  # noqa: PLC0415 - its absence is an answer
        import skl2onnx  # noqa: PLC0415
        import sklearn  # noqa: PLC0415
    except ImportError as error:
        answer(code="import.converter_missing", detail=str(error))
        return
    loaded = load(Path(request["model"]), trusted=request["trusted"])
    if loaded is None:
        return
    if request["inputs"]:
        with np.load(request["inputs"], allow_pickle=False) as arrays:
            x = np.asarray(arrays[arrays.files[0]], np.float32)
    else:
        x = np.random.default_rng(7).standard_normal((ROWS, loaded.n_features_in_)).astype(np.float32)
    options = {id(loaded): {"zipmap": False}} if hasattr(loaded, "predict_proba") else None
    converted = skl2onnx.to_onnx(loaded, x[:1], options=options, target_opset=OPSETS)
    Path(request["out"], "model.onnx").write_bytes(converted.SerializeToString())
    wanted: dict[str, Any] = {
        f"out:{i}": array for i, array in enumerate(answers(loaded, x.astype(np.float64)))
    }
    np.savez(Path(request["out"], "check.npz"), **{"in:0": x, **wanted})
    versions = f"scikit-learn {sklearn.__version__}, skl2onnx {skl2onnx.__version__}"
    answer(source=f"{type(loaded).__name__}, {versions}")


def load(path: Path, *, trusted: bool) -> Any:
    """Return the estimator, or None after an answer that says why not."""
    if path.suffix != ".skops":
        import joblib  # noqa: PLC0415 - it comes with scikit-learn

        return joblib.load(path)  # it reads plain pickles too
    try:
        import skops.io  # noqa: PLC0415 - only for its own files
    except ImportError as error:
        answer(code="import.converter_missing", detail=str(error), also="skops")
        return None
    unknown = skops.io.get_untrusted_types(file=path)
    if unknown and not trusted:
        answer(
            code="import.untrusted", detail=f"it holds types that skops does not know: {', '.join(unknown)}"
        )
        return None
    return skops.io.load(path, trusted=unknown)


def answers(loaded: Any, x: Any) -> list[Any]:
    """Return what an estimator gives, in the order of skl2onnx's outputs."""
    if not hasattr(loaded, "predict"):
        return [loaded.transform(x)]
    found = [loaded.predict(x)]
    if hasattr(loaded, "predict_proba"):
        found.append(loaded.predict_proba(x))
    elif hasattr(loaded, "decision_function"):
        found.append(loaded.decision_function(x))
    elif hasattr(loaded, "transform"):  # a clustering, its distances
        found.append(loaded.transform(x))
    return found


def answer(**facts: str) -> None:
    """Write the answer."""
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
