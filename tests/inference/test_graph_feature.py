"""An ONNX graph as the feature of a pipeline: in the probe, in a real engine, in a backtest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from contract.errors import PitheadError
from contract.manifest import Golden, Graph, Manifest, Score
from contract.package import check_manifest
from inference.probing import probe
from inference.registry import open_session
from models import golden, package
from models.backtest import backtest
from models.cli import app
from models.dense import Layer, Network
from models.graph import graph_of
from models.package import reference_to
from tests.engine.conftest import CHANNELS, Engine, engine, make_package, samples, write_csv  # noqa: F401
from tests.engine.test_engine import replay, windows_of

WINDOW, WIDTH = 8, len(CHANNELS)
EVERY = Score(method="reconstruction_mse", threshold=-1.0)


def graph_file(path: Path, nodes: list[Any], *, first: Any = "n", out: tuple[Any, ...] = (2, WIDTH)) -> Path:
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "features",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [first, WINDOW, WIDTH])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [first, *out])],
            [
                numpy_helper.from_array(np.array([1], np.int64), "axis"),
                numpy_helper.from_array(np.array([0], np.int64), "batch"),
                numpy_helper.from_array(np.array(0.0, np.float32), "zero"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    path.write_bytes(model.SerializeToString())
    return path


def middle_and_spread(path: Path, **changes: Any) -> Path:
    """Mean and largest magnitude of each channel: a table of two rows."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axis"], ["m"], keepdims=1),
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("ReduceMax", ["a", "axis"], ["s"], keepdims=1),
        helper.make_node("Concat", ["m", "s"], ["y"], axis=1),
    ]
    return graph_file(path, nodes, **changes)


def features(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([x.mean(axis=1, keepdims=True), np.abs(x).max(axis=1, keepdims=True)], axis=1)


def identity(width: int, factor: float = 0.0) -> Network:
    """A model that gives ``factor`` times its input, so that scores can be told beforehand."""
    return Network((Layer(weights=np.eye(width) * factor, bias=np.zeros(width), relu=False),))


class Packaged:
    """A package with a graph, on disk as ``models`` writes it and as an engine gets it."""

    def __init__(
        self, directory: Path, graph: Path, *, kind: str = "float32.tflite", per_channel: bool = True
    ) -> None:
        feature, contents = graph_of(graph, per_channel=per_channel)
        plain = make_package(
            directory / "plain", kind=kind, window=2, stride=4, score=EVERY, net=identity(2 * WIDTH)
        )
        variant = plain.variant
        session = open_session(plain.model(), variant.format, "cpu")
        size = session.inputs[0]
        feeds = [{size.name: np.full((1, *size.shape[1:]), i, np.float32)} for i in range(2)]
        recorded = golden.record(session, feeds)
        self.manifest: Manifest = msgspec.structs.replace(
            plain.manifest,
            variants=(
                msgspec.structs.replace(
                    variant,
                    golden=Golden(reference_to("v.npz", recorded), 2, golden.tolerances(session, {})),
                ),
            ),
            pipeline=msgspec.structs.replace(plain.pipeline, window=WINDOW, features=(feature,)),
        )
        self.contents = {variant.file.path: plain.model(), "v.npz": recorded, **contents}
        self.directory = directory / "package"
        package.write(self.directory, self.manifest, self.contents)
        self.files = {path: self.directory / path for path in self.contents}
        self.plain = plain

    def spec(self, source: dict[str, Any]) -> Any:
        text = (self.directory / "manifest.json").read_bytes()
        return msgspec.structs.replace(
            self.plain.spec(source),
            digest=hashlib.sha256(text).hexdigest(),
            manifest=str(self.directory / "manifest.json"),
            files={path: str(file) for path, file in self.files.items()},
        )


def scores(rows: np.ndarray[Any, Any]) -> dict[int, float]:
    """Of each window by the row that ends it; the model gives nothing, so its error is what it gets."""
    x = np.clip((rows - 20) / 3, -6, 6)
    found = {}
    for end in range(WINDOW - 1, len(rows), 4):
        value = features(x[None, end - WINDOW + 1 : end + 1])
        found[end] = float((value**2).mean())
    return found


@pytest.mark.parametrize("kind", ["float32.tflite", "float32.onnx"])
def test_a_lane_scores_what_the_graph_makes_and_a_backtest_gives_the_same(
    engine: Engine,  # noqa: F811 - the fixture
    tmp_path: Path,
    kind: str,
):
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "f.onnx"), kind=kind)
    (variant,) = made.manifest.variants
    installed = {ref.path for ref in made.manifest.files_of(variant)}
    assert installed == {variant.file.path, "v.npz", "features.onnx", "features.golden.npz"}
    (report,) = probe(made.manifest, made.files, accelerators=["cpu"])
    assert report.passed, report
    rows = samples(120)
    path = write_csv(tmp_path / "r.csv", rows)
    expected = scores(rows)
    supervisor = engine.connect()
    supervisor.configure(made.spec(replay(path, loop=False, rate_hz=100.0, speed=4.0)))
    supervisor.until(lambda: windows_of(supervisor) == len(expected), "all windows")
    supervisor.until(lambda: len(supervisor.anomalies) == len(expected), "all scores")
    seen = {int(a.source_ref): a.score for a in supervisor.anomalies}
    assert seen == pytest.approx(expected, rel=1e-4)
    assert set(supervisor.anomalies[0].contributions) == set(CHANNELS), "of channels, since the table is"
    found = backtest(made.directory, path)
    assert found.row.tolist() == sorted(expected)
    assert found.score.tolist() == pytest.approx([seen[row] for row in found.row.tolist()], rel=1e-6)


