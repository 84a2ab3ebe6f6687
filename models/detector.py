"""From recordings of normal operation to the package of an anomaly detector.

The earlier part of each recording gives normalisation and weights, the later
part the threshold and the reference for drift: a threshold from rows that the
model has seen would be too low. It is set on the int8 model, which is what
devices run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct
from msgspec.structs import asdict, replace
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.features import Feature
from contract.manifest import Budget, Channel, Manifest, Pipeline, Provenance, Score
from inference.arithmetic import Floats, normalise
from inference.features import Features
from models import dense, linear, package, reference
from models.assemble import GOLDEN_VECTORS, Assembled, assemble, score_rows

Rows = NDArray[np.float64]
"""(rows, channels) in the manifest's units, in the order of time; NaN where a value is missing."""

ENOUGH: Final = 2 * GOLDEN_VECTORS
"""Windows that each part must have."""
_CONSTANT: Final = 1e-9


class Mahalanobis(Struct, frozen=True, tag="mahalanobis"):
    """See ``models.linear.mahalanobis``."""

    shrinkage: float = 0.05


class Principal(Struct, frozen=True, tag="principal"):
    """See ``models.linear.principal``."""

    components: int


class Autoencoder(Struct, frozen=True, tag="autoencoder"):
    """See ``models.dense.train_autoencoder``; ``batch`` is less where there are few windows."""

    hidden: tuple[int, ...]
    epochs: int = 60
    batch: int = 64
    learning_rate: float = 5e-3
    seed: int = 0


Method = Mahalanobis | Principal | Autoencoder


class Design(Struct, frozen=True):
    """What the detector looks at, and how."""

    name: str
    summary: str
    channels: tuple[Channel, ...]
    window: int
    stride: int
    method: Method
    features: tuple[Feature, ...] = ()
    sample_rate_hz: float | None = None
    clip: float | None = None
    """In deviations of a channel's samples."""
    false_alarms: float = 0.001
    """Share of the later windows that may lie above the threshold."""
    later: float = 0.3
    """Share of each recording, its end, that gives the threshold."""
    reach: float = 2.0
    """The int8 model's ranges cover what is this many times as far from the middle as what is normal."""
    version: str = "1.0.0"
    release_counter: int = 1
    licence: str = "Apache-2.0"
    data: str = "recordings of normal operation"
    data_licence: str = ""


def build(directory: Path, design: Design, recordings: Sequence[Rows]) -> Manifest:
    """Write the package into ``directory``; the same arguments write the same bytes.

    Windows with a value that is missing, or out of its channel's range, are
    left out, and none reaches from one recording into another. Raises ``config.invalid`` where there are too
    few windows, and as the method does.
    """
    # On the grid of windows, so that the later part is cut as a lane cuts the whole.
    cuts = [round((1 - design.later) * len(rows) / design.stride) * design.stride for rows in recordings]
    usable = [_within(rows, design.channels) for rows in recordings]
    earlier = [rows[:cut] for rows, cut in zip(usable, cuts, strict=True)]
    later = [rows[cut:] for rows, cut in zip(usable, cuts, strict=True)]
    pipeline = _pipeline(design, earlier)
    training, calibration = (_inputs(pipeline, part) for part in (earlier, later))
    for part, found in (("earlier", training), ("later", calibration)):
        if len(found) < ENOUGH:
            raise PitheadError(
                "config.invalid", f"the {part} part has {len(found)} whole windows; {ENOUGH} are needed"
            )
    wide = training.astype(np.float64)
    assembled = _assembled(design, wide)
    unset = Score(method="reconstruction_mse", threshold=0.0)
    scores = score_rows(assembled.session("int8-tflite"), unset, calibration)
    threshold = reference.rounded(float(np.quantile(scores, 1 - design.false_alarms)))
    samples = np.concatenate(later)
    manifest = Manifest(
        format=1,
        name=design.name,
        version=design.version,
        release_counter=design.release_counter,
        summary=design.summary,
        licence=design.licence,
        variants=assembled.variants,
        pipeline=pipeline,
        score=replace(unset, threshold=threshold),
        reference=reference.describe(
            samples[np.isfinite(samples).all(axis=1)],
            pipeline.channels,
            scores,
            float((scores > threshold).mean()),
        ),
        budget=Budget(latency_ms=50.0, memory_mb=64.0),
        provenance=Provenance(
            source="models/detector.py",
            data=design.data,
            data_licence=design.data_licence,
            parameters={
                "method": type(design.method).__name__.lower(),
                **{key: _fact(value) for key, value in asdict(design.method).items()},
            },
            metrics={"windows": float(len(training)), "calibration_windows": float(len(calibration))},
        ),
    )
    package.write(directory, manifest, assembled.contents)
    return manifest


