"""Keras and TensorFlow SavedModels to ONNX by tf2onnx; see the package's docstring for how it is called."""

import json
import os
import sys
from pathlib import Path
from typing import Any

ROWS = 16
OPSET = 17


def main() -> None:
    """Answer one request."""
    request = json.load(sys.stdin)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import numpy as np  # noqa: PLC0415 - its absence is an answer
        import tensorflow as tf  # noqa: PLC0415
        import tf2onnx  # noqa: PLC0415
    except ImportError as error:
        answer(code="import.converter_missing", detail=str(error))
        return
    path = Path(request["model"])
    if path.is_dir():
        loaded = tf.saved_model.load(str(path))
        function = loaded.signatures["serving_default"]
        specs = list(function.structured_input_signature[1].values())

        def call(*tensors: Any) -> list[Any]:
            """Return the outputs in the order of their names, as a signature has them."""
            found = function(**{spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)})
            return [found[name] for name in sorted(found)]
    else:
        model = tf.keras.models.load_model(path, compile=False, safe_mode=not request["trusted"])
        specs = [tf.TensorSpec(t.shape, t.dtype, name=t.name) for t in model.inputs]

        def call(*tensors: Any) -> list[Any]:
            """Return the outputs."""
            found = model(tensors[0] if len(tensors) == 1 else list(tensors), training=False)
            return list(found) if isinstance(found, tuple | list) else [found]

    traced = tf.function(call, input_signature=specs)
    file = Path(request["out"], "model.onnx")
    tf2onnx.convert.from_function(traced, input_signature=specs, opset=OPSET, output_path=str(file))
    if request["inputs"]:
        with np.load(request["inputs"], allow_pickle=False) as given:
            rows = [np.asarray(given[name], np.float32) for name in given.files]
    else:
        random = np.random.default_rng(7)
        shapes = request["shapes"] or [[d or 1 for d in spec.shape] for spec in specs]
        rows = [random.standard_normal((ROWS, *shape[1:])).astype(np.float32) for shape in shapes]
    # One by one: a model may be made for one row at a time.
    wanted = [
        [t.numpy() for t in traced(*(tf.constant(a[i : i + 1]) for a in rows))] for i in range(len(rows[0]))
    ]
    arrays: dict[str, Any] = {f"in:{i}": a for i, a in enumerate(rows)}
    arrays |= {f"out:{i}": np.stack([w[i] for w in wanted]) for i in range(len(wanted[0]))}
    np.savez(Path(request["out"], "check.npz"), **arrays)
    kind = "SavedModel" if path.is_dir() else "Keras"
    answer(source=f"{kind}, tensorflow {tf.__version__}, tf2onnx {tf2onnx.__version__}")


def answer(**facts: str) -> None:
    """Write the answer."""
    sys.stdout.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
