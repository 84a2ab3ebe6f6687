"""Changes of an ONNX model. They run in the confined child (``models.optimise.worker``), without files.

Fusion is ONNX Runtime's own, handed back as ONNX. ``basic`` uses standard
operators only; what ``extended`` merges is mostly in the runtime's private
domain, which the screen refuses, and what depends on the processor (NCHWc) is
left out on purpose: the runtime does both at every load, on the device that
it is on.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper, shape_inference, version_converter
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import add_infer_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

from contract.errors import PitheadError
from models.optimise.pruning import pruned

Feed = Mapping[str, NDArray[Any]]
Run = Callable[[bytes], Iterator[Mapping[str, NDArray[Any]]]]
"""Opens a model and yields its outputs for all calibration data, part by part."""
_LEVELS: Final = {
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
_QUANTISED: Final = (
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantize",
    "QLinear",
    "MatMulInteger",
    "ConvInteger",
)
_IR_OF_CONSTANTS: Final = 4
_OPSET_BY_CHANNEL: Final = 13
"""The first whose DequantizeLinear has a scale for each channel."""
SMALLEST: Final = 64
"""Constants with fewer values keep their datatype: nothing would be gained."""


def check_float(content: bytes) -> None:
    """Raise ``optimise.failed`` for a model whose numbers are not float32 any more."""
    graph = onnx.load_model_from_string(content).graph
    found = sorted({n.op_type for n in graph.node if n.op_type.startswith(_QUANTISED)})
    if found:
        raise PitheadError(
            "optimise.failed",
            f"it is quantised already ({', '.join(found)}): begin with its float32 original",
        )
    halves = [t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16]
    if halves:
        raise PitheadError(
            "optimise.failed", f"its weights are float16 ({halves[0]!r}): begin with its float32 original"
        )


def fuse(content: bytes, level: str) -> bytes:
    """Return the graph as ONNX Runtime has it after its optimisations up to ``level``."""
    compiler = onnxruntime.ModelCompiler(
        onnxruntime.SessionOptions(),
        content,
        embed_compiled_data_into_model=True,
        graph_optimization_level=_LEVELS[level],
    )
    model = onnx.load_model_from_string(compiler.compile_to_bytes())
    # It declares every domain that the runtime knows.
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    return _bytes(model)


def prune(content: bytes, share: float) -> bytes:
    """Return the model with the smallest ``share`` of each weight matrix at 0."""
    model = onnx.load_model_from_string(content)
    for tensor in _weights(model):
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(pruned(values, share), tensor.name))
    return _bytes(model)


def fp16(content: bytes) -> bytes:
    """Return the model with float16 weights and a ``Cast`` behind each, which the runtime folds at load.

    On CPUs ONNX Runtime computes few operators in float16 and would cast
    around all others at every call; so only what is stored is halved.
    """
    model = onnx.load_model_from_string(content)
    casts = []
    for tensor in _weights(model):
        name, values = tensor.name, numpy_helper.to_array(tensor)
        limit = float(np.finfo(np.float16).max)
        half = np.clip(values, -limit, limit).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}_fp16"))
        casts.append(
            helper.make_node("Cast", [tensor.name], [name], name=f"{name}_wide", to=TensorProto.FLOAT)
        )
    for node in reversed(casts):
        model.graph.node.insert(0, node)
    return _bytes(model)


def int8(content: bytes, run: Run) -> tuple[bytes, dict[str, float]]:
    """Return a QDQ model (int8 weights by channel, int8 activations), and each output's step.

    The step is what one unit of the last quantisation is worth; an output
    that is not quantised has none. Inputs and outputs stay float32.
    """
    logging.disable(logging.CRITICAL)  # it recommends what was done already
    model = onnx.load_model_from_string(fuse(content, "basic"))
    # Before version 4 constants were inputs too, without which the version converter does not know them.
    model.ir_version = max(model.ir_version, _IR_OF_CONSTANTS)
    if next(o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}) < _OPSET_BY_CHANNEL:
        # The quantiser's own way of doing it wants to write files.
        model = version_converter.convert_version(model, _OPSET_BY_CHANNEL)
    model = shape_inference.infer_shapes(model)
    add_infer_metadata(model)
    quantizer = QDQQuantizer(
        model,
        True,  # by channel
        False,  # the whole range of int8
        QuantType.QInt8,
        QuantType.QInt8,
        TensorsData(CalibrationMethod.MinMax, _ranges(model, run)),
        [],
        [],
        sorted({*QLinearOpsRegistry, *QDQRegistry}),
        {},
    )
    quantizer.quantize_model()
    made: ModelProto = quantizer.model.model
    del made.metadata_props[:]
    return _bytes(made), _steps(made)


def _ranges(model: ModelProto, run: Run) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return the least and the largest value of every float tensor over the calibration data."""
    watched = ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    present = {value.name for value in graph.output}
    graph.output.extend(
        value
        for value in graph.value_info
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and value.name not in present
    )
    found: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for outputs in run(watched.SerializeToString()):
        for name, values in outputs.items():
            if values.dtype != np.float32 or not values.size:
                continue
            low, high = values.min(), values.max()
            if name in found:
                low, high = np.minimum(low, found[name][0]), np.maximum(high, found[name][1])
            found[name] = np.asarray(low), np.asarray(high)
    return found


def _steps(model: ModelProto) -> dict[str, float]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = {
        node.output[0]: constants[node.input[1]]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[1] in constants
    }
    return {
        output.name: float(numpy_helper.to_array(scales[output.name]).max())
        for output in model.graph.output
        if output.name in scales
    }


def _weights(model: ModelProto) -> Sequence[TensorProto]:
    """Return the float constants of the main graph that are matrices or more, and large enough to matter."""
    _lift_constants(model)
    return [
        tensor
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and np.prod(tensor.dims) >= SMALLEST
    ]


def _lift_constants(model: ModelProto) -> None:
    """Make initialisers of `Constant` nodes, which some exporters use for weights."""
    kept = []
    for node in model.graph.node:
        values = [a.t for a in node.attribute if a.name == "value"] if node.op_type == "Constant" else []
        if not values:
            kept.append(node)
            continue
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(values[0])
        tensor.name = node.output[0]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _bytes(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))
