"""The manifest of a model package: everything that a device must know to run a model well.

It is one JSON file, ``manifest.json``, beside the files that it names. It is
signed as a TUF target, so each number in it can be relied on; each is bounded
too, since a person may sign a mistake. ``contract.package`` checks what no
single field can show.
"""

import math
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from contract.features import MAX_FEATURES, Feature, height
from contract.messages import END, NO_NUL, Count, Fact, Label, Name, Real, Sha256, Text, Version

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_FORMAT: Final = 1
MAX_FILE_BYTES: Final = 512 * 1024 * 1024

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
    "BYTES",
]
"""Datatypes of the Open Inference Protocol."""

RelativePath = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*" + END,
    ),
]
MAX_CHANNELS: Final = 4096
MAX_VECTORS: Final = 10_000
MAX_TENSORS: Final = 64
Channels = Annotated[tuple["Channel", ...], Meta(min_length=1, max_length=MAX_CHANNELS)]
PerChannel = Annotated[tuple[Real, ...], Meta(max_length=MAX_CHANNELS)]
PerFeature = Annotated[tuple[Real, ...], Meta(max_length=65536)]
RangePerChannel = Annotated[tuple[tuple[Real, Real], ...], Meta(max_length=MAX_CHANNELS)]
Hertz = Annotated[float, Meta(ge=1e-6, le=1e6)]
Shape = Annotated[tuple[Annotated[int, Meta(ge=-1, le=2**31 - 1)], ...], Meta(max_length=16)]
TensorName = Annotated[str, Meta(max_length=1000, pattern=NO_NUL)]


class FileRef(Struct, frozen=True):
    """A file of the package."""

    path: RelativePath
    sha256: Sha256
    length: Annotated[int, Meta(ge=0, le=MAX_FILE_BYTES)]


class TensorSpec(Struct, frozen=True, omit_defaults=True):
    """A tensor: ``shape`` with -1 where it is dynamic; real value = (integer - zero_point) * scale."""

    name: TensorName
    datatype: Datatype
    shape: Shape
    scale: Annotated[float, Meta(gt=0, le=1e30)] | None = None
    zero_point: Annotated[int, Meta(ge=-(2**31), le=2**32 - 1)] | None = None


class Tolerance(Struct, frozen=True, omit_defaults=True):
    """``|got - want| <= atol + rtol * |want|`` in the tensor's own units (steps, where it is quantised)."""

    atol: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    rtol: Annotated[float, Meta(ge=0, le=1)] = 0.0


class Golden(Struct, frozen=True):
    """Inputs and outputs that a variant must reproduce before it is trusted.

    ``file`` is an ``.npz`` without pickles, arrays named ``in:<tensor>`` and
    ``out:<tensor>`` with a leading axis of vectors.
    """

    file: FileRef
    vectors: Annotated[int, Meta(ge=1, le=MAX_VECTORS)]
    tolerance: Annotated[dict[TensorName, Tolerance], Meta(max_length=MAX_TENSORS)]
    """By output tensor."""


class Variant(Struct, frozen=True, omit_defaults=True):
    """One build of the model for some kind of device."""

    name: Name
    file: FileRef
    format: Literal["onnx", "tflite"]
    quantisation: Literal["float32", "float16", "int8", "mixed"]
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=MAX_TENSORS)]
    golden: Golden
    platform: Label = ""
    """As in the Open Inference Protocol, for example ``onnxruntime_onnx`` or ``litert_tflite``."""
    accelerators: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=16)] = ("cpu",)
    arch: Annotated[tuple[Label, ...], Meta(min_length=1, max_length=16)] = ("any",)
    """``platform.machine()`` values, or ``any``."""
    accelerator_options: Annotated[
        dict[Name, Annotated[dict[Label, Label], Meta(max_length=16)]], Meta(max_length=16)
    ] = {}
    """By accelerator: options of its driver, of those that a manifest may set (docs/accelerators.md)."""
    preference: Annotated[int, Meta(ge=-1_000_000, le=1_000_000)] = 0
    """The highest is tried first, and wins unless another is measured to be cheaper by a margin."""


class Graph(Struct, frozen=True, omit_defaults=True, tag_field="kind", tag="graph"):
    """A feature that is an ONNX graph of the package: from windows to what the model gets.

    One input, float32 (n, window, channels), normalised; one output, float32
    (n, ...), whose values are the model's input. The first axis takes any
    number of windows, and no window may change what comes of another.
    """

    file: FileRef
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1)]
    golden: Golden
    """Windows, and what the graph makes of each."""
    per_channel: bool = False
    """The values are a table of rows x channels, row by row, so that a score has a share for each channel."""

    @property
    def values(self) -> int:
        """How many values come of one window."""
        return math.prod(self.outputs[0].shape[1:])


class Channel(Struct, frozen=True, omit_defaults=True):
    """One sensor channel, in the order of the model's input."""

    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)]
    unit: Label = ""
    minimum: Real | None = None
    """Below this a sample is counted as missing."""
    maximum: Real | None = None


