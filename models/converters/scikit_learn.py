"""scikit-learn to ONNX by skl2onnx; see the package's docstring for how it is called."""

import importlib
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
    if not hasattr(loaded, "n_features_in_"):
        answer(code="import.failed", detail=f"it holds no fitted estimator, but {type(loaded).__name__}")
        return
    given = []
    if request["inputs"]:
        with np.load(request["inputs"], allow_pickle=False) as arrays:
            given = [(name, arrays[name]) for name in arrays.files]
    options = {id(loaded): {"zipmap": False}} if hasattr(loaded, "predict_proba") else None
    how = {"options": options, "target_opset": OPSETS}
    if picks_by_name(loaded):
        made = converted_by_name(np, skl2onnx, loaded, given, how)
        if made is None:
            return
        converted, wanted, rows = made
    else:
        x = (
            np.asarray(given[0][1], np.float32)
            if given
            else np.random.default_rng(7).standard_normal((ROWS, loaded.n_features_in_)).astype(np.float32)
        )
        converted = skl2onnx.to_onnx(loaded, x[:1], **how)
        wanted, rows = answers(loaded, x.astype(np.float64)), [x]
    Path(request["out"], "model.onnx").write_bytes(converted.SerializeToString())
    check: dict[str, Any] = {f"in:{i}": array for i, array in enumerate(rows)}
    check |= {f"out:{i}": array for i, array in enumerate(wanted)}
    np.savez(Path(request["out"], "check.npz"), **check)
    versions = f"scikit-learn {sklearn.__version__}, skl2onnx {skl2onnx.__version__}"
    answer(source=f"{type(loaded).__name__}, {versions}")


def converted_by_name(
    np: Any, skl2onnx: Any, loaded: Any, given: list[tuple[str, Any]], how: dict[str, Any]
) -> "tuple[Any, list[Any], list[Any]] | None":
    """Return the model with an input for each column, what the original gives, and its rows by column.

    None after an answer that says why not.
    """
    names = [str(name) for name in loaded.feature_names_in_]
    columns = by_name(np, names, given)
    if columns is None:
        answer(code="import.failed", detail=f"--inputs needs an array for each of {', '.join(names)}")
        return None
    kinds = skl2onnx.common.data_types
    types = [
        (name, (kinds.StringTensorType if array.dtype.kind == "U" else kinds.FloatTensorType)([None, 1]))
        for name, array in columns.items()
    ]
    try:
        wanted = answers(loaded, frame(columns))
    except (TypeError, ValueError) as error:
        if given:
            raise
        why = f"numbers at random are no rows of it ({str(error)[:200]})"
        answer(code="import.failed", detail=f"{why}: give --inputs, an .npz with an array for each column")
        return None
    converted = skl2onnx.to_onnx(loaded, initial_types=types, **how)
    return converted, wanted, [array[:, None] for array in columns.values()]


def picks_by_name(loaded: Any) -> bool:
    """Return whether a part of it takes columns of a data frame by their names: it takes no array then."""
    if not hasattr(loaded, "feature_names_in_"):
        return False
    parts = [step for _, step in getattr(loaded, "steps", [("", loaded)])]
    return any(
        isinstance(name, str)
        for part in parts
        for _, _, columns in getattr(part, "transformers", ())
        for name in ([columns] if isinstance(columns, str) or not hasattr(columns, "__iter__") else columns)
    )


def by_name(np: Any, names: list[str], given: list[tuple[str, Any]]) -> "dict[str, Any] | None":
    """Return columns of float32 or of texts by name; None where what was given has not all of them."""
    found = dict(given)
    if not given:
        random = np.random.default_rng(7)
        found = {name: random.standard_normal(ROWS) for name in names}
    elif len(given) == 1 and given[0][1].ndim > 1:
        found = dict(zip(names, given[0][1].T, strict=False))
    if not all(name in found for name in names):
        return None
    return {
        name: np.ravel(found[name] if found[name].dtype.kind == "U" else found[name].astype(np.float32))
        for name in names
    }


def frame(columns: dict[str, Any]) -> Any:
    """Return a data frame; whoever fitted an estimator on one has pandas."""
    return importlib.import_module("pandas").DataFrame(
        {n: a.astype("object") if a.dtype.kind == "U" else a.astype("float64") for n, a in columns.items()}
    )


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
