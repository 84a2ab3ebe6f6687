"""Changes of a TFLite model. They run in the confined child (``models.optimise.worker``), without files.

Pruning and float16 weights are short walks over the flatbuffer, whose schema
ships with LiteRT; int8 is ai-edge-quantizer's, an optional package.
"""

import importlib
import logging
import warnings
from collections.abc import Sequence
from typing import Any, Final

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from contract.errors import PitheadError
from models.optimise.pruning import pruned

SMALLEST: Final = 64
_SIGNATURE: Final = "serving_default"
_VERSION_OF_FP16: Final = 3
"""Of DEQUANTIZE: the first that takes float16."""
_PACKAGE: Final = "ai-edge-quantizer"
_PARTS: Final = ("quantizer", "calibrator", "recipe", "recipe_manager", "utils.qsv_utils")


def check_float(content: bytes) -> None:
    """Raise ``optimise.failed`` for a model whose numbers are not float32 any more."""
    integers = {schema.TensorType.INT8, schema.TensorType.UINT8, schema.TensorType.INT16}
    for graph in _read(content).subgraphs:
        for tensor in graph.tensors:
            quantised = tensor.quantization is not None and len(_some(tensor.quantization.scale)) > 0
            if tensor.type == schema.TensorType.FLOAT16 or (tensor.type in integers and quantised):
                name = (tensor.name or b"").decode(errors="replace")
                raise PitheadError(
                    "optimise.failed",
                    f"it is float16 or quantised already ({name!r}): begin with its float32 original",
                )


def _some(values: Any) -> Any:
    return () if values is None else values


def prune(content: bytes, share: float) -> bytes:
    """Return the model with the smallest ``share`` of each weight matrix at 0."""
    model = _read(content)
    for graph in model.subgraphs:
        for tensor, values in _weights(model, graph):
            model.buffers[tensor.buffer].data = _raw(pruned(values, share))
    return _written(model)


def fp16(content: bytes) -> bytes:
    """Return the model with float16 weights and DEQUANTIZE before all else, which delegates fold at load."""
    model = _read(content)
    code = _dequantize(model)
    for graph in model.subgraphs:
        before = []
        for tensor, values in _weights(model, graph):
            limit = float(np.finfo(np.float16).max)
            half, buffer = schema.TensorT(), schema.BufferT()
            buffer.data = _raw(np.clip(values, -limit, limit).astype(np.float16))
            model.buffers.append(buffer)
            half.name = (tensor.name or b"") + b"_fp16"
            half.type, half.shape = schema.TensorType.FLOAT16, tensor.shape
            half.buffer = len(model.buffers) - 1
            graph.tensors.append(half)
            tensor.buffer = 0
            operator = schema.OperatorT()
            operator.opcodeIndex = code
            operator.inputs, operator.outputs = [len(graph.tensors) - 1], [graph.tensors.index(tensor)]
            operator.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
            operator.builtinOptions = schema.DequantizeOptionsT()
            before.append(operator)
        graph.operators = [*before, *graph.operators]
    _drop_unused(model)
    return _written(model)


def load_quantizer() -> None:
    """Import ai-edge-quantizer, before a sandbox closes; raises ``optimise.tool_missing``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # What is imported while it runs, a sandbox would forbid.
            for name in _PARTS:
                importlib.import_module(f"ai_edge_quantizer.{name}")
        except ImportError as error:
            raise PitheadError(
                "optimise.tool_missing",
                f"int8 for TFLite needs the package {_PACKAGE}: pip install 'pithead[optimise]' ({error})",
            ) from error


def int8(content: bytes, feeds: Sequence[dict[str, NDArray[Any]]]) -> bytes:
    """Return a model of int8 weights by channel and int8 activations, inputs and outputs included.

    ``feeds`` are whole calls: one array for each input tensor.
    """
    load_quantizer()
    quantizer, calibrator, recipe, manager, statistics = (
        importlib.import_module(f"ai_edge_quantizer.{name}") for name in _PARTS
    )
    logging.disable(logging.CRITICAL)
    signed, names = _with_signature(content)
    samples = [{names[name]: array for name, array in feed.items()} for feed in feeds]
    wanted = recipe.static_wi8_ai8()
    recipes = manager.RecipeManager()
    recipes.load_quantization_recipe(wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # By default it averages the ranges of samples, and would cut off what only few of them reach.
        work = calibrator.Calibrator(signed, num_threads=1, qsv_update_func=statistics.min_max_update)
        work.calibrate({_SIGNATURE: samples}, recipes)
        made = quantizer.Quantizer(bytearray(signed), wanted).quantize(work.get_model_qsvs()).quantized_model
    if made is None:
        raise PitheadError("optimise.failed", f"{_PACKAGE} gave no model")
    return bytes(made)


def _with_signature(content: bytes) -> tuple[bytes, dict[str, str]]:
    """Return the model with one signature of plain names, and those names by input tensor.

    ai-edge-quantizer feeds models by signature, and many files have none. It
    reads operators in the newer of two fields only, which older files leave at 0.
    """
    model = _read(content)
    for code in model.operatorCodes:
        code.builtinCode = max(code.builtinCode, code.deprecatedBuiltinCode)
    graph = model.subgraphs[0]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = _SIGNATURE, 0
    names = {graph.tensors[index].name.decode(): f"in_{i}" for i, index in enumerate(graph.inputs)}
    signature.inputs = [_mapped(f"in_{i}", index) for i, index in enumerate(graph.inputs)]
    signature.outputs = [_mapped(f"out_{i}", index) for i, index in enumerate(graph.outputs)]
    model.signatureDefs = [signature]
    return _written(model), names


def _mapped(name: str, tensor: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, int(tensor)
    return entry


def _weights(model: Any, graph: Any) -> list[tuple[Any, NDArray[Any]]]:
    """Return the float constants that are matrices or more and large enough to matter, each buffer once."""
    found: dict[int, tuple[Any, NDArray[Any]]] = {}
    shared = [tensor.buffer for other in model.subgraphs for tensor in other.tensors]
    for tensor in graph.tensors:
        data = model.buffers[tensor.buffer].data if tensor.buffer else None
        if tensor.type != schema.TensorType.FLOAT32 or data is None or len(tensor.shape) < 2:  # noqa: PLR2004
            continue
        values = np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.float32).reshape(tensor.shape)
        if values.size >= SMALLEST and shared.count(tensor.buffer) == 1:
            found[tensor.buffer] = tensor, values
    return list(found.values())


def _dequantize(model: Any) -> int:
    """Return the index of the operator code, which is added where it is not there."""
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.DEQUANTIZE
    code.version = _VERSION_OF_FP16
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def _drop_unused(model: Any) -> None:
    """Empty the buffers that no tensor names any more."""
    used = {tensor.buffer for graph in model.subgraphs for tensor in graph.tensors}
    used |= {entry.buffer for entry in model.metadata or []}
    for i, buffer in enumerate(model.buffers):
        if i not in used:
            buffer.data = None


def _read(content: bytes) -> Any:
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def _written(model: Any) -> bytes:
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _raw(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
