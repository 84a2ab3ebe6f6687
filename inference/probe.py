"""``python -m inference.probe``: open one model, check it, measure it, and end.

One JSON request on standard input, one JSON report on standard output. All
that is ever imported is imported first, then the process confines itself,
and only then looks at the model and its golden vectors.
"""

import encodings.cp437
import math
import os
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from contract.errors import PitheadError
from contract.manifest import MAX_VECTORS, Golden, Graph, TensorSpec, Tolerance, Variant
from inference import registry
from inference.features import check_batches
from inference.made_up import made_up
from inference.measuring import Energy, Memory, measure
from inference.reports import ProbeReport, ProbeRequest
from inference.sandbox import confine
from inference.scoring import Scorer
from inference.screening import SCREENS
from inference.session import Opener, Session, as_bytes

PRELOADED: Final = (encodings.cp437,)
"""What the standard library would import later, when no file can be opened any more."""
TOGETHER: Final = Tolerance(atol=1e-4, rtol=1e-3)
"""By how much the kernels of a graph may differ for one window and for many."""
MADE_UP: Final = 4
"""Inputs that a bare file is run on."""
_SCALE_RTOL: Final = 1e-6
_MB: Final = 1024 * 1024


def main() -> None:
    """Answer one request."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ProbeRequest)
    # Runtimes write on standard output as they please; the answer goes where they cannot.
    answer = os.dup(1)
    os.dup2(2, 1)

    def failed(code: str, detail: str) -> ProbeReport:
        return ProbeReport(request.name, request.accelerator.name, code, detail[:1500])

    try:
        report = examine(request)
    except PitheadError as error:
        report = failed(error.code, error.detail)
    except MemoryError:
        report = failed("probe.over_budget", f"more than {request.limits.memory_mb} MB of address space")
    os.write(answer, msgspec.json.encode(report))
    # A model that was opened here is not worth a clean farewell.
    os._exit(0)


def examine(request: ProbeRequest) -> ProbeReport:
    """Return the report of one candidate; raises ``PitheadError`` for what is wrong."""
    accelerator, variant = request.accelerator, request.variant
    if request.resources.cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(
            0, os.sched_getaffinity(0) & set(request.resources.cpus) or os.sched_getaffinity(0)
        )
    opener = registry.load_runtime(request.format, warm_up=True, accelerator=accelerator)
    model = registry.read_file(Path(request.model), None if variant is None else variant.file)
    golden = b"" if variant is None else registry.read_file(Path(request.golden), variant.golden.file)
    unopened = _read_graph(request)
    memory, energy = Memory(), Energy()
    sandbox = confine(
        memory_bytes=request.limits.memory_mb * _MB,
        cpu_s=request.limits.cpu_s,
        parent=request.parent,
        require=request.require_sandbox,
        devices=accelerator.needs,
        folders=[str(Path(sys.modules[name].__file__ or "").parent) for name in accelerator.reads],
    )
    SCREENS[request.format](model)
    graph = None if unopened is None else unopened.opened(request)
    start = time.perf_counter()
    session = opener(model, accelerator, request.resources.threads, request.resources)
    load_ms = (time.perf_counter() - start) * 1000
    placement = session.placement
    if session.accelerator != accelerator.name:
        raise PitheadError(
            "inference.accelerator_missing",
            f"{accelerator.name!r} took none of the {placement.total} nodes; all are left to the CPU",
        )
    if variant is None:
        feed, vectors, worst = _against_cpu(opener, model, session)
    else:
        feed, vectors, worst = _against_golden(session, request, variant, golden, graph)
    timing = measure(session, feed, request.limits, energy)
    peak = memory.read("VmHWM")
    return ProbeReport(
        variant=request.name,
        accelerator=accelerator.name,
        accelerator_used=session.accelerator,
        runtime=session.runtime,
        placement=placement,
        vectors=vectors,
        worst=worst,
        load_ms=load_ms,
        latency_p50_us=timing.p50_us,
        latency_p99_us=timing.p99_us,
        runs=timing.runs,
        energy_uj=timing.energy_uj,
        memory_mb=max(0.0, peak - memory.before),
        peak_rss_mb=peak,
        cpu_s=time.process_time(),
        sandbox=sandbox,
    )


def _against_golden(
    session: Session, request: ProbeRequest, variant: Variant, golden: bytes, graph: Session | None
) -> tuple[dict[str, Any], int, dict[str, float]]:
    """Return an input to measure with, how many vectors agreed, and how far they were at most."""
    check_tensors("inputs", variant.inputs, session.inputs)
    check_tensors("outputs", variant.outputs, session.outputs)
    if request.pipeline is not None and request.score is not None:
        Scorer(session, request.pipeline, request.score, variant.inputs, variant.outputs, graph).warm_up()
    feeds, wanted = golden_vectors(golden, variant)
    session.reset()
    return feeds[0], len(feeds), _compare(session, feeds, wanted, variant.golden)


@dataclass(frozen=True, slots=True)
class Unopened:
    """The graph of the features, read, and the runtime that will open it."""

    said: Graph
    opener: Opener
    content: bytes
    golden: bytes

    def opened(self, request: ProbeRequest) -> Session:
        """Return its session, after its golden vectors agreed: one by one, and all at once.

        Raises what a model's would.
        """
        SCREENS["onnx"](self.content)
        session = self.opener(self.content, "cpu", request.resources.threads, request.resources)
        try:
            check_tensors("pipeline.features[0].inputs", self.said.inputs, session.inputs)
            check_tensors("pipeline.features[0].outputs", self.said.outputs, session.outputs)
            check_batches(session)
            feeds, wanted = golden_vectors(self.golden, self.said)
            _compare(session, feeds, wanted, self.said.golden)
            _compare_at_once(session, feeds, wanted, self.said)
        except PitheadError as error:
            raise PitheadError(error.code, f"the graph of the features: {error.detail}") from error
        return session


def _read_graph(request: ProbeRequest) -> Unopened | None:
    said = None if request.pipeline is None else request.pipeline.graph
    if said is None:
        return None
    opener = registry.load_runtime("onnx", warm_up=True)
    content = registry.read_file(Path(request.graph), said.file)
    return Unopened(said, opener, content, registry.read_file(Path(request.graph_golden), said.golden.file))


def _compare_at_once(session: Session, feeds: list[Any], wanted: list[Any], said: Graph) -> None:
    """Raise ``probe.golden_mismatch`` where windows that are run together come out as others than alone."""
    name, output = said.inputs[0].name, said.outputs[0].name
    got = session.run({name: np.concatenate([feed[name] for feed in feeds])})[output]
    promised = said.golden.tolerance.get(output, Tolerance())
    allowed = Tolerance(max(promised.atol, TOGETHER.atol), max(promised.rtol, TOGETHER.rtol))
    try:
        difference(output, got, np.concatenate([want[output] for want in wanted]), allowed)
    except PitheadError as error:
        raise PitheadError(error.code, f"all vectors at once: {error.detail}") from error


def _against_cpu(
    opener: Opener, model: bytes, session: Session
) -> tuple[dict[str, Any], int, dict[str, float]]:
    """As ``_against_golden``, against the runtime's own kernels; nobody has promised a tolerance."""
    other = opener(model, "cpu")
    feeds = [made_up(session.inputs, 1, random=True, seed=seed) for seed in range(MADE_UP)]
    anything = Tolerance(atol=math.inf)
    worst: dict[str, float] = {}
    for feed in feeds:
        got = session.run(feed)
        for name, want in other.run(feed).items():
            worst[name] = max(worst.get(name, 0.0), difference(name, got[name], want, anything))
    return feeds[0], len(feeds), worst


