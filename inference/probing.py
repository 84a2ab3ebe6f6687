"""Open a new model for the first time, in a child process that may die of it.

The parent's side: light, without numpy or a runtime, so that the agent's
supervisor can use it. The child is ``inference.probe``; ``in_child`` serves
others that have to open what nobody has opened before.
"""

import contextlib
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from contract import codec
from contract.errors import PitheadError
from contract.manifest import Budget, Manifest, Variant
from inference import registry
from inference.accelerators import NO_LIMITS, CustomTable, Format, Resources, find, for_format
from inference.choosing import best, candidates, choose, over_budget, settled
from inference.reports import (
    DEFAULT_LIMITS,
    Choice,
    Limits,
    Placement,
    ProbeReport,
    ProbeRequest,
    SandboxReport,
)

__all__ = (
    "DEFAULT_LIMITS",
    "Choice",
    "Limits",
    "Placement",
    "ProbeReport",
    "ProbeRequest",
    "SandboxReport",
    "best",
    "choose",
    "in_child",
    "probe",
    "probe_file",
    "settled",
)

MAX_ANSWER: Final = 256 * 1024
MAX_STDERR: Final = 16 * 1024
SEARCH_S: Final = 30.0
"""After one has passed, no further candidate is begun later than this."""


def probe(
    manifest: Manifest,
    files: Mapping[str, Path],
    *,
    variants: Sequence[str] | None = None,
    accelerators: Sequence[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    require_sandbox: bool = False,
    first_only: bool = False,
    until_settled: bool = False,
    any_arch: bool = False,
    custom: CustomTable | None = None,
    resources: Resources = NO_LIMITS,
) -> list[ProbeReport]:
    """Probe what could run here, one child process each; never raises for a bad model.

    ``files`` maps the manifest's paths to where the files lie. With
    ``first_only`` it stops at the first that passes, with ``until_settled``
    where nothing better is possible or ``SEARCH_S`` is over. An empty list
    means that nothing could even be tried: ``choose`` says so. ``any_arch``
    tries what is meant for other architectures too, as admission does.
    ``custom`` and ``resources`` are the device's.
    """
    allowed = registry.accelerators(custom) if accelerators is None else accelerators
    reports: list[ProbeReport] = []
    until = None
    for variant, accelerator in candidates(manifest, variants, allowed, "any" if any_arch else None):
        if until is not None and time.monotonic() > until:
            break
        if until_settled:
            limits = _bounded(limits, reports)
        try:
            request = _request(manifest, variant, accelerator, files, limits, custom)
            request = msgspec.structs.replace(request, resources=resources, require_sandbox=require_sandbox)
            report = _answer(request, manifest.budget)
        except PitheadError as error:
            report = ProbeReport(variant.name, accelerator, error.code, error.detail[:1500])
        reports.append(report)
        if report.passed and (first_only or (until_settled and settled(report))):
            break
        if report.passed and until_settled and until is None:
            until = time.monotonic() + SEARCH_S
    return reports


def probe_file(
    model: Path,
    model_format: Format,
    *,
    accelerators: Sequence[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    require_sandbox: bool = False,
    custom: CustomTable | None = None,
    resources: Resources = NO_LIMITS,
) -> list[ProbeReport]:
    """Probe a model file on what this machine has for its format; never raises for a bad model.

    Without golden vectors there is nothing to agree with: ``worst`` is how
    far each accelerator is from the runtime's own kernels, on made-up inputs.
    """
    package = registry.formats().get(model_format)
    names = for_format(model_format, package or "", custom) if accelerators is None else accelerators
    reports = []
    for name in names:
        try:
            request = ProbeRequest(
                name=model.name,
                format=model_format,
                accelerator=find(model_format, name, custom),
                model=str(model.absolute()),
                limits=limits,
                parent=os.getpid(),
                resources=resources,
                require_sandbox=require_sandbox,
            )
            reports.append(_answer(request, Budget()))
        except PitheadError as error:
            reports.append(ProbeReport(model.name, name, error.code, error.detail[:1500]))
    return reports


def _bounded(limits: Limits, reports: Sequence[ProbeReport]) -> Limits:
    """Return limits under which a candidate that is far from the best so far is soon given up."""
    times = [r.latency_p50_us for r in reports if r.passed]
    return msgspec.structs.replace(limits, enough_us=2 * min(times)) if times else limits


def _request(
    manifest: Manifest,
    variant: Variant,
    accelerator: str,
    files: Mapping[str, Path],
    limits: Limits,
    custom: CustomTable | None,
) -> ProbeRequest:
    for ref in manifest.files_of(variant):
        if ref.path not in files:
            raise PitheadError("package.file_missing", ref.path)
    graph = None if manifest.pipeline is None else manifest.pipeline.graph
    return ProbeRequest(
        name=variant.name,
        format=variant.format,
        accelerator=find(variant.format, accelerator, custom, variant.accelerator_options.get(accelerator)),
        model=str(files[variant.file.path].absolute()),  # the child starts elsewhere
        limits=limits,
        parent=os.getpid(),
        variant=variant,
        golden=str(files[variant.golden.file.path].absolute()),
        pipeline=manifest.pipeline,
        score=manifest.score,
        graph="" if graph is None else str(files[graph.file.path].absolute()),
        graph_golden="" if graph is None else str(files[graph.golden.file.path].absolute()),
    )


def _answer(request: ProbeRequest, budget: Budget) -> ProbeReport:
    """Return what the child found, judged by the budget; raises what it died of."""
    answer = in_child("inference.probe", msgspec.json.encode(request), request.limits)
    try:
        report = codec.decode(answer, ProbeReport)
    except PitheadError as error:
        raise PitheadError("probe.crashed", error.detail) from error
    broken = over_budget(report, budget, request.resources) if report.passed else ""
    return msgspec.structs.replace(report, code="probe.over_budget", detail=broken) if broken else report


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
        _free_of_ours(child.pid)
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


def _free_of_ours(pid: int) -> None:
    """Let a child have what this process may not: it limits itself before it opens a model."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.prlimit(pid, resource.RLIMIT_DATA, (hard, hard))


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
