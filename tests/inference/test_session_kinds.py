"""Sessions of models that are not one float in, one float out: many tensors, states, texts, halves, reals."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper

from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline, Score, TensorSpec
from inference import registry
from inference.accelerators import NO_LIMITS, Resources
from inference.arithmetic import dequantise, quantise
from inference.made_up import made_up
from inference.reals import RealSession
from inference.registry import open_session
from inference.scoring import Scorer
from models import golden
from models.assemble import Assembled

NUMBERS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE,
}  # fmt: skip


def onnx(
    nodes: list[Any], inputs: list[tuple[str, int, list]], outputs: list[tuple[str, int, list]]
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info(*o) for o in outputs],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def tensor(name: str, kind: int, shape: list[int], buffer: int = 0, *, variable: bool = False) -> Any:
    made = schema.TensorT()
    made.name, made.type, made.shape, made.buffer, made.isVariable = name, kind, shape, buffer, variable
    return made


def operator(code: int, inputs: list[int], outputs: list[int], options: tuple[int, Any] = (0, None)) -> Any:
    made = schema.OperatorT()
    made.opcodeIndex, made.inputs, made.outputs = code, inputs, outputs
    made.builtinOptionsType, made.builtinOptions = options
    return made


def tflite(codes: list[int], graphs: list[Any], constants: list[np.ndarray]) -> bytes:
    model = schema.ModelT()
    model.version, model.subgraphs, model.operatorCodes, model.buffers = 3, graphs, [], [schema.BufferT()]
    for code in codes:
        made = schema.OperatorCodeT()
        made.builtinCode, made.version, made.deprecatedBuiltinCode = code, 1, min(code, 127)
        model.operatorCodes.append(made)
    for constant in constants:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(constant.tobytes(), np.uint8)
        model.buffers.append(buffer)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def with_resource(each: float = 0.0) -> bytes:
    """Adds its input to a variable that is a resource, and ``each`` after every run; gives the sum before."""
    b, o, t = schema.BuiltinOperator, schema.BuiltinOptions, schema.TensorType
    named = schema.VarHandleOptionsT()
    named.container, named.sharedName = "", "state"
    handle, once = (o.VarHandleOptions, named), schema.CallOnceOptionsT()
    once.initSubgraphIndex = 1
    main, init = schema.SubGraphT(), schema.SubGraphT()
    main.tensors = [
        tensor("x", t.FLOAT32, [1, 2]), tensor("handle", t.RESOURCE, []),
        tensor("before", t.FLOAT32, [1, 2]), tensor("sum", t.FLOAT32, [1, 2]),
        tensor("each", t.FLOAT32, [1, 2], 2), tensor("after", t.FLOAT32, [1, 2]),
    ]  # fmt: skip
    main.operators = [
        operator(4, [], [], (o.CallOnceOptions, once)),
        operator(0, [], [1], handle),
        operator(1, [1], [2], (o.ReadVariableOptions, schema.ReadVariableOptionsT())),
        operator(2, [0, 2], [3], (o.AddOptions, schema.AddOptionsT())),
        operator(2, [3, 4], [5], (o.AddOptions, schema.AddOptionsT())),
        operator(3, [1, 5], [], (o.AssignVariableOptions, schema.AssignVariableOptionsT())),
    ]
    main.inputs, main.outputs = [0], [3]
    init.tensors = [tensor("handle", t.RESOURCE, []), tensor("zero", t.FLOAT32, [1, 2], 1)]
    init.operators = [
        operator(0, [], [0], handle),
        operator(3, [0, 1], [], (o.AssignVariableOptions, schema.AssignVariableOptionsT())),
    ]
    init.inputs, init.outputs = [], []
    codes = [b.VAR_HANDLE, b.READ_VARIABLE, b.ADD, b.ASSIGN_VARIABLE, b.CALL_ONCE]
    return tflite(codes, [main, init], [np.zeros((1, 2), np.float32), np.full((1, 2), each, np.float32)])


def with_variable() -> bytes:
    """Adds up its input, and that of the run before: SVDF with a memory of two."""
    t, options = schema.TensorType, schema.SVDFOptionsT()
    options.rank = 1
    main = schema.SubGraphT()
    main.tensors = [
        tensor("x", t.FLOAT32, [1, 2]), tensor("feature", t.FLOAT32, [1, 2], 1),
        tensor("time", t.FLOAT32, [1, 2], 1), tensor("state", t.FLOAT32, [1, 2], variable=True),
        tensor("sum", t.FLOAT32, [1, 1]),
    ]  # fmt: skip
    main.operators = [operator(0, [0, 1, 2, -1, 3], [4], (schema.BuiltinOptions.SVDFOptions, options))]
    main.inputs, main.outputs = [0], [4]
    return tflite([schema.BuiltinOperator.SVDF], [main], [np.ones((1, 2), np.float32)])


@pytest.mark.parametrize("datatype", NUMBERS)
def test_every_number_of_the_protocol_goes_through_onnx(datatype: str):
    kind = NUMBERS[datatype]
    content = onnx(
        [helper.make_node("Identity", ["x"], ["y"])], [("x", kind, ["n", 2])], [("y", kind, ["n", 2])]
    )
    session = open_session(content, "onnx")
    assert session.inputs == (TensorSpec("x", datatype, (-1, 2)),)  # type: ignore[arg-type]
    for rows in (1, 3, 0):
        x = made_up(session.inputs, rows, random=True)["x"]
        got = session.run({"x": x})["y"]
        assert got.dtype == x.dtype
        np.testing.assert_array_equal(got, x)


def test_texts_go_in_as_bytes_or_words_and_come_out_as_bytes():
    kind = TensorProto.STRING
    content = onnx([helper.make_node("Identity", ["x"], ["y"])], [("x", kind, ["n"])], [("y", kind, ["n"])])
    session = open_session(content, "onnx")
    assert session.inputs[0].datatype == "BYTES"
    want = ["Förderband".encode(), b"", b"x" * 1000]
    for x in (
        np.array(want, object),
        np.array([w.decode() for w in want], object),
        np.array([w.decode() for w in want]),
        np.array(want),
    ):
        got = session.run({"x": x})["y"]
        assert got.dtype == object
        assert list(got) == want
    for bad, words in ((np.array([b"\xff\xfe"], object), "utf-8"), (np.array([7], object), "int is no text")):
        with pytest.raises(PitheadError, match=words) as caught:
            session.run({"x": bad})
        assert caught.value.code == "inference.bad_input"
    with pytest.raises(PitheadError, match="must be BYTES"):
        session.run({"x": np.zeros(1, np.float32)})


def test_texts_are_golden_too():
    kind = TensorProto.STRING
    content = onnx([helper.make_node("Identity", ["x"], ["y"])], [("x", kind, [2])], [("y", kind, [2])])
    session = open_session(content, "onnx")
    feed = {"x": np.array(["ä".encode(), b"b"], object)}
    assert golden.record(session, [feed]) == golden.record(session, [feed])
    assert golden.tolerances(session, golden.spread([session, session], [feed])) == {}


def test_many_tensors_go_by_their_names():
    content = onnx(
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("Sub", ["a", "b"], ["difference"]),
            helper.make_node("Cast", ["n"], ["half"], to=TensorProto.FLOAT16),
        ],
        [
            ("a", TensorProto.FLOAT, ["n", 2]),
            ("b", TensorProto.FLOAT, ["n", 2]),
            ("n", TensorProto.INT64, []),
        ],
        [
            ("sum", TensorProto.FLOAT, ["n", 2]),
            ("difference", TensorProto.FLOAT, ["n", 2]),
            ("half", TensorProto.FLOAT16, []),
        ],
    )
    session = open_session(content, "onnx")
    a, b = np.full((3, 2), 5, np.float32), np.ones((3, 2), np.float32)
    got = session.run({"n": np.array(7), "b": b, "a": a})
    assert list(got) == ["sum", "difference", "half"]
    assert got["sum"][2, 1] == 6
    assert got["difference"][2, 1] == 4
    assert got["half"].dtype == np.float16
    assert got["half"].shape == ()
    with pytest.raises(PitheadError, match=r"inference\.bad_input.*'n' must be INT64"):
        session.run({"n": np.array(7.0), "b": b, "a": a})


@pytest.mark.parametrize("accelerator", ["cpu", "xnnpack"])
@pytest.mark.parametrize(("content", "sums"), [(with_resource(), [1, 2, 3]), (with_variable(), [3, 6, 6])])
def test_variables_are_kept_between_runs_until_they_are_reset(
    accelerator: str, content: bytes, sums: list[float]
):
    session = open_session(content, "tflite", accelerator)
    x = np.array([[1, 2]], np.float32)
    for _ in range(3):
        assert [float(session.run({"x": x})["sum"][0, 0]) for _ in sums] == sums
        session.reset()
    vectors = golden.record(session, [{"x": x}, {"x": x}])
    assert golden.record(session, [{"x": x}, {"x": x}]) == vectors, "recorded from the same state"


def test_a_lanes_warm_up_leaves_no_trace_in_the_variables():
    session = open_session(with_resource(each=5), "tflite")
    channels = Channel("a"), Channel("b")
    pipeline = Pipeline(channels=channels, window=1, stride=1, mean=(0.0, 0.0), scale=(1.0, 1.0))
    score = Score(method="reconstruction_mse", threshold=1.0)
    Scorer(session, pipeline, score, session.inputs, session.outputs).warm_up()
    first = session.run({"x": np.array([[1, 2]], np.float32)})["sum"]
    assert float(first[0, 0]) == 1, "nothing was there before"


def test_an_onnx_model_has_nothing_to_reset(assembled: Assembled):
    session = assembled.session("int8-onnx")
    x = np.ones((1, 4), np.float32)
    before = session.run({"input": x})["output"]
    session.reset()
    np.testing.assert_array_equal(session.run({"input": x})["output"], before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_a_quantised_input_takes_real_values(assembled: Assembled, dtype: type):
    session = assembled.session("int8-tflite")
    spec = session.inputs[0]
    x = np.random.default_rng(2).standard_normal((5, 4)).astype(dtype)
    integers = quantise(x.astype(np.float32), spec)
    for feed in (x, integers, x, x[:2], integers[:3]):
        whole = feed if feed.dtype == np.int8 else quantise(feed.astype(np.float32), spec)
        np.testing.assert_array_equal(
            session.run({"input": feed})["output"], session.run({"input": whole})["output"]
        )
    plain = assembled.session("float32-tflite")
    with pytest.raises(PitheadError, match="must be FP32"):
        plain.run({"input": integers})


def test_a_quantised_input_takes_no_nan(assembled: Assembled):
    """It would become an integer like any other, and the answer look sound."""
    session = assembled.session("int8-tflite")
    x = np.zeros(tuple(max(1, d) for d in session.inputs[0].shape), np.float32)
    x.flat[0] = np.nan
    for shown in (session, RealSession(session)):
        with pytest.raises(PitheadError, match="NaN") as error:
            shown.run({shown.inputs[0].name: x})
        assert error.value.code == "inference.bad_input"
        shown.run({shown.inputs[0].name: np.full_like(x, np.inf)})


def test_a_view_in_real_values_hides_the_integers(assembled: Assembled):
    inner = assembled.session("int8-tflite")
    session = RealSession(inner)
    assert [(t.datatype, t.scale) for t in (*session.inputs, *session.outputs)] == [("FP32", None)] * 2
    assert session.accelerator == inner.accelerator
    assert session.placement.total == 4
    x = np.random.default_rng(2).standard_normal((5, 4)).astype(np.float32)
    want = dequantise(inner.run({"input": quantise(x, inner.inputs[0])})["output"], inner.outputs[0])
    np.testing.assert_array_equal(session.run({"input": x})["output"], want)
    session.reset()


def test_scales_that_a_format_does_not_carry_come_from_the_manifest():
    node = helper.make_node("Identity", ["x"], ["y"])
    content = onnx([node], [("x", TensorProto.INT8, [1, 2])], [("y", TensorProto.INT8, [1, 2])])
    known = (TensorSpec("x", "INT8", (1, 2), 0.5, 1), TensorSpec("y", "INT8", (1, 2), 0.25, 0))
    session = RealSession(open_session(content, "onnx"), known)
    got = session.run({"x": np.array([[1.0, -2.0]], np.float32)})["y"]
    np.testing.assert_array_equal(got, [[0.75, -0.75]])


def test_a_bfloat16_border_is_refused_by_name():
    node = helper.make_node("Identity", ["x"], ["y"])
    content = onnx([node], [("x", TensorProto.BFLOAT16, [1])], [("y", TensorProto.BFLOAT16, [1])])
    with pytest.raises(PitheadError, match="bfloat16") as caught:
        open_session(content, "onnx")
    assert caught.value.code == "inference.load_failed"


# --- resources


def test_the_arena_ends_where_the_device_says():
    """In a process of its own: the arena's limit is the process's."""
    program = """
