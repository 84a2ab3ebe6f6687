"""Open a new model for the first time, in a child process that may die of it.

The parent's side: light, without numpy or a runtime, so that the agent's
supervisor can use it. The child is ``inference.probe``; ``in_child`` serves
others that have to open what nobody has opened before.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from contract import codec
from contract.errors import PitheadError
from contract.manifest import Budget, Manifest, Pipeline, Score, Variant
from inference import registry

MAX_ANSWER: Final = 256 * 1024
MAX_STDERR: Final = 16 * 1024
_MB: Final = 1024 * 1024


class Limits(Struct, frozen=True):
    """What a probe of one variant on one accelerator may cost before it is killed."""

    wall_s: float = 30.0
    cpu_s: int = 20
    memory_mb: int = 1024
    """Address space on top of what the runtime itself takes."""
    measure_s: float = 0.05
    """How long latencies are measured: 3 to 10 rounds of 10 to 100 runs, and two seconds at most."""


DEFAULT_LIMITS: Final = Limits()


class SandboxReport(Struct, frozen=True):
    """Which layers hold."""

    no_new_privs: bool
    rlimits: bool
    landlock_abi: int
    """0 where the kernel has no Landlock."""
    seccomp: bool

    @property
    def level(self) -> str:
        """``full``, ``partial`` (one of Landlock and seccomp is missing) or ``limits`` (both are)."""
        layers = (self.landlock_abi > 0) + self.seccomp
        return ("limits", "partial", "full")[layers] if self.no_new_privs and self.rlimits else "none"


class ProbeRequest(Struct, frozen=True):
    """What the parent asks of the child."""

    variant: Variant
    accelerator: str
    model: str
    golden: str
    limits: Limits
    parent: int
    require_sandbox: bool = False
    pipeline: Pipeline | None = None
    """With ``score``: what a lane feeds the model with, and makes of its output."""
    score: Score | None = None


class ProbeReport(Struct, frozen=True, omit_defaults=True):
    """What was seen of one variant on one accelerator; ``code`` is None when it passed."""

    variant: str
    accelerator: str
    code: str | None = None
    detail: str = ""
    accelerator_used: str | None = None
    runtime: str = ""
    vectors: int = 0
    """Golden vectors that agreed."""
    worst: dict[str, float] = {}
    """By output: the largest difference from the golden vectors."""
    load_ms: float = 0.0
    latency_p50_us: float = 0.0
    latency_p99_us: float = 0.0
    memory_mb: float = 0.0
    """RSS at its peak less RSS before the model was opened."""
    peak_rss_mb: float = 0.0
    cpu_s: float = 0.0
    sandbox: SandboxReport | None = None

    @property
    def passed(self) -> bool:
        """Whether the model may be loaded by the engine."""
        return self.code is None


class Choice(Struct, frozen=True):
    """The variant and accelerator that a device shall use."""

    variant: str
    accelerator: str
    report: ProbeReport


def candidates(
    manifest: Manifest, variants: Sequence[str] | None, accelerators: Sequence[str], arch: str | None = None
) -> Iterator[tuple[Variant, str]]:
    """Yield (variant, accelerator) that could run here, the most preferred first.

    Variants by the manifest's preference, then accelerators in the variant's own order.
    ``arch`` is this machine's unless given; ``any`` takes every variant.
    """
    machine = arch or registry.arch()
    for variant in sorted(manifest.variants, key=lambda v: -v.preference):
        if variants is not None and variant.name not in variants:
            continue
        if machine != "any" and "any" not in variant.arch and machine not in variant.arch:
            continue
        for accelerator in variant.accelerators:
            if accelerator in accelerators:
                yield variant, accelerator


def probe(
    manifest: Manifest,
    files: Mapping[str, Path],
    *,
    variants: Sequence[str] | None = None,
    accelerators: Sequence[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    require_sandbox: bool = False,
    first_only: bool = False,
    any_arch: bool = False,
) -> list[ProbeReport]:
    """Probe what could run here, one child process each; never raises for a bad model.

    ``files`` maps the manifest's paths to where the files lie. With
    ``first_only`` it stops at the first that passes. An empty list means that
    nothing could even be tried: ``choose`` says so. ``any_arch`` tries what
    is meant for other architectures too, as admission does.
    """
    allowed = registry.accelerators() if accelerators is None else accelerators
    reports = []
    for variant, accelerator in candidates(manifest, variants, allowed, "any" if any_arch else None):
        report = _probe(manifest, variant, accelerator, files, limits, require_sandbox=require_sandbox)
        reports.append(report)
        if first_only and report.passed:
            break
    return reports


def choose(reports: Sequence[ProbeReport], manifest: Manifest) -> Choice:
    """Return the best of what passed: the manifest's preference first, then the measured latency.

    Raises the failure's own code when nothing passed and all failed alike,
    else ``probe.no_variant`` with every reason.
    """
    preference = {v.name: v.preference for v in manifest.variants}
    passed = [r for r in reports if r.passed]
    if passed:
        best = min(passed, key=lambda r: (-preference[r.variant], r.latency_p50_us))
        return Choice(best.variant, best.accelerator, best)
    reasons = "; ".join(f"{r.variant} on {r.accelerator}: {r.code} {r.detail}".rstrip() for r in reports)
    codes = {r.code for r in reports}
    code = codes.pop() if len(codes) == 1 else None
    raise PitheadError(code or "probe.no_variant", reasons or "no variant fits this machine")


def over_budget(report: ProbeReport, budget: Budget) -> str:
    """Return in which way a report breaks the budget, or an empty text."""
    if budget.latency_ms is not None and report.latency_p99_us > budget.latency_ms * 1000:
        return f"p99 {report.latency_p99_us / 1000:.3f} ms, the budget is {budget.latency_ms} ms"
    if budget.memory_mb is not None and report.memory_mb > budget.memory_mb:
        return f"{report.memory_mb:.1f} MB, the budget is {budget.memory_mb} MB"
    return ""


def _probe(
    manifest: Manifest,
    variant: Variant,
    accelerator: str,
    files: Mapping[str, Path],
    limits: Limits,
    *,
    require_sandbox: bool,
) -> ProbeReport:
    def failed(code: str, detail: str) -> ProbeReport:
        return ProbeReport(variant.name, accelerator, code, detail[:1500])

    for ref in (variant.file, variant.golden.file):
        if ref.path not in files:
            return failed("package.file_missing", ref.path)
    request = ProbeRequest(
        variant=variant,
        accelerator=accelerator,
        model=str(files[variant.file.path]),
        golden=str(files[variant.golden.file.path]),
        limits=limits,
        parent=os.getpid(),
        require_sandbox=require_sandbox,
        pipeline=manifest.pipeline,
        score=manifest.score,
    )
    try:
        answer = in_child("inference.probe", msgspec.json.encode(request), limits)
        report = codec.decode(answer, ProbeReport)
    except PitheadError as error:
        unreadable = error.code.startswith("message.")
        return failed("probe.crashed" if unreadable else error.code, error.detail)
    broken = over_budget(report, manifest.budget) if report.passed else ""
    if broken:
        return msgspec.structs.replace(report, code="probe.over_budget", detail=broken)
    return report


def in_child(module: str, request: bytes, limits: Limits, most: int = MAX_ANSWER) -> bytes:
    """Return what ``python -m module`` answers to ``request``, at most ``most`` bytes of it.

    Raises ``probe.timeout``, ``probe.crashed`` or ``probe.over_budget`` when it dies first.
    """
    command = [sys.executable, "-I", "-m", module]
    answer, stderr, status = _converse(command, request, limits.wall_s, most)
    if status is None:
        raise PitheadError("probe.timeout", f"killed after {limits.wall_s} s")
    if status != 0:
        raise PitheadError(*_death(status, stderr, limits))
    return answer


def _converse(
    command: Sequence[str], request: bytes, wall_s: float, most: int
) -> tuple[bytes, str, int | None]:
    """Return (stdout, end of stderr, exit status; None when it had to be killed for its time).

    What a child says beyond the limits is read and dropped, so that it can neither block nor fill us.
    """
    deadline = time.monotonic() + wall_s
    kept: dict[str, bytes] = {"out": b"", "err": b""}
    limit = {"out": most, "err": MAX_STDERR}
    environment = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(request)
                child.stdin.close()
            with selectors.DefaultSelector() as selector:
                selector.register(child.stdout, selectors.EVENT_READ, "out")
                selector.register(child.stderr, selectors.EVENT_READ, "err")
                while selector.get_map():
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return b"", _text(kept["err"]), None
                    for key, _ in selector.select(left):
                        data = os.read(key.fd, 65536)
                        if not data:
                            selector.unregister(key.fileobj)
                        kept[key.data] = _keep(kept[key.data] + data, limit[key.data], key.data)
            try:
                status = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return b"", _text(kept["err"]), None
            return kept["out"], _text(kept["err"]), status
        finally:
            if child.poll() is None:
                child.kill()


def _keep(data: bytes, limit: int, which: str) -> bytes:
    return data[:limit] if which == "out" else data[-limit:]


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace").strip()


def _death(status: int, stderr: str, limits: Limits) -> tuple[str, str]:
    """Return (code, detail) for a child that did not end by itself."""
    last = stderr.splitlines()[-1] if stderr else ""
    if status in {-signal.SIGXCPU, -signal.SIGKILL}:
        return "probe.timeout", f"used more than {limits.cpu_s} s of CPU"
    if any(word in stderr for word in ("bad_alloc", "MemoryError", "Cannot allocate memory")):
        return "probe.over_budget", f"more than {limits.memory_mb} MB of address space: {last}"
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        return "probe.crashed", f"died of {name}: {last}".rstrip(": ")
    return "probe.crashed", f"ended with status {status}: {last}".rstrip(": ")
