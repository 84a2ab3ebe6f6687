"""Open a model for serving: after its first time in a sandbox, in this process.

The runtime of a format is imported by the first model of that format.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from agent.engine.serve.trial import Failure, TrialReport, TrialRequest
from agent.engine.serve.verdicts import Verdict, Verdicts
from contract.errors import PitheadError
from contract.manifest import Manifest, TensorSpec, Variant
from inference import probing
from inference.accelerators import find
from inference.registry import open_session, read_file
from inference.screening.tflite import graphs

if TYPE_CHECKING:
    from inference.session import Session

log = logging.getLogger(__name__)

_LOOPS: Final = (b"\x22\x04Loop", b"\x22\x04Scan")
"""NodeProto.op_type as it stands in a file; that weights look like it costs a thread, and nothing else."""
LIMITS: Final = probing.Limits(wall_s=60.0, cpu_s=50, memory_mb=2048)


class Opened(Struct, frozen=True):
    """A session that is ready to run, and what its format does not say itself."""

    session: "Session"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bytes: int
    """Of the model's file: the least that the session holds in memory."""
    objective_ms: float | None = None
    """The latency that its package promises."""
    labels: Mapping[str, tuple[str, ...]] = {}
    """Names of the classes, by output."""
    steady: bool = True
    """It has no loop whose end its inputs decide, as far as is known."""


def open_bare(file: Path, model_format: str, verdicts: Verdicts, threads: int) -> Opened:
    """Open a file that nobody has signed; unknown bytes go through the sandbox first."""
    content = read_file(file)
    digest = hashlib.sha256(content).hexdigest()
    if verdicts.find(digest) is None:
        report = try_out(file, digest, model_format)
        verdicts.keep(digest, Verdict(accelerator=report.accelerator, sandbox=report.sandbox))
        _say(file.name, report.sandbox)
    known = verdicts.find(digest) or Verdict()
    session = open_session(content, model_format, known.accelerator, threads)
    return Opened(
        session,
        session.inputs,
        session.outputs,
        len(content),
        labels=_labels(file, session),
        steady=steady(content, model_format),
    )


def open_package(manifest: Manifest, directory: Path, verdicts: Verdicts, threads: int) -> Opened:
    """Open the best variant of a package that passes its golden vectors here."""
    digest = hashlib.sha256(msgspec.json.encode(manifest)).hexdigest()
    known = verdicts.find(digest)
    if known is None:
        files = {ref.path: directory / ref.path for ref in manifest.files()}
        reports = probing.probe(manifest, files, until_settled=True)
        choice = probing.choose(reports, manifest)
        sandbox = choice.report.sandbox.level if choice.report.sandbox else "none"
        known = Verdict(choice.variant, choice.accelerator, sandbox)
        verdicts.keep(digest, known)
        _say(f"{manifest.name} {manifest.version}", sandbox)
    variant = _variant(manifest, known.choice)
    content = read_file(directory / variant.file.path, variant.file)
    hints = variant.accelerator_options.get(known.accelerator)
    accelerator = find(variant.format, known.accelerator, hints=hints)
    session = open_session(content, variant.format, accelerator, threads)
    return Opened(
        session,
        variant.inputs,
        variant.outputs,
        len(content),
        objective_ms=manifest.budget.latency_ms,
        steady=steady(content, variant.format),
    )


def steady(content: bytes, model_format: str) -> bool:
    """Whether no operator of the model repeats as its inputs say, as far as is known.

    In TFLite a loop's body and condition are graphs beside the first.
    """
    if model_format == "tflite":
        return graphs(content) <= 1
    return model_format != "onnx" or not any(operator in content for operator in _LOOPS)


def try_out(file: Path, digest: str, model_format: str, limits: probing.Limits = LIMITS) -> TrialReport:
    """Return what the model does in a process that may die of it; raises what is wrong with it."""
    request = TrialRequest(str(file), digest, model_format, limits, os.getpid())
    answer = probing.in_child("agent.engine.serve.trial", msgspec.json.encode(request), limits)
    try:
        said = msgspec.json.decode(answer, type=TrialReport | Failure)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PitheadError("probe.crashed", f"{file.name}: its answer is not readable: {error}") from error
    if isinstance(said, Failure):
        raise PitheadError(said.code, f"{file.name}: {said.detail}")
    return said


def _variant(manifest: Manifest, name: str) -> Variant:
    for variant in manifest.variants:
        if variant.name == name:
            return variant
    raise PitheadError("package.manifest_invalid", f"{manifest.name} has no variant {name}")


def _say(what: str, sandbox: str) -> None:
    facts = {"facts": {"model": what, "sandbox": sandbox}}
    if sandbox == "full":
        log.info("model.tried", extra=facts)
    else:
        log.warning("model.tried_with_weak_sandbox", extra=facts)


def _labels(file: Path, session: "Session") -> dict[str, tuple[str, ...]]:
    """Return the lines of ``labels.txt`` beside a numbered model, for its first output."""
    path = file.with_name("labels.txt")
    if file.stem != "model" or not path.is_file():
        return {}
    lines = read_file(path).decode("utf-8", "replace").splitlines()
    return {session.outputs[0].name: tuple(lines)}
