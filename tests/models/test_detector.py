"""Detectors made from recordings: the same distances as their formulas, and packages that a lane runs."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from contract.errors import PitheadError
from contract.features import Bands, Statistics
from contract.manifest import Channel
from models import detector, linear, package
from models.backtest import backtest
from models.dense import Network
from models.detector import Autoencoder, Design, Mahalanobis, Method, Principal
from models.mahalanobis import Mahalanobis as Peer

DESIGN = Design(
    name="made-up",
    summary="two channels that move together",
    channels=(Channel("a", minimum=-50.0), Channel("b")),
    window=4,
    stride=2,
    method=Mahalanobis(),
    false_alarms=0.01,
)


def recording(rows: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    a = random.normal(10.0, 2.0, rows)
    return np.stack([a, -3 * a + random.normal(0.0, 0.5, rows)], axis=1)


def errors(network: Network, x: np.ndarray) -> np.ndarray:
    return ((x - network.activations(x)[-1]) ** 2).mean(axis=1)


def test_the_one_layer_gives_the_mahalanobis_distance():
    x = recording(500)
    want = Peer.fit(x).scores(x) / 2
    assert errors(linear.mahalanobis(x, 0.0), x) == pytest.approx(want, rel=1e-2, abs=1e-3)


def test_two_layers_leave_what_the_main_components_do_not_explain():
    x = recording(500) @ np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0]]) + np.random.default_rng(3).normal(
        0.0, 0.1, (500, 3)
    )
    centred = x - x.mean(axis=0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    rest = centred - centred @ axes[:2].T @ axes[:2]
    assert errors(linear.principal(x, 2), x) == pytest.approx((rest**2).mean(axis=1), rel=1e-2, abs=1e-4)


def test_shrinkage_makes_up_for_columns_that_do_not_move():
    x = np.column_stack([recording(100), np.ones(100)])
    with pytest.raises(PitheadError, match="shrinkage"):
        linear.mahalanobis(x, 0.0)
    assert np.isfinite(errors(linear.mahalanobis(x, 0.1), x)).all()
    with pytest.raises(PitheadError, match="components=3"):
        linear.principal(x, 3)


@pytest.mark.parametrize("method", [Mahalanobis(), Principal(4), Autoencoder((12, 3, 12), epochs=30)])
def test_a_lane_finds_what_does_not_move_together(method: Method, tmp_path: Path):
    detector.build(tmp_path / "p", replace(DESIGN, method=method), [recording(2000)])
    later = recording(400, seed=1)
    later[200:, 1] += 12.0
    path = tmp_path / "r.npz"
    np.savez(path, a=later[:, 0], b=later[:, 1], label=np.arange(400) >= 200)
    for variant in ("int8-tflite", "int8-onnx", "float32-tflite"):
        found = backtest(tmp_path / "p", path, label="label", variant=variant)
        assert found.label is not None
        assert found.alarm[found.label].mean() > 0.9
        assert found.alarm[~found.label].mean() < 0.1


def test_the_package_passes_admission_and_is_the_same_each_time(tmp_path: Path):
    design = replace(
        DESIGN, sample_rate_hz=100.0, window=20, features=(Statistics(("std",)), Bands(((10.0, 30.0),)))
    )
    for name in ("one", "two"):
        detector.build(tmp_path / name, design, [recording(2000)])
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
    result = package.validate(tmp_path / "one")
    assert result.valid, result.detail
    parameters = package.read_manifest(tmp_path / "one").provenance.parameters
    assert parameters == {"method": "mahalanobis", "shrinkage": 0.05}


def test_what_a_lane_takes_for_missing_makes_nothing_of_the_model(tmp_path: Path):
    clean, dirty = recording(2000), recording(2000)
    dirty[100:104, 0] = -1000.0
    dirty[200, 1] = np.nan
    whole = detector.build(tmp_path / "a", DESIGN, [clean])
    holed = detector.build(tmp_path / "b", DESIGN, [dirty])
    assert whole.pipeline is not None
    assert holed.pipeline is not None
    assert holed.pipeline.scale == pytest.approx(whole.pipeline.scale, rel=0.02)
    lost = whole.provenance.metrics["windows"] - holed.provenance.metrics["windows"]
    # Windows of 4 rows each 2 rows: those that touch rows 100 to 103, and those with row 200.
    assert lost == 3 + 2


def test_the_later_part_is_cut_where_a_lane_would_cut(tmp_path: Path):
    """Five cycles of four rows: 0.3 of them is one and a half, which no window may straddle."""
    design = replace(DESIGN, stride=4)
    recordings = [recording(20, seed=i) for i in range(20)]
    made = detector.build(tmp_path, design, recordings)
    assert made.provenance.metrics == {"windows": 80.0, "calibration_windows": 20.0}


def test_too_little_is_refused(tmp_path: Path):
    with pytest.raises(PitheadError, match="whole windows") as refused:
        detector.build(tmp_path, DESIGN, [recording(40)])
    assert refused.value.code == "config.invalid"
    with pytest.raises(PitheadError, match="no row has a value"):
        detector.build(tmp_path, DESIGN, [np.full((100, 2), np.nan)])
