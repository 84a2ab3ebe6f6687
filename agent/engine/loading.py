"""Open a lane's model beside the one that serves: verify its bytes, load, run once."""

import hashlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.engine.calibration import Calibration, check_fit
from agent.engine.score import Debounce
from agent.engine.window import Bounds, Windower
from agent.ports import FitResult, LaneSpec, ModelSpec
from contract.errors import PitheadError
from contract.manifest import FileRef, Manifest, Pipeline, Score, Variant
from contract.package import MAX_MANIFEST, parse_manifest
from inference.accelerators import find
from inference.registry import open_session, read_file
from inference.scoring import Scorer
from inference.session import Accompanied, Session

log = logging.getLogger(__name__)

RECENT_US: Final = 60_000_000


@dataclass(slots=True)
class Served:
    """A version that is loaded and ready for windows."""

    spec: LaneSpec
    pipeline: Pipeline
    score: Score
    session: Session
    scorer: Scorer
    threshold: float
    calibration: Calibration | None
    """Not None while the version has no fit and needs one."""
    bounds: Bounds
    windower: Windower
    debounce: Debounce
    fit: FitResult | None = None
    windows: int = 0
    """Scored since this session began to serve."""
    errors: int = 0
    last_error: tuple[PitheadError, int] | None = None
    """And when it was, by the monotonic clock."""

    def apply(self, fit: FitResult) -> None:
        """Serve with this fit from the next window on."""
        self.fit = fit
        self.calibration = None
        self.threshold = fit.threshold
        self.scorer.normalise_by(fit.mean, fit.scale)

    def recent_error(self, now: int) -> PitheadError | None:
        """Return what last went wrong, unless that is long ago."""
        if self.last_error is None or now - self.last_error[1] > RECENT_US:
            return None
        return self.last_error[0]

    def fits_another_source(self, wanted: LaneSpec) -> bool:
        """Whether this is fitted, or being fitted, to a source that is not the lane's any more."""
        return self.pipeline.fit is not None and wanted.source != self.spec.source

    def serves(self, wanted: LaneSpec) -> bool:
        """Whether ``wanted`` asks for nothing but what this is.

        A fit that this engine made itself and that has not come back in the
        spec yet is not a difference.
        """
        if wanted.fit not in (self.spec.fit, self.fit):
            return False
        if self.pipeline.fit is not None and wanted.binding != self.spec.binding:
            return False
        return _identity(self.spec) == _identity(wanted)


def key(spec: LaneSpec) -> tuple[object, ...]:
    """What cannot change without a new session."""
    return *_identity(spec), spec.fit, spec.binding


def _identity(spec: LaneSpec) -> tuple[object, ...]:
    drives = spec.accelerator, spec.custom, spec.resources
    return spec.digest, spec.variant, *drives, spec.activation


def load(spec: LaneSpec) -> Served:
    """Return the version that ``spec`` names, ready to score.

    Raises ``package.*`` for files that are not what the manifest says, and
    ``inference.*`` where the runtime refuses.
    """
    manifest = read_manifest(spec)
    pipeline, score = manifest.pipeline, manifest.score
    if pipeline is None or score is None:
        raise PitheadError("package.manifest_invalid", f"{manifest.name} has no pipeline or score for a lane")
    variant = find_variant(manifest, spec)
    if spec.fit is not None:
        check_fit(spec.fit, pipeline.fit, len(pipeline.channels))
    session, graph = open_variant(variant, spec), None
    try:
        if pipeline.graph is not None:
            graph = open_session(
                _verified(spec, pipeline.graph.file), "onnx", "cpu", resources=spec.resources
            )
            session = Accompanied(session, graph)
        scorer = Scorer(session, pipeline, score, variant.inputs, variant.outputs, graph)
        scorer.warm_up()
    except BaseException:
        session.close()
        raise
    served = Served(
        spec=spec,
        pipeline=pipeline,
        score=score,
        session=session,
        scorer=scorer,
        threshold=score.threshold,
        calibration=None,
        bounds=Bounds(pipeline.channels),
        windower=Windower(pipeline.window, pipeline.stride, len(pipeline.channels)),
        debounce=Debounce(score.debounce),
    )
    if spec.fit is not None:
        served.apply(spec.fit)
    elif pipeline.fit is not None:
        served.calibration = Calibration(pipeline.fit, pipeline.window)
    return served


def read_manifest(spec: ModelSpec) -> Manifest:
    """Return the manifest that ``spec`` names; raises ``package.*`` where its bytes are others."""
    try:
        with Path(spec.manifest).open("rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise PitheadError("package.file_missing", f"{spec.manifest}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != spec.digest:
        raise PitheadError("package.file_mismatch", f"the manifest {spec.manifest} has another SHA-256")
    return parse_manifest(data)


def find_variant(manifest: Manifest, spec: ModelSpec) -> Variant:
    """Return the variant that ``spec`` names, if it is made for the accelerator."""
    for variant in manifest.variants:
        if variant.name == spec.variant:
            if spec.accelerator not in variant.accelerators:
                raise PitheadError(
                    "inference.accelerator_missing",
                    f"variant {variant.name} is not made for {spec.accelerator}",
                )
            return variant
    raise PitheadError("package.manifest_invalid", f"{manifest.name} has no variant {spec.variant}")


def open_variant(variant: Variant, spec: ModelSpec) -> Session:
    """Return a session of the very bytes that the manifest names; raises ``package.*``, ``inference.*``."""
    return open_bytes(variant, spec, read_verified(variant, spec))


def read_verified(variant: Variant, spec: ModelSpec) -> bytes:
    """Return the very bytes that the manifest names; raises ``package.*``."""
    return _verified(spec, variant.file)


def open_bytes(variant: Variant, spec: ModelSpec, model: bytes) -> Session:
    """Return a session of a variant's bytes; raises ``inference.*``."""
    hints = variant.accelerator_options.get(spec.accelerator)
    accelerator = find(variant.format, spec.accelerator, spec.custom, hints)
    return open_session(model, variant.format, accelerator, resources=spec.resources)


def _verified(spec: ModelSpec, ref: FileRef) -> bytes:
    """Return the file's bytes, read once: what was hashed is what the runtime gets."""
    path = spec.files.get(ref.path)
    if path is None:
        raise PitheadError("package.file_missing", f"no object is given for {ref.path}")
    return read_file(Path(path), ref)


class Loader:
    """One thread that loads, fits and frees sessions, so that no lane waits for it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run ``job`` after those that were given before."""
        self._jobs.put(job)

    def start(self) -> None:
        """Start the thread; it dies with the process, since a load may never end."""
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """End after the jobs that were given; return whether that happened in time."""
        self._jobs.put(None)
        if self._thread is None:
            return True
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                log.exception("loader.job_failed")
