"""Files that must not reach a runtime."""

import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from contract.errors import PitheadError
from inference.registry import open_session
from inference.screening import SCREENS
from models import onnx_builder, tflite_builder
from models.dense import Layer, Network

NETWORK = Network((Layer(np.ones((2, 2)), np.zeros(2), relu=False),))


def onnx_model(nodes: list, initialisers: list | None = None, **fields: object) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        initialisers or [],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, **fields)


def external(name: str) -> TensorProto:
    tensor = numpy_helper.from_array(np.ones((1, 2), np.float32), name)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    return tensor


def refused(model: onnx.ModelProto | bytes, file_format: str = "onnx") -> PitheadError:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    with pytest.raises(PitheadError) as caught:
        open_session(content, file_format)
    assert caught.value.code == "package.unsafe_model", caught.value
    return caught.value


def test_good_models_pass():
    SCREENS["onnx"](onnx_builder.build_float(NETWORK, ""))
    SCREENS["tflite"](tflite_builder.build_float(NETWORK, ""))


def test_external_data_is_refused():
    assert "external data" in str(
        refused(onnx_model([helper.make_node("Add", ["x", "w"], ["y"])], [external("w")]))
    )


def test_external_data_without_its_flag_is_refused():
    tensor = external("w")
    tensor.data_location = TensorProto.DEFAULT
    refused(onnx_model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor]))


def test_external_data_inside_an_attribute_is_refused():
    constant = helper.make_node("Constant", [], ["c"], value=external("v"))
    refused(onnx_model([constant, helper.make_node("Add", ["x", "c"], ["y"])]))


def test_external_data_inside_a_subgraph_is_refused():
    def branch(tensors: list) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 2])
        return helper.make_graph([helper.make_node("Identity", ["w"], ["z"])], "b", [], [out], tensors)

    inside = [external("w")]
    fine = [numpy_helper.from_array(np.ones((1, 2), np.float32), "w")]
    condition = numpy_helper.from_array(np.array(True), "c")
    for then, otherwise in ((inside, fine), (fine, inside)):
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch(then), else_branch=branch(otherwise))
        refused(onnx_model([node], [condition]))


def test_external_data_in_a_sparse_tensor_is_refused():
    model = onnx_model([helper.make_node("Identity", ["x"], ["y"])])
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(external("s"))
    refused(model)


def test_custom_domains_and_local_functions_are_refused():
    for domain in ("com.microsoft", "my.own"):
        error = refused(onnx_model([helper.make_node("Gelu", ["x"], ["y"], domain=domain)]))
        assert domain in error.detail
    function = helper.make_function(
        "my.own",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("Identity", ["a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    refused(onnx_model([helper.make_node("Identity", ["x"], ["y"])], functions=[function]))


def test_an_unknown_operator_does_not_load():
    with pytest.raises(PitheadError, match=r"inference\.load_failed"):
        open_session(onnx_model([helper.make_node("Frobnicate", ["x"], ["y"])]).SerializeToString(), "onnx")


def test_graphs_nested_too_deeply_are_refused():
    """Written by hand: the protobuf library itself refuses to build it."""

    def field(number: int, content: bytes) -> bytes:
        size, encoded = len(content), b""
        while size >= 128:
            encoded, size = encoded + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + encoded + bytes([size]) + content

    graph = field(1, field(4, b"Identity"))
    for _ in range(40):
        graph = field(1, field(4, b"If") + field(5, field(6, graph)))
    assert "nested" in refused(field(7, graph)).detail


def custom_tflite(builtin: int) -> bytes:
    model = schema.ModelT.InitFromPackedBuf(tflite_builder.build_float(NETWORK, ""), 0)
    code = model.operatorCodes[0]
    code.customCode = "FlexAdd"
    code.builtinCode = code.deprecatedBuiltinCode = builtin
    return pack(model)


def pack(model: schema.ModelT) -> bytes:
    import flatbuffers  # noqa: PLC0415

    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def test_custom_tflite_operators_are_refused():
    assert "FlexAdd" in refused(custom_tflite(schema.BuiltinOperator.CUSTOM), "tflite").detail
    refused(custom_tflite(schema.BuiltinOperator.ADD), "tflite")


def test_external_tflite_buffers_are_refused():
    model = schema.ModelT.InitFromPackedBuf(tflite_builder.build_float(NETWORK, ""), 0)
    group = schema.ExternalBufferGroupT()
    group.name = "weights.bin"
    model.externalBufferGroups = [group]
    assert "external" in refused(pack(model), "tflite").detail


@settings(max_examples=300)
@given(data=st.data())
def test_screens_never_fail_in_another_way(data: st.DataObject):
    """Cut, flipped or random: the only outcomes are silence and our own two codes."""
    file_format = data.draw(st.sampled_from(["onnx", "tflite"]))
    builder = onnx_builder if file_format == "onnx" else tflite_builder
    content = bytearray(builder.build_float(NETWORK, ""))
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(content[: data.draw(st.integers(0, len(content)))])
    codes = set()
    try:
        SCREENS[file_format](cut)
    except PitheadError as error:
        codes.add(error.code)
    assert codes <= {"package.unsafe_model", "inference.load_failed"}
