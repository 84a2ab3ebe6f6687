"""Features of windows beside the formulas of numpy and scipy, written out once more."""

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import signal, stats

from contract.errors import PitheadError
from contract.features import Bands, Feature, LogMel, Statistics, problems
from contract.manifest import (
    Channel,
    FileRef,
    Golden,
    Manifest,
    Pipeline,
    Provenance,
    Score,
    TensorSpec,
    Variant,
)
from contract.package import parse_manifest
from inference.features import Features

ALL = ("mean", "std", "rms", "minimum", "maximum", "kurtosis", "crest_factor", "zero_crossings")
RATE = 1000.0


def pipeline(window: int, channels: int, *features: Feature, **changes: Any) -> Pipeline:
    return Pipeline(
        channels=tuple(Channel(f"c{i}") for i in range(channels)),
        window=window,
        stride=1,
        mean=(0.0,) * channels,
        scale=(1.0,) * channels,
        sample_rate_hz=RATE,
        features=features,
        **changes,
    )


def windows(seed: int, n: int, window: int, channels: int) -> Any:
    random = np.random.default_rng(seed)
    return random.normal(random.normal(), 2.0, size=(n, window, channels)).astype(np.float32)


sizes = st.tuples(st.integers(0, 99), st.integers(1, 5), st.integers(8, 70), st.integers(1, 4))


