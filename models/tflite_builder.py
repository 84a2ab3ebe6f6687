"""Dense networks as ``.tflite`` files, float and int8, without TensorFlow.

The flatbuffer schema ships with ai-edge-litert. Tensors, scales and operator
versions follow the TFLite quantisation specification: int8 activations
(asymmetric), int8 weights (symmetric), int32 biases.
"""

from collections.abc import Sequence
from typing import Any, Final

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from models.dense import Network, QuantisedNetwork

INPUT: Final = "input"
OUTPUT: Final = "output"
_SCHEMA_VERSION: Final = 3
_FLOAT_VERSION: Final = 1
_INT8_VERSION: Final = 4
"""Of FULLY_CONNECTED: the first that takes int8."""


class _Graph:
    """A subgraph under construction: one chain of fully connected layers."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        kind: int,
        data: NDArray[Any] | None = None,
        quantisation: tuple[float, int] | None = None,
    ) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.shape = name, kind, list(shape)
        if data is None:
            # One row unless somebody asks for more.
            tensor.shapeSignature = [-1, *shape[1:]]
            tensor.buffer = 0
        else:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.buffers.append(buffer)
            tensor.buffer = len(self.buffers) - 1
        if quantisation is not None:
            parameters = schema.QuantizationParametersT()
            parameters.scale = np.array([quantisation[0]], np.float32)
            parameters.zeroPoint = np.array([quantisation[1]], np.int64)
            tensor.quantization = parameters
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def fully_connected(self, inputs: list[int], output: int, *, relu: bool) -> None:
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = (
            schema.ActivationFunctionType.RELU if relu else schema.ActivationFunctionType.NONE
        )
        operator = schema.OperatorT()
        operator.inputs, operator.outputs, operator.opcodeIndex = inputs, [output], 0
        operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = options
        self.operators.append(operator)

    def finish(self, inputs: int, output: int, version: int, description: str) -> bytes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
        code.version = version
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = "main", self.tensors, self.operators
        graph.inputs, graph.outputs = [inputs], [output]
        model = schema.ModelT()
        model.version, model.description = _SCHEMA_VERSION, description
        model.operatorCodes, model.subgraphs, model.buffers = [code], [graph], self.buffers
        builder = flatbuffers.Builder(4096)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def build_float(network: Network, description: str) -> bytes:
    """Return a float32 model: input ``input`` (n, inputs), output ``output`` (n, outputs)."""
    graph = _Graph()
    sizes = network.sizes
    kind = schema.TensorType.FLOAT32
    first = current = graph.tensor(INPUT, (1, sizes[0]), kind)
    for i, layer in enumerate(network.layers):
        weights = graph.tensor(f"weights_{i}", layer.weights.shape, kind, layer.weights.astype(np.float32))
        bias = graph.tensor(f"bias_{i}", layer.bias.shape, kind, layer.bias.astype(np.float32))
        name = OUTPUT if i == len(network.layers) - 1 else f"hidden_{i}"
        output = graph.tensor(name, (1, sizes[i + 1]), kind)
        graph.fully_connected([current, weights, bias], output, relu=layer.relu)
        current = output
    return graph.finish(first, current, _FLOAT_VERSION, description)


def build_int8(network: QuantisedNetwork, description: str) -> bytes:
    """Return an int8 model with int8 input and output, named as in ``build_float``."""
    graph = _Graph()
    int8, int32 = schema.TensorType.INT8, schema.TensorType.INT32
    scale = network.input_scale
    width = network.layers[0].weights.shape[1]
    first = current = graph.tensor(INPUT, (1, width), int8, None, (scale, network.input_zero_point))
    for i, layer in enumerate(network.layers):
        weights = graph.tensor(
            f"weights_{i}", layer.weights.shape, int8, layer.weights, (layer.weight_scale, 0)
        )
        bias = graph.tensor(f"bias_{i}", layer.bias.shape, int32, layer.bias, (scale * layer.weight_scale, 0))
        name = OUTPUT if i == len(network.layers) - 1 else f"hidden_{i}"
        quantisation = (layer.output_scale, layer.output_zero_point)
        output = graph.tensor(name, (1, len(layer.bias)), int8, None, quantisation)
        graph.fully_connected([current, weights, bias], output, relu=layer.relu)
        current, scale = output, layer.output_scale
    return graph.finish(first, current, _INT8_VERSION, description)
