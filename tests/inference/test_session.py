"""Both runtimes behind one protocol: shapes, names, batches, refusals."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference import registry
from inference.arithmetic import DTYPES, dequantise, quantise
from inference.registry import open_session, read_file
from models import tflite_builder
from models.assemble import Assembled
from models.dense import Layer, Network, Training, quantise_network, train_autoencoder
from models.package import reference_to

VARIANTS = ("int8-tflite", "int8-onnx", "float32-tflite")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_gives_what_its_rows_give(assembled: Assembled, name: str):
    session = assembled.session(name)
    spec = session.inputs[0]
    rows = quantise(np.random.default_rng(5).standard_normal((7, 4)).astype(np.float32), spec)
    whole = session.run({spec.name: rows})["output"]
    one_by_one = np.concatenate([session.run({spec.name: rows[i : i + 1]})["output"] for i in range(7)])
    np.testing.assert_allclose(whole, one_by_one, atol=1e-6)
    assert session.run({spec.name: rows[:2]})["output"].shape == (2, 4)


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_belong_to_the_caller(assembled: Assembled, name: str):
    session = assembled.session(name)
    spec = session.inputs[0]
    first = session.run({spec.name: quantise(np.ones((1, 4), np.float32), spec)})["output"]
    kept = first.copy()
    session.run({spec.name: quantise(-np.ones((1, 4), np.float32), spec)})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", VARIANTS)
def test_wrong_inputs_are_named(assembled: Assembled, name: str):
    session = assembled.session(name)
    spec = session.inputs[0]
    dtype = DTYPES[spec.datatype]
    for feed, words in (
        ({}, "['input']"),
        ({"inptu": np.zeros((1, 4), dtype)}, "['inptu']"),
        ({"input": np.zeros((1, 5), dtype)}, "[1, 5]"),
        ({"input": np.zeros(4, dtype)}, "[4]"),
        ({"input": np.zeros((1, 4), np.int64)}, "int64"),
    ):
        with pytest.raises(PitheadError, match=r"inference\.bad_input") as caught:
            session.run(feed)
        assert words in caught.value.detail


@pytest.mark.parametrize(("name", "file_format"), [("int8.tflite", "tflite"), ("int8.onnx", "onnx")])
def test_accelerators_that_are_not_here_have_a_code(assembled: Assembled, name: str, file_format: str):
    for accelerator in ("edgetpu", "cuda", "nonsense"):
        with pytest.raises(PitheadError) as caught:
            open_session(assembled.contents[name], file_format, accelerator)
        assert caught.value.code == "inference.accelerator_missing"
        assert accelerator in caught.value.detail


def test_int8_tflite_and_onnx_are_the_same_network(assembled: Assembled):
    tflite, onnx = assembled.session("int8-tflite"), assembled.session("int8-onnx")
    x = np.random.default_rng(6).standard_normal((100, 4)).astype(np.float32)
    spec, result = tflite.inputs[0], tflite.outputs[0]
    a = dequantise(tflite.run({"input": quantise(x, spec)})["output"], result)
    b = onnx.run({"input": x})["output"]
    assert np.abs(a - b).max() <= result.scale * 1.01


def test_what_is_no_model_does_not_load(assembled: Assembled):
    for content in (b"", b"nonsense", b"\x00" * 64, b"\x08\x08\x12"):
        for file_format in ("onnx", "tflite"):
            with pytest.raises(PitheadError) as caught:
                open_session(content, file_format)
            assert caught.value.code == "inference.load_failed"
    with pytest.raises(PitheadError) as caught:
        open_session(assembled.contents["int8.onnx"], "torchscript")
    assert caught.value.code == "inference.runtime_missing"


@pytest.mark.parametrize(("name", "file_format"), [("int8.tflite", "tflite"), ("int8.onnx", "onnx")])
def test_a_truncated_model_does_not_load(assembled: Assembled, name: str, file_format: str):
    content = assembled.contents[name]
    for share in (0.1, 0.5, 0.9, 0.99):
        with pytest.raises(PitheadError) as caught:
            open_session(content[: int(len(content) * share)], file_format)
        assert caught.value.code in {"inference.load_failed", "package.unsafe_model"}


def test_read_file_tells_missing_from_changed(tmp_path: Path):
    file = tmp_path / "model"
    file.write_bytes(b"abc")
    wanted = reference_to("model", b"abc")
    assert read_file(file, wanted) == b"abc"
    for content in (b"abd", b"ab", b"abcd"):
        file.write_bytes(content)
        with pytest.raises(PitheadError, match=r"package\.file_mismatch"):
            read_file(file, wanted)
    with pytest.raises(PitheadError, match=r"package\.file_missing"):
        read_file(tmp_path / "other", wanted)


def test_the_registry_knows_this_machine():
    assert set(registry.installed()) == {"onnxruntime", "ai-edge-litert"}
    assert registry.accelerators()[-2:] == ("xnnpack", "cpu")


def test_sessions_run_beside_each_other(assembled: Assembled):
    """One session a thread, as the engine's lanes do."""
    wrong = []

    def work(name: str) -> None:
        session = assembled.session(name)
        spec = session.inputs[0]
        x = quantise(np.full((1, 4), 0.5, np.float32), spec)
        want = session.run({"input": x})["output"]
        wrong.extend(1 for _ in range(300) if (session.run({"input": x})["output"] != want).any())

    threads = [threading.Thread(target=work, args=(name,)) for name in VARIANTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- quantisation


@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    scale=st.floats(0.015625, 2.0, width=32),
    zero_point=st.integers(-128, 127),
)
def test_quantisation_is_off_by_half_a_step_at_most(values: list[float], scale: float, zero_point: int):
    spec = TensorSpec("x", "INT8", (1, len(values)), scale, zero_point)
    x = np.array(values, np.float32)
    back = dequantise(quantise(x, spec), spec)
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    assert np.abs(back - np.clip(x, low, high)).max() <= scale * 0.5 + 1e-4


