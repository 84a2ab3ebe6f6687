"""``python -m inference.probe``: open one model, check it, measure it, and end.

One JSON request on standard input, one JSON report on standard output. All
that is ever imported is imported first, then the process confines itself,
and only then looks at the model and its golden vectors.
"""

import encodings.cp437
import os
import sys
import time
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from contract.errors import PitheadError
from contract.manifest import MAX_VECTORS, Golden, TensorSpec, Tolerance, Variant
from inference import registry
from inference.probing import Limits, ProbeReport, ProbeRequest, SandboxReport
from inference.sandbox import confine
from inference.scoring import Scorer
from inference.screening import SCREENS
from inference.session import Session

MIN_RUNS, MAX_RUNS = 10, 100
"""In one round of measuring."""
MIN_ROUNDS, MAX_ROUNDS = 3, 10
PRELOADED: Final = (encodings.cp437,)
"""What the standard library would import later, when no file can be opened any more."""
MEASURE_MOST_S: Final = 2.0
"""No further run begins after this: a slow model is known well enough by few runs."""
_WARM_UP: Final = 3
_SCALE_RTOL: Final = 1e-6
_MB: Final = 1024 * 1024


def main() -> None:
    """Answer one request."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ProbeRequest)
    # Runtimes write on standard output as they please; the answer goes where they cannot.
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        report = examine(request)
    except PitheadError as error:
        report = ProbeReport(request.variant.name, request.accelerator, error.code, error.detail[:1500])
    except MemoryError:
        report = ProbeReport(
            request.variant.name,
            request.accelerator,
            "probe.over_budget",
            f"more than {request.limits.memory_mb} MB of address space",
        )
    os.write(answer, msgspec.json.encode(report))
    # A model that was opened here is not worth a clean farewell.
    os._exit(0)


def examine(request: ProbeRequest) -> ProbeReport:
    """Return the report of one variant on one accelerator; raises ``PitheadError`` for what is wrong."""
    variant, limits = request.variant, request.limits
    opener = registry.load_runtime(variant.format, warm_up=True)
    model = registry.read_file(Path(request.model), variant.file)
    golden = registry.read_file(Path(request.golden), variant.golden.file)
    meter = os.open("/proc/self/status", os.O_RDONLY)
    before = _status(meter, "VmRSS")
    sandbox = confine(
        memory_bytes=limits.memory_mb * _MB,
        cpu_s=limits.cpu_s,
        parent=request.parent,
        require=request.require_sandbox,
    )
    SCREENS[variant.format](model)
    start = time.perf_counter()
    session = opener(model, request.accelerator, 1)
    load_ms = (time.perf_counter() - start) * 1000
    check_tensors("inputs", variant.inputs, session.inputs)
    check_tensors("outputs", variant.outputs, session.outputs)
    if session.accelerator != request.accelerator:
        raise PitheadError(
            "inference.accelerator_missing",
            f"asked for {request.accelerator!r}, the runtime used {session.accelerator!r}",
        )
    if request.pipeline is not None and request.score is not None:
        Scorer(session, request.pipeline, request.score, variant.inputs, variant.outputs).warm_up()
    feeds, wanted = golden_vectors(golden, variant)
    worst = _compare(session, feeds, wanted, variant.golden)
    p50, p99 = _measure(session, feeds[0], limits)
    return _report(request, session, sandbox, len(feeds), worst, (load_ms, p50, p99), meter, before)


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


def golden_vectors(content: bytes, variant: Variant) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
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
        # A scalar tensor's row is no array any more.
        [{t.name: np.asarray(arrays[f"in:{t.name}"][i]) for t in variant.inputs} for i in range(count)],
        [{t.name: np.asarray(arrays[f"out:{t.name}"][i]) for t in variant.outputs} for i in range(count)],
    )


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


def _measure(session: Session, feed: Any, limits: Limits) -> tuple[float, float]:
    """Return (p50, p99) of one run in microseconds: those of the calmest round.

    Where twenty agents probe on two cores, what the others take is not this model's cost.
    """
    began = time.perf_counter()
    for _ in range(_WARM_UP):
        session.run(feed)
        if time.perf_counter() > began + MEASURE_MOST_S:
            break
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + limits.measure_s
    last = max(end, began + MEASURE_MOST_S)
    while not rounds or time.perf_counter() < (last if len(rounds) < MIN_ROUNDS else end):
        times = _round(session, feed, limits.measure_s / MIN_ROUNDS, last)
        rounds.append((times[int(len(times) * 0.99)], times[len(times) // 2]))
        if len(rounds) == MAX_ROUNDS:
            break
    p99, p50 = min(rounds)
    return p50, p99


def _round(session: Session, feed: Any, share_s: float, last: float) -> list[float]:
    """Return what some runs took, in microseconds, from the shortest on."""
    times: list[float] = []
    until = time.perf_counter() + share_s
    while len(times) < MAX_RUNS:
        start = time.perf_counter()
        if times and start > (last if len(times) < MIN_RUNS else until):
            break
        session.run(feed)
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times)


def _report(
    request: ProbeRequest,
    session: Session,
    sandbox: SandboxReport,
    vectors: int,
    worst: dict[str, float],
    timing: tuple[float, float, float],
    meter: int,
    before: float,
) -> ProbeReport:
    peak = _status(meter, "VmHWM")
    load_ms, p50, p99 = timing
    return ProbeReport(
        variant=request.variant.name,
        accelerator=request.accelerator,
        accelerator_used=session.accelerator,
        runtime=session.runtime,
        vectors=vectors,
        worst=worst,
        load_ms=load_ms,
        latency_p50_us=p50,
        latency_p99_us=p99,
        memory_mb=max(0.0, peak - before),
        peak_rss_mb=peak,
        cpu_s=time.process_time(),
        sandbox=sandbox,
    )


def _status(meter: int, key: str) -> float:
    """Return a figure of ``/proc/self/status`` in MB, through a descriptor that the sandbox left open."""
    for line in os.pread(meter, 8192, 0).decode("ascii", errors="replace").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
