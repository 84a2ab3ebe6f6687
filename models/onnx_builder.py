"""Dense networks as ``.onnx`` files, float and int8.

The int8 form is QDQ (QuantizeLinear / DequantizeLinear around float
operators) with the very integers and scales of the TFLite file, so that both
runtimes compute the same network; input and output stay float32.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from models.dense import Network, QuantisedNetwork

INPUT: Final = "input"
OUTPUT: Final = "output"
_OPSET: Final = 17
_IR_VERSION: Final = 8


class _Graph:
    """A graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def scales(self, name: str, scale: float, zero_point: int, dtype: Any) -> list[str]:
        return [
            self.constant(f"{name}_scale", np.array(scale, np.float32)),
            self.constant(f"{name}_zero_point", np.array(zero_point, dtype)),
        ]

    def round_trip(self, name: str, scale: float, zero_point: int) -> str:
        """Quantise and dequantise ``name``."""
        scales = self.scales(name, scale, zero_point, np.int8)
        quantised = self.node("QuantizeLinear", [name, *scales], f"{name}_int8")
        return self.node("DequantizeLinear", [quantised, *scales], f"{name}_real")

    def finish(self, inputs: int, outputs: int, description: str) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "main",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", inputs])],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", outputs])],
            self.constants,
        )
        model: ModelProto = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET)],
            ir_version=_IR_VERSION,
            producer_name="pithead",
            doc_string=description,
        )
        return bytes(model.SerializeToString(deterministic=True))


def build_float(network: Network, description: str) -> bytes:
    """Return a float32 model: input ``input`` (n, inputs), output ``output`` (n, outputs)."""
    graph = _Graph()
    current = INPUT
    for i, layer in enumerate(network.layers):
        weights = graph.constant(f"weights_{i}", layer.weights.astype(np.float32))
        bias = graph.constant(f"bias_{i}", layer.bias.astype(np.float32))
        last = i == len(network.layers) - 1
        name = OUTPUT if last and not layer.relu else f"dense_{i}"
        current = graph.node("Gemm", [current, weights, bias], name, transB=1)
        if layer.relu:
            current = graph.node("Relu", [current], OUTPUT if last else f"hidden_{i}")
    return graph.finish(network.sizes[0], network.sizes[-1], description)


def build_int8(network: QuantisedNetwork, description: str) -> bytes:
    """Return an int8 QDQ model, named as in ``build_float``."""
    graph = _Graph()
    scale = network.input_scale
    current = graph.round_trip(INPUT, scale, network.input_zero_point)
    for i, layer in enumerate(network.layers):
        constants = []
        for name, values, step in (
            (f"weights_{i}", layer.weights, layer.weight_scale),
            (f"bias_{i}", layer.bias, scale * layer.weight_scale),
        ):
            scales = graph.scales(name, step, 0, values.dtype)
            stored = graph.constant(f"{name}_integers", values)
            constants.append(graph.node("DequantizeLinear", [stored, *scales], name))
        current = graph.node("Gemm", [current, *constants], f"dense_{i}", transB=1)
        if layer.relu:
            current = graph.node("Relu", [current], f"hidden_{i}")
        scale = layer.output_scale
        last = i == len(network.layers) - 1
        current = graph.round_trip(current, scale, layer.output_zero_point)
        if last:
            graph.nodes[-1].output[0] = OUTPUT
    width = network.layers[0].weights.shape[1]
    return graph.finish(width, len(network.layers[-1].bias), description)