def test_values_of_no_channel_have_no_contributions(engine: Engine, tmp_path: Path):  # noqa: F811
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "f.onnx"), per_channel=False)
    supervisor = engine.connect()
    supervisor.configure(
        made.spec(replay(write_csv(tmp_path / "r.csv", samples(40)), loop=False, rate_hz=100.0, speed=4.0))
    )
    supervisor.until(lambda: supervisor.anomalies, "a score")
    assert supervisor.anomalies[0].contributions == {}


def test_windows_of_which_a_graph_makes_no_number_are_errors(engine: Engine, tmp_path: Path):  # noqa: F811
    nodes = [
        helper.make_node("ReduceMean", ["x", "axis"], ["m"], keepdims=1),
        helper.make_node("Log", ["m"], ["l"]),
        helper.make_node("Concat", ["l", "l"], ["y"], axis=1),
    ]
    graph = graph_file(tmp_path / "f.onnx", nodes)
    feature, contents = _of_positive_windows(graph, tmp_path)
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "g.onnx"))
    made.manifest = msgspec.structs.replace(
        made.manifest, pipeline=msgspec.structs.replace(made.manifest.pipeline, features=(feature,))
    )
    package.write(made.directory, made.manifest, made.contents | contents)
    rows = np.full((40, WIDTH), 23.0)
    rows[16:24] = 17.0  # the logarithm of a negative mean
    supervisor = engine.connect()
    supervisor.configure(
        made.spec(replay(write_csv(tmp_path / "r.csv", rows), loop=False, rate_hz=100.0, speed=4.0))
    )
    supervisor.until(lambda: windows_of(supervisor) >= 5, "the others are scored")
    supervisor.until(lambda: sum(s.errors for s in supervisor.summaries) > 0, "errors")
    state = supervisor.until_state(state="running", code="inference.not_finite")
    assert "the graph gave" in state.detail


def _of_positive_windows(graph: Path, tmp_path: Path) -> tuple[Graph, dict[str, bytes]]:
    np.save(tmp_path / "w.npy", np.abs(np.random.default_rng(1).normal(size=(5, WINDOW, WIDTH))) + 0.1)
    feature, contents = graph_of(graph, tmp_path / "w.npy", per_channel=True)
    assert feature.golden.vectors == 5
    return feature, contents


def test_a_graph_that_mixes_windows_is_refused(tmp_path: Path):
    nodes = [
        helper.make_node("ReduceMean", ["x", "batch"], ["b"], keepdims=1),
        helper.make_node("Sub", ["x", "b"], ["d"]),
        helper.make_node("ReduceMax", ["d", "axis"], ["m"], keepdims=1),
        helper.make_node("Concat", ["m", "m"], ["y"], axis=1),
    ]
    made = Packaged(tmp_path, graph_file(tmp_path / "f.onnx", nodes))
    (report,) = probe(made.manifest, made.files, accelerators=["cpu"])
    assert report.code == "probe.golden_mismatch"
    assert "all vectors at once" in report.detail


