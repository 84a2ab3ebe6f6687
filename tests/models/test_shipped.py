"""The models that ship with the project keep what they promise."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from contract.errors import PitheadError
from contract.manifest import Manifest
from inference.arithmetic import normalise
from inference.registry import open_session
from models import package, shipped
from models.assemble import score_rows
from models.backtest import judged
from models.shuttle import dataset
from simulator.demo import story

Built = Callable[[str, str], tuple[Path, Manifest]]
GOOD = [("shuttle", "baseline"), ("shuttle", "wider"), ("shuttle", "longer"), ("host-health", "baseline")]


def scores(directory: Path, manifest: Manifest, variant: str, rows: np.ndarray) -> np.ndarray:
    chosen = next(v for v in manifest.variants if v.name == variant)
    session = open_session(directory / chosen.file.path, chosen.format, chosen.accelerators[0])
    p = manifest.pipeline
    return score_rows(session, manifest.score, normalise(rows, p.mean, p.scale, p.clip))


@pytest.mark.parametrize(("name", "recipe"), GOOD)
def test_a_good_recipe_beats_mahalanobis_and_survives_quantisation(built: Built, name: str, recipe: str):
    metrics = built(name, recipe)[1].provenance.metrics
    assert metrics["recall_at_0.1pct_false_alarms"] >= metrics["mahalanobis_recall_at_0.1pct_false_alarms"], (
        metrics
    )
    assert metrics["float_int8_disagreement"] <= 0.001
    assert metrics["false_alarm_rate"] <= 0.003


@pytest.mark.parametrize("recipe", ["baseline", "wider", "longer"])
def test_the_metrics_are_true_on_the_held_out_rows(built: Built, recipe: str):
    """Computed again from the files alone, as a device would."""
    directory, manifest = built("shuttle", recipe)
    x, anomalous, _ = dataset.held_out()
    threshold = manifest.score.threshold
    alarms = {v.name: scores(directory, manifest, v.name, x) > threshold for v in manifest.variants}
    metrics = manifest.provenance.metrics
    assert alarms["int8-tflite"][anomalous].mean() == pytest.approx(metrics["recall"], rel=1e-4)
    assert alarms["int8-tflite"][~anomalous].mean() == pytest.approx(metrics["false_alarm_rate"], rel=1e-4)
    assert (alarms["int8-tflite"] != alarms["float32-tflite"]).mean() <= 0.001
    assert (alarms["int8-tflite"] != alarms["int8-onnx"]).mean() <= 0.001


def test_what_is_built_by_default_reaches_the_stated_accuracy(built: Built):
    """Its training was chosen on the calibration rows; these ones it never saw."""
    directory, manifest = built("shuttle", next(iter(shipped.recipes_of("shuttle"))))
    x, anomalous, _ = dataset.held_out()
    for variant in manifest.variants:
        found = scores(directory, manifest, variant.name, x)
        assert judged(anomalous, found, found > manifest.score.threshold)["auc"] >= 0.998


def test_the_second_version_is_better_than_the_demos_first(built: Built, tmp_path: Path):
    order = shipped.order("shuttle", recipe=story.RECIPES["1.0.0"], settings=story.SETTINGS["1.0.0"])
    first = package.read_manifest(shipped.build_apart(order, tmp_path)).provenance.metrics
    second = built("shuttle", story.RECIPES["2.0.0"])[1].provenance.metrics
    assert second["recall"] > first["recall"]
    assert second["false_alarm_rate"] <= first["false_alarm_rate"]


def test_one_regime_passes_every_check_and_alarms_on_normal_rows(built: Built):
    directory, manifest = built("shuttle", "one-regime")
    assert package.validate(directory).valid
    x, anomalous, _ = dataset.held_out()
    alarms = scores(directory, manifest, "int8-tflite", x) > manifest.score.threshold
    assert alarms[~anomalous].mean() > 0.1
    # On the regime that it knows it is sound.
    known = ~anomalous & (x[:, 0] > 43)
    assert alarms[known].mean() < 0.01


def test_each_recipe_has_a_version_of_its_own():
    for name in shipped.SHIPPED:
        recipes = shipped.recipes_of(name).values()
        counters = [r.release_counter for r in recipes]
        assert counters == sorted(set(counters))
        assert len({r.version for r in recipes}) == len(counters)


@pytest.mark.parametrize(("name", "recipe"), [("shuttle", "baseline"), ("host-health", "baseline")])
def test_a_build_is_reproducible_to_the_byte(built: Built, tmp_path: Path, name: str, recipe: str):
    """Another process, another directory, and two threads of arithmetic instead of one."""
    directory, _ = built(name, recipe)
    module = shipped.SHIPPED[name]
    again = str(tmp_path / "again")
    program = f"import pathlib, {module} as m; m.build(pathlib.Path({again!r}), recipe={recipe!r})"
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "99"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, capture_output=True)
    files = {p.name: p.read_bytes() for p in directory.iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == files


@pytest.mark.parametrize(("name", "recipe"), [("shuttle", "wider"), ("host-health", "baseline")])
def test_a_package_validates(built: Built, name: str, recipe: str):
    result = package.validate(built(name, recipe)[0])
    assert result.valid, result.detail
    assert {(p.variant, p.accelerator) for p in result.probes} == {
        ("int8-tflite", "xnnpack"),
        ("int8-tflite", "cpu"),
        ("int8-onnx", "cpu"),
        ("float32-tflite", "xnnpack"),
        ("float32-tflite", "cpu"),
    }


def test_settings_change_the_model_and_are_checked(tmp_path: Path):
    changes = {"hidden": "8,2,8", "epochs": "1", "seed": "4"}
    wanted = shipped.order("shuttle", version="1.1.0", release_counter=9, settings=changes)
    manifest = package.read_manifest(shipped.build_apart(wanted, tmp_path))
    assert (manifest.version, manifest.release_counter) == ("1.1.0", 9)
    assert manifest.provenance.parameters["hidden"] == "8,2,8"
    for settings in ({"hiden": "8"}, {"epochs": "many"}, {"train_on": "some"}):
        with pytest.raises(PitheadError, match=r"config\.invalid"):
            shipped.build_apart(shipped.order("shuttle", settings=settings), tmp_path)
    for name, recipe in (("shutle", None), ("shuttle", "best")):
        with pytest.raises(PitheadError, match=r"config\.invalid"):
            shipped.order(name, recipe=recipe)


def test_a_second_build_replaces_the_first(built: Built, tmp_path: Path):
    directory = tmp_path / "copy"
    shutil.copytree(built("shuttle", "baseline")[0], directory)
    (directory / "stale.tflite").write_bytes(b"old")
    (directory / "notes.txt").write_text("mine")
    manifest = package.read_manifest(directory)
    contents = {ref.path: (directory / ref.path).read_bytes() for ref in manifest.files()}
    package.write(directory, manifest, contents)
    assert not (directory / "stale.tflite").exists()
    assert (directory / "notes.txt").exists()


# --- the data


def test_the_division_is_disjoint_and_complete():
    x, anomalous = dataset.load()
    assert x.shape == (49097, 9)
    assert anomalous.sum() == 3511
    parts = dataset.divide(len(x))
    together = np.concatenate([parts.training, parts.calibration, parts.held_out])
    np.testing.assert_array_equal(np.sort(together), np.arange(len(x)))


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.parquet"])
def test_a_replay_holds_held_out_rows_and_labels(tmp_path: Path, name: str):
    file = tmp_path / "new" / name
    assert dataset.write_replay(file, 500) == 500
    if name.endswith(".parquet"):
        table = pyarrow.parquet.read_table(file).to_pydict()
    else:
        opener = __import__("gzip").open if name.endswith(".gz") else open
        with opener(file, "rt") as text:
            rows = list(csv.DictReader(text))
        table = {key: [int(row[key]) for row in rows] for key in rows[0]}
    assert list(table) == [*dataset.FEATURES, "label", "row"]
    x, anomalous, numbers = dataset.held_out()
    np.testing.assert_array_equal(np.array([table[f] for f in dataset.FEATURES]).T, x[:500])
    np.testing.assert_array_equal(np.array(table["label"]) > 0, anomalous[:500])
    np.testing.assert_array_equal(table["row"], numbers[:500])