@given(sizes)
def test_statistics_are_the_textbook_ones(size: tuple[int, int, int, int]):
    x = windows(*size)
    wide = x.astype(np.float64)
    rms = np.sqrt(np.mean(wide**2, axis=1))
    wanted = np.stack(
        [
            wide.mean(axis=1),
            wide.std(axis=1),
            rms,
            wide.min(axis=1),
            wide.max(axis=1),
            stats.kurtosis(wide, axis=1),
            np.abs(wide).max(axis=1) / rms,
            np.abs(np.diff((wide >= 0).astype(int), axis=1)).sum(axis=1),
        ],
        axis=1,
    )
    got = Features(pipeline(size[2], size[3], Statistics(ALL))).of(x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@given(sizes, st.sampled_from(["hann", "rectangular"]))
def test_bands_hold_what_scipys_periodogram_holds(size: tuple[int, int, int, int], taper: Any):
    x = windows(*size)
    window = size[2]
    edges = ((0.0, 200.0), (200.0, 400.0), (150.0, 501.0))
    got = Features(pipeline(window, size[3], Bands(edges, taper))).of(x)
    name = "boxcar" if taper == "rectangular" else "hann"
    hz, density = signal.periodogram(x.astype(np.float64), RATE, name, detrend=False, axis=1)
    for row, (low, high) in enumerate(edges):
        hz = np.arange(len(hz)) * RATE / window  # scipy's own are rounded twice
        wanted = density[:, (hz >= low) & (hz < high)].sum(axis=1) * RATE / window
        np.testing.assert_allclose(got[:, row], wanted, rtol=1e-5, atol=1e-9)


def test_a_sine_is_where_its_frequency_is_with_its_own_power():
    x = (3 * np.sin(2 * np.pi * 100 * np.arange(500) / RATE))[None, :, None].astype(np.float32)
    got = Features(pipeline(500, 1, Bands(((80.0, 120.0), (200.0, 300.0)), decibel=True))).of(x)[0, :, 0]
    assert got == pytest.approx([10 * np.log10(4.5), -100.0], abs=1e-3)


@given(st.integers(0, 99), st.integers(1, 3))
def test_mel_bands_are_the_naive_ones(seed: int, channels: int):
    feature = LogMel(frame=64, hop=20, mels=6, low_hz=20.0, high_hz=480.0)
    x = windows(seed, 3, 130, channels)
    got = Features(pipeline(130, channels, feature)).of(x)
    assert got.shape == (3, 4 * 6, channels)
    corners = 700 * (
        10 ** (np.linspace(*(2595 * np.log10(1 + f / 700) for f in (20.0, 480.0)), 8) / 2595) - 1
    )
    for frame, start in enumerate((0, 20, 40, 60)):
        part = x[:, start : start + 64].astype(np.float64)
        hz, density = signal.periodogram(part, RATE, "hann", detrend=False, axis=1)
        power = density * RATE / 64
        for mel in range(6):
            triangle = np.interp(hz, corners[mel : mel + 3], [0, 1, 0])
            wanted = 10 * np.log10(np.maximum(np.einsum("b,wbc->wc", triangle, power), 1e-10))
            np.testing.assert_allclose(got[:, frame * 6 + mel], wanted, rtol=1e-4, atol=1e-4)


@given(sizes)
def test_many_windows_give_what_each_gives_alone(size: tuple[int, int, int, int]):
    x = windows(*size)
    features = Features(pipeline(size[2], size[3], Statistics(ALL), Bands(((0.0, 400.0),), decibel=True)))
    alone = [features.of(x[i : i + 1]) for i in range(len(x))]
    np.testing.assert_array_equal(features.of(x), np.concatenate(alone))


def test_silence_and_a_constant_have_no_shape():
    x = np.zeros((2, 50, 1), np.float32)
    x[1] = 0.1
    which = Statistics(("kurtosis", "crest_factor", "std", "zero_crossings"))
    got = Features(pipeline(50, 1, which)).of(x)[:, :, 0]
    assert got[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert got[1] == pytest.approx([0.0, 1.0, 0.0, 0.0], abs=1e-6)


def test_features_are_normalised_as_the_manifest_says():
    x = windows(1, 4, 30, 2)
    plain = pipeline(30, 2, Statistics(("mean", "rms")))
    scaled = pipeline(
        30, 2, *plain.features, feature_mean=(1.0, 2.0, 3.0, 4.0), feature_scale=(1.0, 2.0, 4.0, 8.0)
    )
    got = Features(scaled).of(x).reshape(4, -1)
    raw = Features(plain).of(x).reshape(4, -1)
    np.testing.assert_allclose(got, (raw - [1, 2, 3, 4]) / [1, 2, 4, 8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("feature", "rate", "field"),
    [
        (Statistics(("mean", "mean")), None, "which"),
        (Bands(((0.0, 10.0),)), None, "kind"),
        (Bands(((10.0, 10.0),)), RATE, "bands_hz[0]"),
        (Bands(((0.0, 50.0), (400.0, 900.0))), RATE, "bands_hz[1]"),
        (Bands(((11.0, 19.0),)), RATE, "bands_hz[0]"),
        (LogMel(frame=200, hop=1, mels=1, low_hz=0.0, high_hz=400.0), RATE, "frame"),
        (LogMel(frame=50, hop=1, mels=1, low_hz=0.0, high_hz=600.0), RATE, "high_hz"),
        (LogMel(frame=50, hop=1, mels=90, low_hz=0.0, high_hz=400.0), RATE, "mels"),
    ],
)
def test_what_cannot_be_computed_is_named(feature: Feature, rate: float | None, field: str):
    assert [p[0] for p in problems(feature, 100, rate)][:1] == [field]


def test_what_can_be_computed_has_no_problem():
    for feature in (
        Statistics(ALL),
        Bands(((0.0, 10.0), (10.0, 501.0))),
        LogMel(frame=50, hop=10, mels=4, low_hz=0.0, high_hz=500.0),
    ):
        assert list(problems(feature, 100, RATE)) == []
        assert np.isfinite(Features(pipeline(100, 1, feature)).of(windows(0, 2, 100, 1))).all()


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"sample_rate_hz": None}, "$.pipeline.features[1].kind"),
        ({"feature_mean": (0.0,)}, "$.pipeline.feature_mean"),
        ({"feature_scale": (1.0, 0.0, 1.0, 1.0)}, "$.pipeline.feature_scale[1]"),
        ({"features": ()}, "$.variants[0].inputs[0].shape"),
        ({"features": (Statistics(("mean",)),)}, "$.variants[0].inputs[0].shape"),
    ],
)
def test_a_manifest_whose_features_do_not_fit_is_refused(change: dict[str, Any], path: str):
    given = pipeline(50, 2, Statistics(("mean",)), Bands(((0.0, 100.0),)))
    tensors = (TensorSpec("x", "FP32", (-1, 4)),)
    ref = FileRef("model.onnx", "0" * 64, 1)
    variant = Variant(
        name="v",
        file=ref,
        format="onnx",
        quantisation="float32",
        inputs=tensors,
        outputs=tensors,
        golden=Golden(FileRef("golden.npz", "1" * 64, 1), 1, {}),
    )
    manifest = Manifest(
        format=1,
        name="demo",
        version="1.0.0",
        release_counter=1,
        summary="a test",
        licence="Apache-2.0",
        variants=(variant,),
        provenance=Provenance(source="test", data="made up"),
        pipeline=given,
        score=Score(method="reconstruction_mse", threshold=1.0),
    )
    assert parse_manifest(msgspec.json.encode(manifest)) == manifest
    wrong = msgspec.structs.replace(manifest, pipeline=msgspec.structs.replace(given, **change))
    with pytest.raises(PitheadError) as caught:
        parse_manifest(msgspec.json.encode(wrong))
    assert (caught.value.code, caught.value.facts["path"]) == ("package.manifest_invalid", path)
