"""Models whose inputs decide how long a run takes are kept off the event loop, wherever they come from."""

import hashlib
from pathlib import Path

import ai_edge_litert.schema_py_generated as schema
import msgspec
import numpy as np
import pytest

from agent.engine.serve.offers import Offer
from agent.engine.serve.opening import steady
from contract.errors import PitheadError
from inference.registry import open_session
from tests.engine.conftest import make_package
from tests.inference.test_session_kinds import operator, tensor, tflite
from tests.serve import models


def counting() -> bytes:
    """FP32 [1]: adds one for as long as it is less than 1000."""
    b, o, t = schema.BuiltinOperator, schema.BuiltinOptions, schema.TensorType
    again = schema.WhileOptionsT()
    again.condSubgraphIndex, again.bodySubgraphIndex = 1, 2
    main, condition, body = schema.SubGraphT(), schema.SubGraphT(), schema.SubGraphT()
    main.tensors = [tensor("x", t.FLOAT32, [1]), tensor("y", t.FLOAT32, [1])]
    main.operators = [operator(0, [0], [1], (o.WhileOptions, again))]
    condition.tensors = [
        tensor("a", t.FLOAT32, [1]),
        tensor("most", t.FLOAT32, [1], 1),
        tensor("on", t.BOOL, [1]),
    ]
    condition.operators = [operator(1, [0, 1], [2], (o.LessOptions, schema.LessOptionsT()))]
    body.tensors = [
        tensor("a", t.FLOAT32, [1]),
        tensor("one", t.FLOAT32, [1], 2),
        tensor("b", t.FLOAT32, [1]),
    ]
    body.operators = [operator(2, [0, 1], [2], (o.AddOptions, schema.AddOptionsT()))]
    for graph, last in ((main, 1), (condition, 2), (body, 2)):
        graph.inputs, graph.outputs = [0], [last]
    constants = [np.array([1000], np.float32), np.array([1], np.float32)]
    return tflite([b.WHILE, b.LESS, b.ADD], [main, condition, body], constants)


def test_loops_of_both_formats_are_seen():
    content = counting()
    session = open_session(content, "tflite")
    (name,) = (spec.name for spec in session.inputs)
    (y,) = session.run({name: np.array([3], np.float32)}).values()
    assert y.tolist() == [1000]
    assert not steady(content, "tflite")
    assert steady(models.quantised(), "tflite")
    assert not steady(models.loop(), "onnx")
    assert steady(models.autoencoder(), "onnx")
    with pytest.raises(PitheadError, match="not a whole TFLite file"):
        steady(content[:10], "tflite")


@pytest.mark.parametrize("loops", [False, True])
def test_a_slots_model_is_looked_into_too(tmp_path: Path, loops: bool):  # noqa: FBT001 - of the parametrisation
    made = make_package(tmp_path, kind="float32.tflite")
    content = counting() if loops else made.model()
    path = tmp_path / "looping"
    path.write_bytes(content)
    file = msgspec.structs.replace(
        made.variant.file,
        path="other.tflite",
        length=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    variant = msgspec.structs.replace(made.variant, file=file)
    text = msgspec.json.encode(msgspec.structs.replace(made.manifest, variants=(variant,)))
    manifest = tmp_path / "manifest"
    manifest.write_bytes(text)
    spec = msgspec.structs.replace(
        made.spec({}),
        digest=hashlib.sha256(text).hexdigest(),
        manifest=str(manifest),
        files={file.path: str(path)},
    )
    opened = Offer(spec).candidate.open()
    assert opened.steady is not loops
    opened.session.close()