class Fit(Struct, frozen=True, omit_defaults=True):
    """How far a device may adapt the model to itself: normalisation and threshold, never weights."""

    samples: Annotated[int, Meta(ge=8, le=1_000_000)]
    """Windows to collect before the model is in service."""
    mean_range: RangePerChannel
    """Per channel, where the fitted mean may lie; it is the median of the calibration's samples."""
    scale_range: RangePerChannel
    """Per channel, where the fitted deviation may lie; 1.4826 times the median absolute deviation."""
    quantile: Annotated[float, Meta(gt=0, le=1)]
    """The fitted threshold is ``margin`` times this quantile of the calibration scores.

    The share above it may be out of the ordinary without moving the threshold.
    """
    margin: Annotated[float, Meta(gt=0, le=1e6)]
    threshold_range: tuple[Real, Real]


class Pipeline(Struct, frozen=True, omit_defaults=True):
    """From samples to the input tensor: the last ``window`` samples, each ``stride`` samples.

    x' = (x - mean) / scale per channel, clipped to +-``clip``; the window is
    flattened sample by sample into the input tensor's shape. With
    ``features``, these of the normalised window take the place of its
    samples: f' = (f - feature_mean) / feature_scale.
    """

    channels: Channels
    window: Annotated[int, Meta(ge=1, le=65536)]
    stride: Annotated[int, Meta(ge=1, le=65536)]
    mean: PerChannel
    scale: PerChannel
    clip: Annotated[float, Meta(gt=0, le=1e30)] | None = None
    sample_rate_hz: Hertz | None = None
    fit: Fit | None = None
    features: Annotated[tuple[Feature | Graph, ...], Meta(max_length=MAX_FEATURES)] = ()
    feature_mean: PerFeature = ()
    """Of each value of the input tensor; empty for 0."""
    feature_scale: PerFeature = ()
    """Of each value of the input tensor; empty for 1."""

    @property
    def values(self) -> int:
        """How many values of one window the model gets."""
        if (graph := self.graph) is not None:
            return graph.values
        rows = sum(height(f, self.window) for f in self.plain_features) if self.features else self.window
        return rows * len(self.channels)

    @property
    def graph(self) -> Graph | None:
        """The feature that is a graph; it stands alone."""
        return next((f for f in self.features if isinstance(f, Graph)), None)

    @property
    def plain_features(self) -> tuple[Feature, ...]:
        """The features that are none."""
        return tuple(f for f in self.features if not isinstance(f, Graph))


class Score(Struct, frozen=True, omit_defaults=True):
    """From the output tensor to one number per window, and the alarm on it.

    ``reconstruction_mse``: mean over the input (samples or features) of (input - output)^2.
    ``output``: the single value of the first output tensor.
    """

    method: Literal["reconstruction_mse", "output"]
    threshold: Real
    """An alarm is a score above this."""
    debounce: Annotated[int, Meta(ge=1, le=100_000)] = 1
    """Windows above the threshold in a row before it is an alarm."""


QUANTILE_PROBABILITIES: Final = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)


class Quantiles(Struct, frozen=True):
    """A distribution as values at probabilities 0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1."""

    values: Annotated[
        tuple[Real, ...], Meta(min_length=len(QUANTILE_PROBABILITIES), max_length=len(QUANTILE_PROBABILITIES))
    ]


class Reference(Struct, frozen=True):
    """What the model saw when it was made, for drift."""

    samples: Count
    channels: Annotated[dict[Label, Quantiles], Meta(max_length=MAX_CHANNELS)]
    score: Quantiles
    alarm_rate: Annotated[float, Meta(ge=0, le=1)]


class Provenance(Struct, frozen=True, omit_defaults=True):
    """Where the model comes from."""

    source: Text
    """Code or origin of the weights."""
    data: Text
    data_licence: Label = ""
    metrics: Annotated[dict[Label, Real], Meta(max_length=200)] = {}
    parameters: Annotated[dict[Label, Fact], Meta(max_length=200)] = {}


class Budget(Struct, frozen=True, omit_defaults=True):
    """What the model may cost on a device."""

    latency_ms: Annotated[float, Meta(gt=0, le=1e7)] | None = None
    """p99 of one window in the probe must be at or under this."""
    memory_mb: Annotated[float, Meta(gt=0, le=1e7)] | None = None


class Manifest(Struct, frozen=True, omit_defaults=True):
    """The whole package."""

    format: Literal[1]
    name: Name
    version: Version
    release_counter: Annotated[int, Meta(ge=1, le=2**62)]
    """Rises with every release of the model; devices compare it with the signed floor."""
    summary: Text
    licence: Label
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1, max_length=64)]
    provenance: Provenance
    pipeline: Pipeline | None = None
    """None for a model that is only served, without a lane."""
    score: Score | None = None
    reference: Reference | None = None
    budget: Budget = Budget()

    def files(self) -> tuple[FileRef, ...]:
        """Every file of the package but the manifest itself, each once, in order."""
        refs = {ref.path: ref for v in self.variants for ref in self.files_of(v)}
        return tuple(refs.values())

    def files_of(self, variant: Variant) -> tuple[FileRef, ...]:
        """The files that a device needs for a variant: model and golden vectors, and those of a graph."""
        graph = None if self.pipeline is None else self.pipeline.graph
        more = () if graph is None else (graph.file, graph.golden.file)
        return (variant.file, variant.golden.file, *more)


def target_path(name: str, version: str, path: str) -> str:
    """TUF target path of a file of a package."""
    return f"models/{name}/{version}/{path}"


def floor_path(name: str) -> str:
    """TUF target path whose ``custom.min_release_counter`` is the model's floor."""
    return f"models/{name}/floor"