@pytest.mark.parametrize("kind", ["float32.tflite", "float32.onnx"])
def test_another_graph_than_the_golden_vectors_are_of_is_refused(tmp_path: Path, kind: str):
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "f.onnx"), kind=kind)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axis"], ["m"], keepdims=1),
        helper.make_node("Concat", ["m", "m"], ["y"], axis=1),
    ]
    other = graph_file(tmp_path / "g.onnx", nodes).read_bytes()
    (made.directory / "features.onnx").write_bytes(other)
    (report,) = probe(made.manifest, made.files, accelerators=["cpu"])
    assert report.code == "package.file_mismatch", "its hash is in the manifest"
    feature = msgspec.structs.replace(made.manifest.pipeline.graph, file=reference_to("features.onnx", other))
    manifest = msgspec.structs.replace(
        made.manifest, pipeline=msgspec.structs.replace(made.manifest.pipeline, features=(feature,))
    )
    (report,) = probe(manifest, made.files, accelerators=["cpu"])
    assert report.code == "probe.golden_mismatch"
    assert report.detail.startswith("the graph of the features: vector 0")


def test_a_graph_is_screened_as_a_model_is(tmp_path: Path):
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "f.onnx"))
    foreign = [
        helper.make_node("Foreign", ["x"], ["m"], domain="com.example"),
        helper.make_node("Concat", ["m", "m"], ["y"], axis=1),
    ]
    broken = graph_file(tmp_path / "g.onnx", foreign).read_bytes()
    (made.directory / "features.onnx").write_bytes(broken)
    feature = msgspec.structs.replace(
        made.manifest.pipeline.graph, file=reference_to("features.onnx", broken)
    )
    manifest = msgspec.structs.replace(
        made.manifest, pipeline=msgspec.structs.replace(made.manifest.pipeline, features=(feature,))
    )
    (report,) = probe(manifest, made.files, accelerators=["cpu"])
    assert report.code == "package.unsafe_model"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": (1, WINDOW, WIDTH)}, "first axis"),
        ({"shape": (-1, WINDOW + 1, WIDTH)}, "window and channels"),
        ({"shape": (-1, -1, WIDTH)}, "have a length"),
        ({"datatype": "INT8"}, "FP32 only"),
    ],
)
def test_what_a_manifest_says_of_a_graph_is_checked(tmp_path: Path, changes: dict[str, Any], words: str):
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "f.onnx"))
    graph = made.manifest.pipeline.graph
    changed = msgspec.structs.replace(graph, inputs=(msgspec.structs.replace(graph.inputs[0], **changes),))
    pipeline = msgspec.structs.replace(made.manifest.pipeline, features=(changed,))
    with pytest.raises(PitheadError, match=words) as refused:
        check_manifest(msgspec.structs.replace(made.manifest, pipeline=pipeline))
    assert refused.value.code == "package.manifest_invalid"


def test_a_graph_stands_alone_and_has_one_open_axis(tmp_path: Path):
    made = Packaged(tmp_path, middle_and_spread(tmp_path / "f.onnx"))
    pipeline = msgspec.structs.replace(made.manifest.pipeline, features=made.manifest.pipeline.features * 2)
    with pytest.raises(PitheadError, match="stands alone"):
        check_manifest(msgspec.structs.replace(made.manifest, pipeline=pipeline))
    with pytest.raises(PitheadError, match="first axis is open"):
        graph_of(middle_and_spread(tmp_path / "one.onnx", first=1))


def test_the_command_writes_the_files_and_says_what_the_manifest_needs(tmp_path: Path):
    graph = middle_and_spread(tmp_path / "f.onnx", out=(None, WIDTH))
    np.save(tmp_path / "w.npy", np.zeros((3, WINDOW, WIDTH)))
    arguments = ["graph", str(graph), "--windows", str(tmp_path / "w.npy"), "--out", str(tmp_path / "p")]
    result = CliRunner().invoke(app, [*arguments, "--per-channel"])
    assert result.exit_code == 0, result.output
    (said,) = json.loads(result.stdout)
    feature = msgspec.convert(said, Graph)
    assert feature.outputs[0].shape == (-1, 2, WIDTH), "what the file leaves open is seen"
    for ref in (feature.file, feature.golden.file):
        content = (tmp_path / "p" / ref.path).read_bytes()
        assert reference_to(ref.path, content) == ref
    np.save(tmp_path / "w.npy", np.zeros((3, WINDOW)))
    assert CliRunner().invoke(app, arguments).exit_code == 1
