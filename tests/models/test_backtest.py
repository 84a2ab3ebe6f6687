"""A recording through a backtest and through a real engine process: the same numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from contract.errors import PitheadError
from contract.features import Bands, Statistics
from contract.manifest import Fit, Golden, Score
from inference.arithmetic import DTYPES
from inference.registry import open_session
from models import golden, package
from models.backtest import Backtest, backtest, judged
from models.cli import app
from tests.engine.conftest import Engine, Package, make_package, samples, start_engine, write_csv

FIT = Fit(
    samples=40,
    mean_range=((0.0, 100.0),) * 3,
    scale_range=((0.1, 9.0),) * 3,
    quantile=0.9,
    margin=1.0,
    threshold_range=(0.0, 1000.0),
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    started = start_engine(tmp_path / "e.sock")
    yield started
    started.end()


def whole(made: Package, directory: Path) -> Path:
    """Return a directory with the package as it is published: with golden vectors."""
    variant = made.variant
    session = open_session(made.model(), variant.format, "cpu")
    spec = session.inputs[0]
    shape = tuple(max(1, d) for d in spec.shape)
    vectors = golden.record(session, [{spec.name: np.full(shape, 3, DTYPES[spec.datatype])}])
    session.close()
    ref = package.reference_to("golden.npz", vectors)
    variant = msgspec.structs.replace(variant, golden=Golden(ref, 1, {}), accelerators=("cpu",))
    manifest = msgspec.structs.replace(made.manifest, variants=(variant,))
    package.write(directory, manifest, {variant.file.path: made.model(), "golden.npz": vectors})
    return directory


def on_a_device(engine: Engine, made: Package, path: Path, rate_hz: float, windows: int):
    """Return row -> score of what a real engine says is an alarm."""
    supervisor = engine.connect()
    spec = made.spec({"kind": "replay", "path": str(path), "loop": False, "speed": rate_hz / 100})
    supervisor.configure(spec)
    supervisor.until(lambda: sum(s.count for s in supervisor.summaries) >= windows, "all windows are there")
    return {int(a.source_ref or -1): a.score for a in supervisor.anomalies}


def found_alarms(found: Backtest) -> dict[int, float]:
    return {int(r): float(s) for r, s in zip(found.row[found.alarm], found.score[found.alarm], strict=True)}


@pytest.mark.parametrize(
    "settings",
    [
        {"score": Score(method="reconstruction_mse", threshold=-1.0)},
        {"score": Score(method="reconstruction_mse", threshold=0.3, debounce=2)},
        {"kind": "int8.onnx", "window": 4, "stride": 3, "score": Score("reconstruction_mse", 0.2)},
        {
            "window": 20,
            "features": (Statistics(("mean", "std")), Bands(((1.0, 20.0),))),
            "score": Score(method="reconstruction_mse", threshold=0.1),
        },
    ],
)
def test_a_backtest_gives_the_numbers_of_a_device(engine: Engine, tmp_path: Path, settings: dict[str, Any]):
    made = make_package(tmp_path / "objects", **settings)
    rows = samples(190)
    rows[50, 1] = np.nan
    path = write_csv(tmp_path / "r.csv", rows)
    found = backtest(whole(made, tmp_path / "p"), path)
    assert (found.rows, found.missing, found.calibrated_on) == (190, 1, 0)
    assert found.alarm.any()
    assert on_a_device(engine, made, path, 400.0, len(found.row)) == found_alarms(found)


def test_the_first_windows_are_what_a_device_is_fitted_on(tmp_path: Path):
    made = make_package(tmp_path / "objects", fit=FIT)
    path = write_csv(tmp_path / "r.csv", samples(3000))
    found = backtest(whole(made, tmp_path / "p"), path)
    assert found.calibrated_on == 40
    assert found.row[0] >= 40
    assert found.threshold != made.manifest.score.threshold
    short = write_csv(tmp_path / "s.csv", samples(30))
    with pytest.raises(PitheadError, match="not enough for the calibration"):
        backtest(tmp_path / "p", short)


def test_the_command_prints_what_a_labelled_recording_shows(tmp_path: Path):
    made = make_package(tmp_path / "objects", score=Score(method="reconstruction_mse", threshold=1.0))
    rows = samples(400)
    label = np.zeros((400, 1))
    label[::40] = 1
    path = write_csv(tmp_path / "r.csv", np.hstack([rows, label]), ("a", "b", "c", "wrong"))
    directory = whole(made, tmp_path / "p")
    arguments = ["backtest", str(directory), str(path), "--label", "wrong", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out.csv")])
    assert result.exit_code == 0, result.output
    facts = msgspec.json.decode(result.stdout)
    assert (facts["windows"], facts["labelled_windows"], facts["recall"]) == (400, 10, 1.0)
    assert facts["auc"] == pytest.approx(1.0)
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 401
    assert CliRunner().invoke(app, [*arguments[:2], str(tmp_path / "none.csv")]).exit_code == 1


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_figures_are_those_of_counting_pairs(windows: list[tuple[bool, int, bool]]):
    label, score, alarm = (np.array(column) for column in zip(*windows, strict=True))
    facts = judged(label, score.astype(float), alarm)
    pairs = [(a > b) + (a == b) / 2 for a in score[label] for b in score[~label]]
    assert facts.get("auc") == (pytest.approx(np.mean(pairs)) if pairs else None)
    assert facts.get("recall") == (pytest.approx(alarm[label].mean()) if label.any() else None)
    assert facts.get("precision") == (pytest.approx(label[alarm].mean()) if alarm.any() else None)
    assert facts.get("false_alarm_rate") == (pytest.approx(alarm[~label].mean()) if (~label).any() else None)
