"""What must hold between the parts of a manifest.

Pure, and the same for who makes a package, who admits it and the device that
runs it: what is refused here never gets as far as a device, and a device
relies on nothing else.
"""

import math
from typing import Final, NoReturn

from contract.codec import decode
from contract.errors import PitheadError
from contract.features import problems
from contract.manifest import (
    MANIFEST_NAME,
    FileRef,
    Fit,
    Graph,
    Manifest,
    Pipeline,
    Score,
    TensorSpec,
    Variant,
)

MAX_MANIFEST: Final = 1024 * 1024
MAX_WINDOW_VALUES: Final = 2**22
"""Window x channels."""
MAX_FIT_VALUES: Final = 2**22
"""Samples x window x channels that a calibration holds in memory, eight bytes each."""
SMALLEST_SCALE: Final = 1e-30


def parse_manifest(content: bytes) -> Manifest:
    """Return a manifest that is consistent in itself; raises ``package.manifest_invalid`` with the path."""
    try:
        manifest = decode(content, Manifest)
    except PitheadError as error:
        raise PitheadError("package.manifest_invalid", error.detail) from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise ``package.manifest_invalid``, naming the field, where the manifest contradicts itself."""
    names: set[str] = set()
    for i, variant in enumerate(manifest.variants):
        path = f"$.variants[{i}]"
        if variant.name in names:
            _refuse(f"{path}.name", f"{variant.name!r} stands twice")
        names.add(variant.name)
        _check_variant(path, variant)
    _check_paths(manifest)
    if manifest.pipeline is not None and manifest.score is not None:
        _check_pipeline(manifest, manifest.pipeline, manifest.score)
    elif manifest.pipeline is not None or manifest.score is not None:
        _refuse("$.score", "pipeline and score belong together")


def _check_paths(manifest: Manifest) -> None:
    seen: dict[str, FileRef] = {}
    named: list[tuple[str, Variant | Graph]] = [
        (f"$.variants[{i}]", variant) for i, variant in enumerate(manifest.variants)
    ]
    if manifest.pipeline is not None and manifest.pipeline.graph is not None:
        named.append(("$.pipeline.features[0]", manifest.pipeline.graph))
    for place, owner in named:
        for field, ref in (("file", owner.file), ("golden.file", owner.golden.file)):
            path = f"{place}.{field}"
            if ref.path == MANIFEST_NAME:
                _refuse(f"{path}.path", "the manifest cannot name itself")
            if seen.setdefault(ref.path, ref) != ref:
                _refuse(path, f"{ref.path!r} stands twice with different contents")
    for ref_path in seen:
        parts = ref_path.split("/")
        for n in range(1, len(parts)):
            folder = "/".join(parts[:n])
            if folder in seen or folder == MANIFEST_NAME:
                _refuse("$.variants", f"{folder!r} is a file and, in {ref_path!r}, a directory")


def _check_variant(path: str, variant: Variant) -> None:
    for which, tensors in (("inputs", variant.inputs), ("outputs", variant.outputs)):
        if len({t.name for t in tensors}) != len(tensors):
            _refuse(f"{path}.{which}", "a name stands twice")
        for i, tensor in enumerate(tensors):
            if tensor.scale is not None and not (math.isfinite(tensor.scale) and tensor.scale > 0):
                _refuse(f"{path}.{which}[{i}].scale", "must be above 0")
    unknown = sorted(set(variant.golden.tolerance) - {t.name for t in variant.outputs})
    if unknown:
        _refuse(f"{path}.golden.tolerance", f"{unknown[0]!r} is no output of the model")
    for i, accelerator in enumerate(variant.accelerators):
        if accelerator in variant.accelerators[:i]:
            _refuse(f"{path}.accelerators[{i}]", f"{accelerator!r} stands twice")


def _check_pipeline(manifest: Manifest, pipeline: Pipeline, score: Score) -> None:
    width = len(pipeline.channels)
    names = [c.name for c in pipeline.channels]
    if len(set(names)) != width:
        _refuse("$.pipeline.channels", "a name stands twice")
    for i, channel in enumerate(pipeline.channels):
        low, high = channel.minimum, channel.maximum
        if low is not None and high is not None and low > high:
            _refuse(f"$.pipeline.channels[{i}].minimum", f"{low} is above the maximum, {high}")
    values = pipeline.window * width
    if values > MAX_WINDOW_VALUES:
        _refuse("$.pipeline.window", f"window x channels are {values}, the most is {MAX_WINDOW_VALUES}")
    _check_normalisation(pipeline, width)
    _check_features(pipeline)
    for i, variant in enumerate(manifest.variants):
        _check_lane(f"$.variants[{i}]", variant, pipeline, score)
    if pipeline.fit is not None:
        _check_fit(pipeline.fit, width, values)
    if manifest.reference is not None:
        unknown = sorted(set(manifest.reference.channels) - set(names))
        if unknown:
            _refuse("$.reference.channels", f"{unknown[0]!r} is no channel of the pipeline")


def _check_features(pipeline: Pipeline) -> None:
    if pipeline.graph is not None:
        _check_graph(pipeline, pipeline.graph)
    for i, feature in enumerate(pipeline.plain_features):
        for field, why in problems(feature, pipeline.window, pipeline.sample_rate_hz):
            _refuse(f"$.pipeline.features[{i}].{field}", why)
    if pipeline.features and pipeline.values > MAX_WINDOW_VALUES:
        _refuse("$.pipeline.features", f"they are {pipeline.values} values, the most is {MAX_WINDOW_VALUES}")
    for name, values in (("feature_mean", pipeline.feature_mean), ("feature_scale", pipeline.feature_scale)):
        if values and (not pipeline.features or len(values) != pipeline.values):
            _refuse(f"$.pipeline.{name}", f"{len(values)} values for {pipeline.values} of the model's input")
    for i, value in enumerate(pipeline.feature_scale):
        if value < SMALLEST_SCALE:
            _refuse(f"$.pipeline.feature_scale[{i}]", f"{value} is not allowed")


def _check_graph(pipeline: Pipeline, graph: Graph) -> None:
    """Check what can be known of a graph without running it; the probe runs it."""
    path = "$.pipeline.features[0]"
    if len(pipeline.features) > 1:
        _refuse("$.pipeline.features", "a graph stands alone: it gives all that the model gets")
    for which, tensor in (("inputs", graph.inputs[0]), ("outputs", graph.outputs[0])):
        if tensor.datatype != "FP32":
            _refuse(f"{path}.{which}[0].datatype", f"{tensor.datatype}: a graph has FP32 only")
        if tensor.shape[:1] != (-1,):
            _refuse(f"{path}.{which}[0].shape", "the first axis takes any number of windows, which is -1")
        if -1 in tensor.shape[1:] or math.prod(tensor.shape[1:]) < 1:
            _refuse(f"{path}.{which}[0].shape", "all axes but the first have a length")
    wanted = (pipeline.window, len(pipeline.channels))
    if graph.inputs[0].shape[1:] != wanted:
        shape = list(graph.inputs[0].shape)
        _refuse(f"{path}.inputs[0].shape", f"{shape}, window and channels are {list(wanted)}")
    if graph.per_channel and graph.values % len(pipeline.channels):
        said = f"{graph.values} values are no table of {len(pipeline.channels)} channels"
        _refuse(f"{path}.per_channel", said)
    unknown = sorted(set(graph.golden.tolerance) - {graph.outputs[0].name})
    if unknown:
        _refuse(f"{path}.golden.tolerance", f"{unknown[0]!r} is no output of the graph")


def _check_lane(path: str, variant: Variant, pipeline: Pipeline, score: Score) -> None:
    """Check what can be known of a variant in a lane without running it; the probe runs it."""
    if len(variant.inputs) != 1:
        _refuse(f"{path}.inputs", "a model with a pipeline has one input")
    for which, tensor in (("inputs", variant.inputs[0]), ("outputs", variant.outputs[0])):
        if tensor.datatype == "BYTES":
            _refuse(f"{path}.{which}[0].datatype", "a lane has numbers only")
    shape, values = variant.inputs[0].shape, pipeline.values
    what = "features x channels" if pipeline.features else "window x channels"
    what = "the graph's values" if pipeline.graph is not None else what
    size = _row(variant.inputs[0])
    if size != values:
        said = "an open length" if size is None else f"{size} values"
        _refuse(f"{path}.inputs[0].shape", f"{list(shape)} holds {said}, {what} are {values}")
    size = _row(variant.outputs[0])
    wanted = values if score.method == "reconstruction_mse" else 1
    if size not in (None, wanted):
        _refuse(
            f"{path}.outputs[0].shape",
            f"{list(variant.outputs[0].shape)} holds {size} values, {score.method} needs {wanted}",
        )


def _row(tensor: TensorSpec) -> int | None:
    """Return the values of one window, or None where a length but the first is open."""
    rest = tensor.shape[1:] if tensor.shape[:1] == (-1,) else tensor.shape
    return None if -1 in rest else math.prod(rest)


def _check_normalisation(pipeline: Pipeline, width: int) -> None:
    for field, values in (("mean", pipeline.mean), ("scale", pipeline.scale)):
        if len(values) != width:
            _refuse(f"$.pipeline.{field}", f"{len(values)} values for {width} channels")
        for i, value in enumerate(values):
            if not math.isfinite(value) or (field == "scale" and value < SMALLEST_SCALE):
                _refuse(f"$.pipeline.{field}[{i}]", f"{value} is not allowed")


def _check_fit(fit: Fit, width: int, values: int) -> None:
    if fit.samples * values > MAX_FIT_VALUES:
        _refuse("$.pipeline.fit.samples", f"{fit.samples} windows hold more than {MAX_FIT_VALUES} values")
    for field, ranges in (("mean_range", fit.mean_range), ("scale_range", fit.scale_range)):
        if len(ranges) != width:
            _refuse(f"$.pipeline.fit.{field}", f"{len(ranges)} ranges for {width} channels")
        for i, (low, high) in enumerate(ranges):
            if not low <= high or (field == "scale_range" and low < SMALLEST_SCALE):
                _refuse(f"$.pipeline.fit.{field}[{i}]", f"{low} to {high} is no range")
    low, high = fit.threshold_range
    if not low <= high:
        _refuse("$.pipeline.fit.threshold_range", f"{low} to {high} is no range")


def _refuse(path: str, why: str) -> NoReturn:
    raise PitheadError("package.manifest_invalid", f"{why} - at `{path}`", path=path)
