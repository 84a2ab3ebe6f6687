"""Ceiling fan: a coin on a blade, heard by an accelerometer; 3 axes at 200 Hz, clips of a second.

The raw means of the axes tell how the sensor was mounted and not how the fan
runs, so nothing here can see them: a window's ``std`` leaves its mean out, and
a Hann taper leaves none of it above the second bin.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.accuracy.common import (
    Published,
    Result,
    Rows,
    alarm_figures,
    auc,
    runs,
    sensors,
    write_recording,
)
from contract.features import Bands, Feature, Statistics
from contract.manifest import Channel
from models import detector

NAME: Final = "fan"
AXES: Final = ("x", "y", "z")
RATE_HZ: Final = 200.0
CLIP_ROWS: Final = 200
PER_G: Final = 2048
TARGETS: Final = {"high": 0.95}
MEASURED: Final = {"low": 1.000, "med": 1.000, "high": 0.907}
SPLIT: Final = "made from the first half of the normal clips; judged on the second half, and all with a coin"
SOURCE: Final = "3 MAD features + Mahalanobis, half of the normal clips (the data's index.json)"
_BANDS: Final = Bands(tuple((2.0 + 3.0 * i, 5.0 + 3.0 * i) for i in range(32)), decibel=True)
"""From the first bin that a Hann taper keeps free of the mean."""
MODELS: Final[Mapping[str, tuple[Feature, ...]]] = {
    "Mahalanobis on std": (Statistics(("std",)),),
    "Mahalanobis on std and bands of 3 Hz in dB": (Statistics(("std",)), _BANDS),
}
"""By name; the width of the bands was chosen by looking at the figures, nothing was in the first."""


def design(speed: str, features: tuple[Feature, ...]) -> detector.Design:
    """Return the detector of one speed."""
    return detector.Design(
        name=f"fan-{speed}",
        summary=f"Mahalanobis distance of a ceiling fan's vibration at speed {speed}.",
        channels=tuple(Channel(axis, "g") for axis in AXES),
        window=CLIP_ROWS,
        stride=CLIP_ROWS,
        method=detector.Mahalanobis(),
        features=features,
        sample_rate_hz=RATE_HZ,
        false_alarms=0.01,
        data="ceiling-fan-vibration, github:ShawnHymel/tinyml-example-anomaly-detection",
        data_licence="Beerware",
    )


def clips(speed: str, *, coin: bool) -> Rows:
    """Return (clips, 200, 3) in g, in the order in which they were recorded."""
    file = sensors("ceiling-fan-vibration") / f"fan_0_{speed}_{int(coin)}_weight.npz"
    with np.load(file, allow_pickle=False) as arrays:
        return np.asarray(arrays["x"], np.float64) / PER_G


def results(
    scratch: Path,
    speeds: tuple[str, ...] = ("low", "med", "high"),
    models: Mapping[str, tuple[Feature, ...]] = MODELS,
) -> Iterator[Result]:
    """Yield the lines; nothing of the later half of the normal clips or of the coin makes a model."""
    for speed in speeds:
        normal, coin = clips(speed, coin=False), clips(speed, coin=True)
        half = len(normal) // 2
        judged = np.concatenate([normal[half:], coin]).reshape(-1, len(AXES))
        label = np.arange(len(judged)) >= (len(normal) - half) * CLIP_ROWS
        recording = write_recording(scratch / f"fan-{speed}.npz", AXES, judged, label)
        for model, features in models.items():
            directory = scratch / f"fan-{speed}-{len(features)}"
            detector.build(directory, design(speed, features), [normal[:half].reshape(-1, len(AXES))])
            line = partial(Result, data=f"fan, speed {speed}", model=model, split=SPLIT)
            for variant, found in runs(directory, recording):
                yield line(
                    variant=variant,
                    metric="AUC",
                    ours=auc(found),
                    published=Published(MEASURED[speed], SOURCE),
                    target=TARGETS.get(speed),
                )
                for metric, value in alarm_figures(found).items():
                    yield line(variant=variant, metric=metric, ours=value)