import numpy as np
from onnx import TensorProto, helper
from inference.accelerators import Resources
from inference.registry import open_session
from contract.errors import PitheadError
n = helper.make_node("Concat", ["x"] * 8, ["y"], axis=0)
g = helper.make_graph([n, helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0)], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
    [helper.make_tensor_value_info("z", TensorProto.FLOAT, [])])
c = helper.make_model(g, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
s = open_session(c, "onnx", resources=Resources(memory_mb=16))
print(float(s.run({"x": np.ones(1000, np.float32)})["z"]))
try:
    s.run({"x": np.ones(1_000_000, np.float32)})
except PitheadError as error:
    print(error.code)
print(float(s.run({"x": np.ones(1000, np.float32)})["z"]))
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8000.0", "inference.run_failed", "8000.0"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity here")
def test_threads_of_a_session_stay_on_its_processors(assembled: Assembled):
    """The pools' threads inherit it; the caller has its own back."""
    before, known = os.sched_getaffinity(0), {path.name for path in Path("/proc/self/task").iterdir()}
    cpu = max(before)
    session = open_session(
        assembled.contents["int8.onnx"], "onnx", resources=Resources(threads=3, cpus=(cpu,))
    )
    assert os.sched_getaffinity(0) == before
    fresh = {path.name for path in Path("/proc/self/task").iterdir()} - known
    assert len(fresh) == 2, "threads=3 is the caller and two more"
    assert all(os.sched_getaffinity(int(task)) == {cpu} for task in fresh)
    session.close()


def test_processors_that_are_not_here_do_not_count():
    before = os.sched_getaffinity(0)
    with registry.on_cpus((4000,)):
        assert os.sched_getaffinity(0) == before
    seen: list[set[int]] = []
    with registry.on_cpus((min(before), 4000)):
        thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
        thread.start()
        thread.join()
    assert seen == [{min(before)}]
    assert os.sched_getaffinity(0) == before
    assert NO_LIMITS.threads == 1
