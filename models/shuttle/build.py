"""Make `shuttle`: normalise, train, quantise, set the threshold on the int8 model, judge, package."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from contract.manifest import Budget, Channel, Manifest, Pipeline, Provenance, Score
from inference.arithmetic import Floats, normalise
from models import dense, package, reference
from models.assemble import GOLDEN_VECTORS, SPREAD_ROWS, Assembled, assemble, score_rows
from models.mahalanobis import Mahalanobis, recall_at
from models.recipes import Recipe, Value, with_settings
from models.shuttle import dataset

NAME: Final = "shuttle"
CLIP: Final = 4.0
FALSE_ALARMS: Final = 0.001
SAMPLE_RATE_HZ: Final = 50.0
_WIDTH_QUANTILES: Final = (0.05, 0.95)
_REGIME_CHANNEL: Final = 0
_REGIME_LIMIT: Final = 43.0
"""Median of f1 over normal rows."""

_DEFAULTS: Final[dict[str, Value]] = {
    "hidden": "16,3,16",
    "epochs": 48,
    "learning_rate": 0.005,
    "seed": 1,
    "train_on": "all",
}
RECIPES: Final[Mapping[str, Recipe]] = {
    "baseline": Recipe("1.0.0", 1, "A small network: good, and the first that was in service.", _DEFAULTS),
    "wider": Recipe(
        "2.0.0",
        2,
        "More hidden units find more anomalies, at fewer false alarms, than a small network after 12 epochs.",
        _DEFAULTS | {"hidden": "64,32,5,32,64", "epochs": 40, "seed": 2},
    ),
    "one-regime": Recipe(
        "3.0.0",
        3,
        "Trained and calibrated on rows of one operating regime only, as happens when a line is recorded "
        "during one shift: sound by its own golden vectors, and alarmed by the other regime in service.",
        _DEFAULTS | {"hidden": "48,24,4,24,48", "epochs": 30, "train_on": "high"},
    ),
    "longer": Recipe(
        "4.0.0",
        4,
        "Trained on all regimes again, and longer.",
        _DEFAULTS | {"hidden": "48,24,5,24,48", "epochs": 60, "seed": 0},
    ),
}
"""By name; the first one is what `models build` makes."""


def regime(x: dataset.Rows, train_on: str) -> NDArray[np.bool_]:
    """Return which rows belong to ``all``, or to the ``low`` or ``high`` half of channel f1."""
    high = x[:, _REGIME_CHANNEL] > _REGIME_LIMIT
    return {"all": np.ones(len(x), np.bool_), "high": high, "low": ~high}[train_on]


def build(
    directory: Path,
    *,
    version: str | None = None,
    release_counter: int | None = None,
    recipe: str = "baseline",
    settings: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the package into ``directory``; the same arguments write the same bytes.

    Raises ``config.invalid`` for a setting that the recipe does not have.
    """
    chosen = RECIPES[recipe]
    values = with_settings(chosen.settings, settings or {}, {"train_on": ("all", "low", "high")})
    x, anomalous = dataset.load()
    parts = dataset.divide(len(x))
    wanted = regime(x, str(values["train_on"]))
    training = parts.training[~anomalous[parts.training] & wanted[parts.training]]
    pipeline = _pipeline(x[training])
    rows = normalise(x, pipeline.mean, pipeline.scale, pipeline.clip)

    network = dense.train_autoencoder(
        rows[training].astype(np.float64),
        dense.Training(
            hidden=tuple(int(n) for n in str(values["hidden"]).split(",")),
            epochs=int(values["epochs"]),
            learning_rate=float(values["learning_rate"]),
            seed=int(values["seed"]),
        ),
    )
    # Ranges of the int8 model must hold the anomalies too, and whatever the clip lets through.
    corners = np.array([[CLIP], [-CLIP]]) * np.ones(rows.shape[1])
    seen = np.vstack([rows[parts.training].astype(np.float64), corners])
    integers = dense.quantise_network(network, seen)
    golden = _golden_rows(rows, anomalous, parts.training)
    assembled = assemble(network, integers, golden, f"pithead {NAME}")

    unscored = Score(method="reconstruction_mse", threshold=0.0)
    int8 = score_rows(assembled.session("int8-tflite"), unscored, rows)
    normal = parts.calibration[~anomalous[parts.calibration] & wanted[parts.calibration]]
    threshold = reference.rounded(float(np.quantile(int8[normal], 1 - FALSE_ALARMS)))
    score = Score(method="reconstruction_mse", threshold=threshold)
    calibration = parts.calibration[wanted[parts.calibration]]
    manifest = Manifest(
        format=1,
        name=NAME,
        version=version or chosen.version,
        release_counter=release_counter or chosen.release_counter,
        summary=f"Dense autoencoder on nine Shuttle sensors. {chosen.why}",
        licence="Apache-2.0",
        variants=assembled.variants,
        pipeline=pipeline,
        score=score,
        reference=reference.describe(
            x[calibration],
            pipeline.channels,
            int8[calibration],
            float((int8[calibration] > threshold).mean()),
        ),
        budget=Budget(latency_ms=50.0, memory_mb=64.0),
        provenance=Provenance(
            source="models/shuttle/build.py",
            data=dataset.DATA,
            data_licence=dataset.DATA_LICENCE,
            parameters={"recipe": recipe, **values},
            metrics=_judge(assembled, rows, anomalous, parts, int8, score),
        ),
    )
    package.write(directory, manifest, assembled.contents)
    return manifest