def check_tensors(which: str, wanted: tuple[TensorSpec, ...], seen: tuple[TensorSpec, ...]) -> None:
    """Raise ``package.manifest_invalid``, with the field's path, where manifest and model differ."""

    def refuse(path: str, says: object, has: object) -> None:
        raise PitheadError(
            "package.manifest_invalid", f"{path}: the manifest says {says}, the model has {has}", path=path
        )

    if len(wanted) != len(seen):
        refuse(which, f"{len(wanted)} tensors", f"{len(seen)}: {[t.name for t in seen]}")
    by_name = {tensor.name: tensor for tensor in seen}
    for i, tensor in enumerate(wanted):
        real = by_name.get(tensor.name)
        if real is None:
            refuse(f"{which}[{i}].name", repr(tensor.name), sorted(by_name))
            continue
        if tensor.datatype != real.datatype:
            refuse(f"{which}[{i}].datatype", tensor.datatype, real.datatype)
        if len(tensor.shape) != len(real.shape) or any(
            a != b and -1 not in (a, b) for a, b in zip(tensor.shape, real.shape, strict=True)
        ):
            refuse(f"{which}[{i}].shape", list(tensor.shape), list(real.shape))
        # ONNX files carry no scale for an integer input; then the manifest's word stands.
        if real.scale is None:
            continue
        if tensor.scale is None or abs(tensor.scale - real.scale) > _SCALE_RTOL * real.scale:
            refuse(f"{which}[{i}].scale", tensor.scale, real.scale)
        if (tensor.zero_point or 0) != real.zero_point:
            refuse(f"{which}[{i}].zero_point", tensor.zero_point, real.zero_point)