def windows(rows: Rows, window: int, stride: int) -> Rows:
    """Return (windows, window, channels), as a lane cuts them, less those in which a value is missing."""
    if len(rows) < window:
        return np.empty((0, window, rows.shape[1]))
    cut = sliding_window_view(rows, window, axis=0)[::stride].transpose(0, 2, 1)
    return np.ascontiguousarray(cut[np.isfinite(cut).all(axis=(1, 2))])


def _within(rows: Rows, channels: Sequence[Channel]) -> Rows:
    """Return ``rows`` with NaN for what a lane takes for missing."""
    low = [-np.inf if c.minimum is None else c.minimum for c in channels]
    high = [np.inf if c.maximum is None else c.maximum for c in channels]
    found: Rows = np.where((rows >= low) & (rows <= high), rows, np.nan)
    return found


def _pipeline(design: Design, recordings: Sequence[Rows]) -> Pipeline:
    """Return the pipeline with the normalisation of these recordings."""
    samples = np.concatenate(recordings)
    samples = samples[np.isfinite(samples).all(axis=1)]
    if not len(samples):
        raise PitheadError("config.invalid", "no row has a value on each channel")
    pipeline = Pipeline(
        channels=design.channels,
        window=design.window,
        stride=design.stride,
        mean=_numbers(samples.mean(axis=0)),
        scale=_deviations(samples.std(axis=0)),
        clip=design.clip,
        sample_rate_hz=design.sample_rate_hz,
        features=design.features,
    )
    if not design.features:
        return pipeline
    table = _inputs(pipeline, recordings).astype(np.float64)
    if not len(table):
        return pipeline
    return replace(
        pipeline,
        feature_mean=_numbers(table.mean(axis=0)),
        feature_scale=_deviations(table.std(axis=0)),
    )


def _inputs(pipeline: Pipeline, recordings: Sequence[Rows]) -> Floats:
    """Return what the model gets of each window, one row for each."""
    cut = np.concatenate([windows(rows, pipeline.window, pipeline.stride) for rows in recordings])
    x = normalise(cut, pipeline.mean, pipeline.scale, pipeline.clip)
    if pipeline.features:
        x = Features(pipeline).of(x)
    return x.reshape(len(x), pipeline.values)


def _assembled(design: Design, training: Rows) -> Assembled:
    match design.method:
        case Mahalanobis(shrinkage=shrinkage):
            network = linear.mahalanobis(training, shrinkage)
        case Principal(components=components):
            network = linear.principal(training, components)
        case Autoencoder() as chosen:
            network = dense.train_autoencoder(
                training,
                dense.Training(
                    hidden=chosen.hidden,
                    epochs=chosen.epochs,
                    batch=min(chosen.batch, len(training)),
                    learning_rate=chosen.learning_rate,
                    seed=chosen.seed,
                ),
            )
    middle = training.mean(axis=0)
    outside = middle + design.reach * (training - middle)
    integers = dense.quantise_network(network, np.concatenate([training, outside, 2 * middle - outside]))
    half = GOLDEN_VECTORS // 2
    golden = np.concatenate([training[:half], outside[-half:], training[half:], outside[:-half]])
    return assemble(network, integers, golden.astype(np.float32), f"pithead {design.name}")


def _numbers(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(reference.rounded(float(v)) for v in values)


def _deviations(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Return them; 1 for what does not move."""
    return _numbers(np.where(values > _CONSTANT, values, 1.0))


def _fact(value: object) -> str | int | float:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    assert isinstance(value, (int, float))
    return value