@given(
    steps=st.lists(st.integers(-128, 127), min_size=1),
    scale=st.floats(0.001, 10.0),
    zero=st.integers(-128, 127),
)
def test_integers_survive_the_round_trip(steps: list[int], scale: float, zero: int):
    spec = TensorSpec("x", "INT8", (1, len(steps)), scale, zero)
    q = np.array(steps, np.int8)
    np.testing.assert_array_equal(quantise(dequantise(q, spec), spec), q)


@example(seed=34, width=1, hidden=1)
@given(seed=st.integers(0, 50), width=st.integers(1, 9), hidden=st.integers(1, 12))
def test_any_small_network_survives_quantisation(seed: int, width: int, hidden: int):
    random = np.random.default_rng(seed)
    layers = (
        Layer(random.normal(size=(hidden, width)), random.normal(size=hidden), relu=True),
        Layer(random.normal(size=(width, hidden)), random.normal(size=width), relu=False),
    )
    network = Network(layers)
    x = random.uniform(-4, 4, (64, width))
    integers = quantise_network(network, x)
    session = open_session(tflite_builder.build_int8(integers, ""), "tflite", "xnnpack")
    spec, result = session.inputs[0], session.outputs[0]
    got = dequantise(session.run({"input": quantise(x.astype(np.float32), spec)})["output"], result)
    want = network.activations(x)[-1]
    # One step at the input, the hidden layer and the output, each carried through the weights.
    steps = integers.input_scale, integers.layers[0].output_scale, integers.layers[1].output_scale
    gain = np.abs(layers[1].weights).sum(axis=1).max()
    bound = steps[0] * np.abs(layers[0].weights).sum(axis=1).max() * gain + steps[1] * gain + steps[2]
    rounding = sum(layer.weight_scale for layer in integers.layers) * 40 * max(1.0, gain)
    assert np.abs(got - want).max() <= bound + rounding


def test_training_is_the_same_each_time():
    rows = np.random.default_rng(1).standard_normal((256, 3))
    training = Training(hidden=(4, 2, 4), epochs=3, batch=32, seed=5)
    a, b = train_autoencoder(rows, training), train_autoencoder(rows, training)
    for one, other in zip(a.layers, b.layers, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)