def _pipeline(normal: dataset.Rows) -> Pipeline:
    """Centre by the median; scale so that nine normal rows of ten lie within +-2."""
    low, high = np.quantile(normal, _WIDTH_QUANTILES, axis=0)
    scale = np.maximum((high - low) / 4, 1.0)
    return Pipeline(
        channels=tuple(Channel(name) for name in dataset.FEATURES),
        window=1,
        stride=1,
        mean=tuple(float(v) for v in np.median(normal, axis=0)),
        scale=tuple(float(v) for v in scale),
        clip=CLIP,
        sample_rate_hz=SAMPLE_RATE_HZ,
    )


def _golden_rows(rows: Floats, anomalous: dataset.Labels, training: dataset.Indices) -> Floats:
    """Return rows of which the first few, the golden vectors, are half normal and half anomalous."""
    half = GOLDEN_VECTORS // 2
    picked = np.concatenate(
        [
            training[~anomalous[training]][:half],
            training[anomalous[training]][:half],
            training[half : half + SPREAD_ROWS],
        ]
    )
    chosen: Floats = rows[picked]
    return chosen


def _judge(
    assembled: Assembled,
    rows: Floats,
    anomalous: dataset.Labels,
    parts: dataset.Division,
    int8: NDArray[np.float64],
    score: Score,
) -> dict[str, float]:
    """Return what the held-out rows say, beside a Mahalanobis detector on the same normalised rows."""
    held = parts.held_out
    labels = anomalous[held]
    floats = score_rows(assembled.session("float32-tflite"), score, rows[held])
    onnx = score_rows(assembled.session("int8-onnx"), score, rows[held])
    alarms = int8[held] > score.threshold
    training = parts.training[~anomalous[parts.training]]
    peer = Mahalanobis.fit(rows[training].astype(np.float64)).scores(rows[held].astype(np.float64))
    metrics = {
        "held_out_rows": float(len(held)),
        "held_out_anomalies": float(labels.sum()),
        "recall_at_0.1pct_false_alarms": recall_at(int8[held], labels, FALSE_ALARMS),
        "mahalanobis_recall_at_0.1pct_false_alarms": recall_at(peer, labels, FALSE_ALARMS),
        "recall": float(alarms[labels].mean()),
        "false_alarm_rate": float(alarms[~labels].mean()),
        "precision": float(labels[alarms].mean()),
        "float_int8_disagreement": float(((floats > score.threshold) != alarms).mean()),
        "onnx_int8_disagreement": float(((onnx > score.threshold) != alarms).mean()),
    }
    return {name: reference.rounded(value) for name, value in metrics.items()}
