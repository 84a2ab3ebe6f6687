import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.calibration import Calibration, check_fit
from agent.engine.loading import load
from agent.engine.score import Debounce
from agent.engine.summary import TokenBucket, add_all, bucket_start
from agent.engine.window import Windower
from agent.ports import FitResult
from contract.errors import PitheadError
from contract.manifest import Fit, Score
from contract.sketch import SketchBuilder
from tests.engine.conftest import CHANNELS, make_package, nan_network, samples


@given(above=st.lists(st.booleans(), max_size=40), cuts=st.lists(st.integers(0, 9)), needed=st.integers(1, 4))
def test_debounce_is_the_naive_one_however_the_windows_come(above: list[bool], cuts: list[int], needed: int):
    debounce, seen, start = Debounce(needed), [], 0
    for size in [*cuts, len(above)]:
        part = above[start : start + size]
        ordinals = np.arange(start, start + len(part))
        seen += debounce.alarms(np.array(part, np.bool_), ordinals).tolist()
        start += len(part)
    expected = [i + 1 >= needed and all(above[i + 1 - needed : i + 1]) for i in range(len(above))]
    assert seen == expected


def test_a_window_that_was_left_out_breaks_the_row():
    debounce = Debounce(2)
    assert debounce.alarms(np.array([True, True]), np.array([5, 7])).tolist() == [False, False]


@given(st.lists(st.floats(-1e6, 1e6) | st.just(0.0), min_size=24, max_size=80))
def test_a_sketch_of_many_is_the_sketch_of_each(values: list[float]):
    each, many = SketchBuilder(), SketchBuilder()
    for value in values:
        each.add(value)
    add_all(many, np.array(values))
    a, b = each.build(), many.build()
    assert (a.bins, a.negative, a.zeros, a.count) == (b.bins, b.negative, b.zeros, b.count)
    assert (a.minimum, a.maximum) == (b.minimum, b.maximum)
    assert b.total == pytest.approx(a.total, abs=1e-3)


def test_tokens_bound_the_rate():
    tokens = TokenBucket(2.0, 5, 0)
    assert sum(tokens.take(0) for _ in range(100)) == 5
    assert sum(tokens.take(1_000_000) for _ in range(100)) == 2
    assert sum(tokens.take(60_000_000) for _ in range(100)) == 5


def test_buckets_are_multiples_of_their_width():
    assert bucket_start(1_999_999, 0.5) == 1_500_000
    assert bucket_start(120_000_001, 60.0) == 120_000_000


FIT = Fit(
    samples=100,
    mean_range=((0.0, 15.0), (0.0, 100.0), (0.0, 100.0)),
    scale_range=((0.1, 9.0), (0.1, 9.0), (5.0, 9.0)),
    quantile=0.99,
    margin=1.5,
    threshold_range=(0.01, 1000.0),
)


@pytest.mark.parametrize("window", [1, 4])
def test_a_fit_is_middle_spread_and_quantile_within_the_signed_ranges(tmp_path: Path, window: int):
    package = make_package(tmp_path, fit=FIT, window=window)
    served = load(package.spec({"kind": "replay"}))
    assert served.calibration is not None
    rows = samples(300)
    windower = Windower(window, 1, len(CHANNELS))
    seen = []
    for start in range(0, 300, 7):
        part = rows[start : start + 7]
        windows = windower.push(part, np.ones(len(part), np.bool_))
        served.calibration.add(windows)
        seen.append(windows.cut(windows.rows.astype(np.float32), window))
    assert served.calibration.complete
    fit = served.calibration.result(served.scorer, 5)

    raw = np.stack([rows[i : i + window] for i in range(100)])
    mean = np.median(raw, axis=(0, 1))
    scale = 1.4826 * np.median(np.abs(raw - mean), axis=(0, 1))
    assert fit.mean == pytest.approx((15.0, mean[1], mean[2])), "the first is clamped"
    assert fit.scale == pytest.approx((scale[0], scale[1], 5.0)), "the last is clamped"
    x = np.clip((raw - fit.mean) / fit.scale, -6, 6).astype(np.float32)
    scores = served.scorer.run_cut(x).scores
    assert fit.threshold == pytest.approx(1.5 * np.quantile(scores, 0.99))
    assert (fit.samples, fit.t) == (100, 5)
    check_fit(fit, FIT, 3)
    served.session.close()


def test_a_fit_out_of_its_ranges_is_refused(tmp_path: Path):
    good = FitResult((1.0, 1.0, 1.0), (1.0, 1.0, 6.0), 1.0, 100, 0)
    package = make_package(tmp_path, fit=FIT)
    load(package.spec({}, fit=good)).session.close()
    for wrong in ({"mean": (16.0, 1.0, 1.0)}, {"scale": (1.0, 1.0, 1.0)}, {"threshold": 1e9}, {"mean": ()}):
        changed = FitResult(**{f: wrong.get(f, getattr(good, f)) for f in good.__struct_fields__})
        with pytest.raises(PitheadError, match=r"config\.invalid"):
            load(package.spec({}, fit=changed))
    with pytest.raises(PitheadError, match="allows none"):
        load(make_package(tmp_path).spec({}, fit=good))


def test_a_calibration_without_scores_is_an_error(tmp_path: Path):
    package = make_package(tmp_path, kind="float32.onnx", fit=FIT)
    served = load(package.spec({}))
    broken = make_package(tmp_path / "b", kind="float32.onnx", net=nan_network(3), fit=FIT)
    served.scorer.session = load(broken.spec({})).session
    calibration = Calibration(FIT, 1)
    calibration.add(Windower(1, 1, 3).push(samples(100), np.ones(100, np.bool_)))
    with pytest.raises(PitheadError, match="not_finite"):
        calibration.result(served.scorer, 0)


def test_a_score_without_parts_has_no_contributions(tmp_path: Path):
    package = make_package(tmp_path, kind="float32.onnx")
    served = load(package.spec({}))
    x = np.random.default_rng(0).normal(size=(2, 1, 3)).astype(np.float32)
    scored = served.scorer.run_cut(x)
    assert sum(served.scorer.shares(scored, 0).values()) == pytest.approx(1.0)
    served.scorer.score = Score(method="output", threshold=1.0)
    assert served.scorer.shares(scored, 0) == {}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"digest": "0" * 64}, "package.file_mismatch"),
        ({"manifest": "gone"}, "package.file_missing"),
        ({"files": {}}, "package.file_missing"),
        ({"files": {"model.tflite": __file__}}, "package.file_mismatch"),
        ({"variant": "other"}, "package.manifest_invalid"),
        ({"accelerator": "edgetpu"}, "inference.accelerator_missing"),
    ],
)
def test_what_does_not_fit_its_manifest_is_not_loaded(tmp_path: Path, change: dict[str, Any], code: str):
    package = make_package(tmp_path)
    with pytest.raises(PitheadError) as caught:
        load(package.spec({}, **change))
    assert caught.value.code == code


def test_a_package_that_contradicts_itself_is_refused_on_the_device_too(tmp_path: Path):
    """Whoever signed it: the device checks what its makers checked."""
    package = make_package(tmp_path / "p")
    document = msgspec.json.decode(package.manifest_path.read_bytes())
    document["score"]["method"] = "output"
    text = msgspec.json.encode(document)
    package.manifest_path.write_bytes(text)
    spec = package.spec({"kind": "system"}, digest=hashlib.sha256(text).hexdigest())
    with pytest.raises(PitheadError, match=r"package\.manifest_invalid.*needs 1") as caught:
        load(spec)
    assert "$.variants[0].outputs[0].shape" in caught.value.detail
