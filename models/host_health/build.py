"""Make `host-health`: learn how healthy machines move about their normal; each device supplies its normal.

No recording of any machine goes into it. The network sees simulated windows
in units of a device's own deviation and is taught to return them, but to
return windows far outside as if they were ordinary: so they stand out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from contract.manifest import Budget, Fit, Manifest, Pipeline, Provenance, Reference, Score
from models import dense, package, reference
from models.assemble import GOLDEN_VECTORS, Assembled, assemble, score_rows
from models.host_health import CHANNELS, SAMPLE_RATE_HZ
from models.host_health.simulated import disturbed, healthy, windows
from models.mahalanobis import Mahalanobis, recall_at
from models.recipes import Recipe, Value, with_settings

NAME: Final = "host-health"
WINDOW: Final = 4
STRIDE: Final = 2
CLIP: Final = 8.0
ORDINARY: Final = 3.0
"""Deviations; what lies further out is returned as if it lay here."""
CALIBRATION_WINDOWS: Final = 60
"""A minute, so that a busy moment in it is a small part."""
CALIBRATION_QUANTILE: Final = 0.75
"""A quarter of the minute may be busy: the pressure averages of the kernel take ten seconds to forget."""
CALIBRATION_MARGIN: Final = 4.0
FALSE_ALARMS: Final = 0.001
_TRAINING, _HELD_OUT = 24_000, 40_000

_DEFAULTS: Final[dict[str, Value]] = {
    "hidden": "16,4,16",
    "epochs": 20,
    "learning_rate": 0.005,
    "seed": 7,
}
RECIPES: Final[Mapping[str, Recipe]] = {
    "baseline": Recipe("1.0.0", 1, "Two seconds of nine vital signs.", _DEFAULTS),
}

_NORMAL: Final[Mapping[str, tuple[float, float, float, float, float]]] = {
    # channel: a usual mean and deviation; the smallest and largest deviation; the largest mean
    "cpu_percent": (20.0, 10.0, 6.0, 30.0, 100.0),
    "memory_percent": (40.0, 5.0, 2.0, 20.0, 100.0),
    "disk_read_log": (2.0, 1.5, 1.5, 3.0, 10.0),
    "disk_write_log": (4.0, 1.5, 1.5, 3.0, 10.0),
    "net_log": (3.0, 1.5, 1.0, 3.0, 10.0),
    "pressure_cpu": (2.0, 3.0, 3.0, 20.0, 100.0),
    "pressure_io": (2.0, 3.0, 3.0, 20.0, 100.0),
    "pressure_memory": (0.0, 2.0, 2.0, 20.0, 100.0),
    "load_per_core": (0.3, 0.3, 0.25, 4.0, 1000.0),
}


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
    values = with_settings(chosen.settings, settings or {})
    random = np.random.default_rng(int(values["seed"]))
    normal = windows(healthy(_TRAINING, random), WINDOW, STRIDE)
    outside = disturbed(normal, random, ORDINARY, 2 * CLIP)
    x = np.clip(np.concatenate([normal, outside]).reshape(2 * len(normal), -1), -CLIP, CLIP)
    network = dense.train_autoencoder(
        x,
        dense.Training(
            hidden=tuple(int(n) for n in str(values["hidden"]).split(",")),
            epochs=int(values["epochs"]),
            learning_rate=float(values["learning_rate"]),
            seed=int(values["seed"]),
        ),
        target=np.clip(x, -ORDINARY, ORDINARY),
    )
    integers = dense.quantise_network(network, x)
    order = np.concatenate([np.arange(0, len(x), len(x) // GOLDEN_VECTORS), np.arange(1, len(x), 97)])
    assembled = assemble(network, integers, x[order].astype(np.float32), f"pithead {NAME}")
    pipeline = _pipeline()
    score, metrics, described = _judge(assembled, pipeline, random)
    manifest = Manifest(
        format=1,
        name=NAME,
        version=version or chosen.version,
        release_counter=release_counter or chosen.release_counter,
        summary="Autoencoder on the device's own vital signs, fitted to the device by a short calibration.",
        licence="Apache-2.0",
        variants=assembled.variants,
        pipeline=pipeline,
        score=score,
        reference=described,
        budget=Budget(latency_ms=50.0, memory_mb=64.0),
        provenance=Provenance(
            source="models/host_health/build.py",
            data="simulated by models/host_health/simulated.py; each device is its own normal",
            data_licence="Apache-2.0",
            parameters={"recipe": recipe, **values},
            metrics=metrics,
        ),
    )
    package.write(directory, manifest, assembled.contents)
    return manifest


def _pipeline() -> Pipeline:
    usual = [_NORMAL[c.name] for c in CHANNELS]
    return Pipeline(
        channels=CHANNELS,
        window=WINDOW,
        stride=STRIDE,
        mean=tuple(mean for mean, *_ in usual),
        scale=tuple(scale for _, scale, *_ in usual),
        clip=CLIP,
        sample_rate_hz=SAMPLE_RATE_HZ,
        fit=Fit(
            samples=CALIBRATION_WINDOWS,
            mean_range=tuple((0.0, highest) for *_, highest in usual),
            scale_range=tuple((low, high) for _, _, low, high, _ in usual),
            quantile=CALIBRATION_QUANTILE,
            margin=CALIBRATION_MARGIN,
            threshold_range=(0.6, 12.0),
        ),
    )


def _judge(
    assembled: Assembled, pipeline: Pipeline, random: np.random.Generator
) -> tuple[Score, dict[str, float], Reference]:
    """Return the score with its threshold on the int8 model, the metrics on unseen windows, the reference."""
    samples = healthy(_HELD_OUT, random)
    normal = windows(samples, WINDOW, STRIDE)
    half = len(normal) // 2
    moved = disturbed(normal[half:], random, 4.0, 8.0)
    rows = np.clip(np.concatenate([normal, moved]).reshape(len(normal) + len(moved), -1), -CLIP, CLIP)
    x = rows.astype(np.float32)
    unset = Score(method="reconstruction_mse", threshold=0.0)
    int8 = score_rows(assembled.session("int8-tflite"), unset, x)
    floats = score_rows(assembled.session("float32-tflite"), unset, x)
    score = Score(
        method="reconstruction_mse",
        threshold=reference.rounded(float(np.quantile(int8[:half], 1 - FALSE_ALARMS))),
    )
    labels: NDArray[np.bool_] = np.arange(half, len(x)) >= len(normal)
    alarms = int8[half:] > score.threshold
    peer = Mahalanobis.fit(rows[:half]).scores(rows[half:])
    metrics = {
        "held_out_windows": float(len(labels)),
        "recall_at_0.1pct_false_alarms": recall_at(int8[half:], labels, FALSE_ALARMS),
        "mahalanobis_recall_at_0.1pct_false_alarms": recall_at(peer, labels, FALSE_ALARMS),
        "recall": float(alarms[labels].mean()),
        "false_alarm_rate": float(alarms[~labels].mean()),
        "float_int8_disagreement": float(((floats[half:] > score.threshold) != alarms).mean()),
    }
    raw = samples * np.array(pipeline.scale) + np.array(pipeline.mean)
    described = reference.describe(raw, CHANNELS, int8[:half], float((int8[:half] > score.threshold).mean()))
    return score, {k: reference.rounded(v) for k, v in metrics.items()}, described