def golden_vectors(
    content: bytes, variant: Variant | Graph
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the inputs and the wanted outputs of each golden vector.

    Raises ``package.manifest_invalid`` when the file does not hold what the manifest says.
    """
    count = variant.golden.vectors
    arrays: dict[str, Any] = {}
    try:
        with np.load(BytesIO(content), allow_pickle=False) as file:
            for key in [f"in:{t.name}" for t in variant.inputs] + [f"out:{t.name}" for t in variant.outputs]:
                arrays[key] = file[key]
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PitheadError(
            "package.manifest_invalid", f"golden.file: {variant.golden.file.path}: {error}"
        ) from error
    for key, array in arrays.items():
        if array.ndim < 1 or len(array) != count or count > MAX_VECTORS:
            raise PitheadError(
                "package.manifest_invalid",
                f"golden.vectors: the manifest says {count}, {key} has the shape {list(array.shape)}",
            )
    return (
        [{t.name: _row(arrays[f"in:{t.name}"], i) for t in variant.inputs} for i in range(count)],
        [{t.name: _row(arrays[f"out:{t.name}"], i) for t in variant.outputs} for i in range(count)],
    )


def _row(array: Any, i: int) -> Any:
    # A scalar tensor's row is no array any more. Texts are kept in numpy's own kind, without pickles.
    row = np.asarray(array[i])
    return as_bytes(row) if row.dtype.kind in "SU" else row


def difference(name: str, got: Any, want: Any, tolerance: Tolerance) -> float:
    """Return the largest |got - want|; raises ``probe.golden_mismatch`` or ``inference.not_finite``.

    An infinity that the golden vector holds too is right; NaN never is.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise PitheadError(
            "probe.golden_mismatch",
            f"output {name!r} is {got.dtype} {list(got.shape)}, "
            f"the golden vector {want.dtype} {list(want.shape)}",
        )
    if got.dtype == np.object_:
        if (others := int((got != want).sum())) > 0:
            raise PitheadError(
                "probe.golden_mismatch", f"output {name!r}: {others} of {got.size} texts differ"
            )
        return 0.0
    a, b = got.astype(np.float64), want.astype(np.float64)
    same = a == b
    bad = ~np.isfinite(a) & ~same
    if bad.any():
        raise PitheadError(
            "inference.not_finite", f"output {name!r} has {int(bad.sum())} values that are NaN or infinite"
        )
    with np.errstate(invalid="ignore"):
        delta = np.where(same, 0.0, np.abs(a - b))
    # A golden value that is not finite where the output is finite can never be within tolerance.
    allowed = np.where(np.isfinite(b), tolerance.atol + tolerance.rtol * np.abs(b), 0.0)
    wrong = ~(delta <= allowed)
    if wrong.any():
        at = int(np.argmax(np.where(wrong, delta, -1.0)))
        raise PitheadError(
            "probe.golden_mismatch",
            f"output {name!r}: {int(wrong.sum())} of {a.size} values differ, the worst is {a.flat[at]:.6g}, "
            f"wanted {b.flat[at]:.6g} +- {allowed.flat[at]:.3g}",
        )
    return float(delta.max(initial=0.0))


def _compare(session: Session, feeds: list[Any], wanted: list[Any], golden: Golden) -> dict[str, float]:
    worst: dict[str, float] = {}
    for i, (feed, want) in enumerate(zip(feeds, wanted, strict=True)):
        got = session.run(feed)
        for name, array in want.items():
            try:
                delta = difference(name, got[name], array, golden.tolerance.get(name, Tolerance()))
            except PitheadError as error:
                raise PitheadError(error.code, f"vector {i}: {error.detail}") from error
            worst[name] = max(worst.get(name, 0.0), delta)
    return worst


if __name__ == "__main__":
    main()
