"""What a slot holds, made ready to be served: a candidate that opens it, and a record of what it did.

Its files were verified and its accelerator chosen before it came into the
slot, so it is hashed at load like a lane's model, and not probed again.
"""

import asyncio
import hashlib
from array import array
from collections.abc import Mapping
from typing import Final

import msgspec
import numpy as np

from agent.engine.loading import find_variant, open_bytes, read_manifest, read_verified
from agent.engine.serve.opening import Opened, steady
from agent.engine.serve.repository import FORMATS, Candidate
from agent.engine.serve.statistics import Statistics
from agent.engine.summary import Gathered
from agent.ports import ModelSpec
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from contract.messages import Micros, ModelSummary
from inference.registry import RUNTIMES
from inference.reports import Placement
from inference.session import Array, Session

NOT_THE_MODELS: Final = frozenset({"inference.bad_input", "serve.timeout", "serve.bad_request"})
"""Errors that the client, or the load, is to blame for."""
GATHERED: Final = 1024


class Record(Statistics):
    """Counts for telemetry too, from one bucket of time to the next."""

    __slots__ = ("_at", "_failed", "_good", "_latency", "_odd", "_waiting", "odd")

    def __init__(self) -> None:
        super().__init__()
        self.odd = 0
        """Runs that gave NaN or infinity for finite numbers."""
        self._good = self._failed = self._odd = 0
        """What was reported of ``answered``, ``blamed`` and ``odd``."""
        self._latency = Gathered()
        self._waiting = array("d")

    @property
    def blamed(self) -> int:
        """Requests that the model could not answer."""
        return sum(n for code, n in self.codes.items() if code not in NOT_THE_MODELS)

    @property
    def errors(self) -> int:
        """What speaks against the model."""
        return self.blamed + self.odd

    @property
    def answered(self) -> int:
        """Requests that were answered well."""
        return max(0, self.successes - self.odd)

    def succeeded(self, rows: int, queue_ns: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """See ``Statistics``."""
        super().succeeded(rows, queue_ns, input_ns, infer_ns, output_ns)
        self._waiting.append((queue_ns + input_ns + infer_ns + output_ns) * 1e-3)
        if len(self._waiting) >= GATHERED:
            self._gather()

    @property
    def anything(self) -> bool:
        """Whether there is something to report."""
        return (self.answered, self.blamed, self.odd) != (self._good, self._failed, self._odd)

    def take(self, head: ModelSummary, queue: int) -> ModelSummary:
        """Return what there was since the call before; ``head`` says what ran and when."""
        self._gather()
        good, failed, odd = self.answered, self.blamed, self.odd
        # What was kept was answered, but says nothing of how quick the model is.
        latency = self._latency.build()
        timed = good > self._good and latency.count > 0
        summary = msgspec.structs.replace(
            head,
            count=max(0, good - self._good),
            errors=failed - self._failed + odd - self._odd,
            latency_us=latency if timed else None,
            queue=queue,
        )
        self._good, self._failed, self._odd = good, failed, odd
        self._latency = Gathered()
        return summary

    def _gather(self) -> None:
        if self._waiting:
            self._latency.add(np.array(self._waiting))
            self._waiting = array("d")


class Watched:
    """A session that notices when numbers come out that are none, though the input has none of those.

    Some 2 us a run. Only once it ``counts``: warm-up's random numbers need not make sense to a model.
    """

    def __init__(self, session: Session, record: Record) -> None:
        self._session, self._record = session, record
        self.counts = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See ``Session``."""
        return self._session.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """See ``Session``."""
        return self._session.outputs

    @property
    def accelerator(self) -> str:
        """See ``Session``."""
        return self._session.accelerator

    @property
    def runtime(self) -> str:
        """See ``Session``."""
        return self._session.runtime

    @property
    def placement(self) -> Placement:
        """See ``Session``."""
        return self._session.placement

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Session``."""
        outputs = self._session.run(inputs)
        if self.counts and not _finite(outputs) and _finite(inputs):
            self._record.odd += 1
        return outputs

    def reset(self) -> None:
        """See ``Session``."""
        self._session.reset()

    def close(self) -> None:
        """See ``Session``."""
        self._session.close()


def _finite(arrays: Mapping[str, Array]) -> bool:
    for each in arrays.values():  # noqa: SIM110 - a generator costs more than the loop
        if each.dtype.kind == "f" and not np.isfinite(each).all():
            return False
    return True


class Offer:
    """One activation of a version: how to open it, and what became of that. On the loop's thread."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.identity = identity(spec)
        self.record = Record()
        self.candidate = Candidate(
            name=spec.model_name,
            version=spec.version,
            platform=_platform(spec),
            identity=self.identity,
            open=self._open,
            statistics=self.record,
        )
        self.loading: asyncio.Task[None] | None = None
        self.settled = False
        """It has served since it was wanted last."""
        self.error: PitheadError | None = None
        self.again = 0.0
        """When to try once more, by the loop's clock."""
        self.cause: PitheadError | None = None
        """What ``open`` raised: the catalogue says only that it failed."""
        self.accelerator = spec.accelerator

    def wanted_again(self) -> None:
        """Forget how it ended when it was wanted before."""
        self.settled, self.error = False, None

    def head(self, start: Micros, bucket_s: float) -> ModelSummary:
        """Return a summary of nothing, by this version."""
        spec = self.spec
        return ModelSummary(
            model_name=spec.model_name,
            version=spec.version,
            bucket_start=start,
            bucket_s=bucket_s,
            count=0,
            activation=spec.activation,
            variant=spec.variant,
            accelerator=self.accelerator,
            source="serve",
        )

    def _open(self) -> Opened:
        """On the loader's thread."""
        try:
            self.cause = None
            manifest = read_manifest(self.spec)
            variant = find_variant(manifest, self.spec)
            content = read_verified(variant, self.spec)
            session = Watched(open_bytes(variant, self.spec, content), self.record)
        except PitheadError as error:
            self.cause = error
            raise
        self.accelerator = session.accelerator
        return Opened(
            session,
            variant.inputs,
            variant.outputs,
            variant.file.length,
            objective_ms=manifest.budget.latency_ms,
            steady=steady(content, variant.format),
        )


def identity(spec: ModelSpec) -> str:
    """Return what changes with everything that asks for a new session."""
    return hashlib.sha256(msgspec.json.encode(spec, order="sorted")).hexdigest()[:32]


def _platform(spec: ModelSpec) -> str:
    """Return what the names of its files say: the manifest is read where nobody waits."""
    found = {RUNTIMES[f].platform for suffix, f in FORMATS.items() for p in spec.files if p.endswith(suffix)}
    return min(found, default="")
