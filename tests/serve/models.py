"""Small real models for the tests of serving, made with the onnx package and the project's own builders."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from models import onnx_builder, tflite_builder
from models.dense import Layer, Network, quantise_network

WIDTH = 64


def network(sizes: tuple[int, ...] = (WIDTH, 32, 8, 32, WIDTH), seed: int = 0) -> Network:
    random = np.random.default_rng(seed)
    pairs = list(pairwise(sizes))
    return Network(
        tuple(
            Layer(random.normal(0, 0.3, (b, a)), random.normal(0, 0.1, b), relu=i < len(pairs) - 1)
            for i, (a, b) in enumerate(pairs)
        )
    )


def autoencoder(seed: int = 0) -> bytes:
    """Input ``input`` and output ``output``, FP32 [-1, 64]: batches, runs inline."""
    return onnx_builder.build_float(network(seed=seed), "autoencoder")


def quantised() -> bytes:
    """The same as int8 TFLite; takes and gives integers."""
    calibration = np.random.default_rng(3).normal(size=(256, WIDTH))
    return tflite_builder.build_int8(quantise_network(network(), calibration), "autoencoder")


def _save(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: tuple[Any, ...] = ()) -> bytes:
    graph = helper.make_graph(nodes, "main", inputs, outputs, list(constants))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _value(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def add_sub() -> bytes:
    """INPUT0 + INPUT1 and INPUT0 - INPUT1, INT32 [1, 16]: of fixed shape."""
    kind, shape = TensorProto.INT32, [1, 16]
    return _save(
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        [_value("INPUT0", kind, shape), _value("INPUT1", kind, shape)],
        [_value("OUTPUT0", kind, shape), _value("OUTPUT1", kind, shape)],
    )


KINDS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
}


def every_type() -> bytes:
    """An identity for each datatype, [-1, 3]."""
    return _save(
        [helper.make_node("Identity", [f"in_{d}"], [f"out_{d}"]) for d in KINDS],
        [_value(f"in_{d}", kind, ["n", 3]) for d, kind in KINDS.items()],
        [_value(f"out_{d}", kind, ["n", 3]) for d, kind in KINDS.items()],
    )


def texts() -> bytes:
    """Texts to themselves, [-1]."""
    return _save(
        [helper.make_node("Identity", ["text"], ["same"])],
        [_value("text", TensorProto.STRING, ["n"])],
        [_value("same", TensorProto.STRING, ["n"])],
    )


def mean_over_rows() -> bytes:
    """Its first dimension is open, but its rows depend on each other: never to be batched."""
    kind = TensorProto.FLOAT
    return _save(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
        [_value("x", kind, ["n", 4])],
        [_value("y", kind, ["n", 4])],
    )


def slow(width: int = 512, layers: int = 24, inner: int = 16) -> bytes:
    """FP32 [-1, 4] to the same, some milliseconds; with ``inner`` 1 several rows cost hardly more."""
    random = np.random.default_rng(1)
    square = (random.normal(size=(width, width)) / np.sqrt(width)).astype(np.float32)
    first = random.normal(size=(4, width)).astype(np.float32)
    last = (random.normal(size=(width, 4)) / width).astype(np.float32)
    wide = np.ones((inner, 1), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h0"]),
        helper.make_node("Unsqueeze", ["h0", "axis"], ["r"]),
        helper.make_node("Mul", ["r", "wide"], ["g0"]),
    ]
    for i in range(layers):
        nodes += [
            helper.make_node("MatMul", [f"g{i}", "square"], [f"a{i}"]),
            helper.make_node("Tanh", [f"a{i}"], [f"g{i + 1}"]),
        ]
    nodes += [
        helper.make_node("ReduceMean", [f"g{layers}"], ["s"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["s", "last"], ["y"]),
    ]
    constants = {
        "first": first,
        "square": square,
        "last": last,
        "wide": wide,
        "axis": np.array([1], np.int64),
    }
    return _save(
        nodes,
        [_value("x", TensorProto.FLOAT, ["n", 4])],
        [_value("y", TensorProto.FLOAT, ["n", 4])],
        tuple(numpy_helper.from_array(v, k) for k, v in constants.items()),
    )


def gather() -> bytes:
    """Row ``i`` of a table of three: an index beyond it cannot be run."""
    table = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "table")
    return _save(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [_value("i", TensorProto.INT64, ["n"])],
        [_value("y", TensorProto.FLOAT, ["n", 2])],
        (table,),
    )


def loop() -> bytes:
    """Counts to ``n``, INT64 [1], which its input says: a run may take for ever."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Add", ["a", "one"], ["b"])],
        "body",
        [
            _value("i", TensorProto.INT64, []),
            _value("on", TensorProto.BOOL, []),
            _value("a", TensorProto.FLOAT, [1]),
        ],
        [_value("still", TensorProto.BOOL, []), _value("b", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    return _save(
        [
            helper.make_node("Squeeze", ["n"], ["count"]),
            helper.make_node("Loop", ["count", "", "zero"], ["y"], body=body),
        ],
        [_value("n", TensorProto.INT64, [1])],
        [_value("y", TensorProto.FLOAT, [1])],
        (numpy_helper.from_array(np.zeros(1, np.float32), "zero"),),
    )


def products() -> bytes:
    """All rows with all rows, FP32 [-1, 4]: its time and its answer grow with the square of its input."""
    return _save(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "t"], ["y"]),
        ],
        [_value("x", TensorProto.FLOAT, ["n", 4])],
        [_value("y", TensorProto.FLOAT, ["n", "m"])],
    )


def write(directory: Path) -> Path:
    """Write them all: bare files, and Triton's layout."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "autoencoder.onnx").write_bytes(autoencoder())
    (directory / "quantised.tflite").write_bytes(quantised())
    (directory / "every_type.onnx").write_bytes(every_type())
    (directory / "mean_over_rows.onnx").write_bytes(mean_over_rows())
    (directory / "texts.onnx").write_bytes(texts())
    (directory / "gather.onnx").write_bytes(gather())
    for version in ("1", "3"):
        (directory / "add_sub" / version).mkdir(parents=True, exist_ok=True)
        (directory / "add_sub" / version / "model.onnx").write_bytes(add_sub())
    (directory / "add_sub" / "3" / "labels.txt").write_text("zero\none\ntwo\n")
    return directory
