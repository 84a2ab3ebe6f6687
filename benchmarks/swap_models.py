"""A model that is slow to load and quick to run: what a swap under load has to bring in."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

WIDTH = 64
ROWS_PER_MB = 2**20 // (4 * WIDTH)


def embedding(megabytes: int, value: float) -> bytes:
    """Return a model that adds one row of a table of that size to its input; each row is ``value``."""
    table = np.full((megabytes * ROWS_PER_MB, WIDTH), value, np.float32)
    nodes = [
        helper.make_node("ReduceMin", ["input"], ["least"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["least"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["found"]),
        helper.make_node("Add", ["input", "found"], ["output"]),
    ]
    tensors = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", WIDTH]) for name in ("input", "output")
    ]
    graph = helper.make_graph(
        nodes, "embedding", tensors[:1], tensors[1:], [numpy_helper.from_array(table, "table")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def heavy(width: int, layers: int) -> bytes:
    """Return a model that multiplies its 64 inputs by so many square matrices: some milliseconds of work."""
    random = np.random.default_rng(0)
    square = (random.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32)
    first = (random.normal(size=(WIDTH, width)) / 8).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["input", "first"], ["h0"])]
    for i in range(layers):
        nodes += [
            helper.make_node("MatMul", [f"h{i}", "square"], [f"a{i}"]),
            helper.make_node("Tanh", [f"a{i}"], [f"h{i + 1}"]),
        ]
    nodes.append(helper.make_node("ReduceMean", [f"h{layers}"], ["output"], axes=[1], keepdims=1))
    weights = [numpy_helper.from_array(first, "first"), numpy_helper.from_array(square, "square")]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("input", WIDTH), ("output", 1))
    ]
    graph = helper.make_graph(nodes, "heavy", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
