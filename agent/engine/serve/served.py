"""One version of a model, from the moment that it is known to the moment that its session is freed."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import numpy as np
from msgspec.structs import replace

from agent.engine.serve import tensors
from agent.engine.serve.cache import Cache, question_of
from agent.engine.serve.jobs import Job, Outputs
from agent.engine.serve.opening import Opened
from agent.engine.serve.repository import Candidate
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.routing import Done, Held
from agent.engine.serve.runner import Policy, Profile, Runner
from agent.engine.serve.statistics import Statistics
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.arithmetic import dequantise, quantise
from inference.made_up import made_up
from inference.session import Array

REAL: Final = np.dtype(np.float32)
LARGER: Final = 8
"""Inputs with so many times the values of those that were measured may take much longer, not only so."""


class _Input:
    """What is needed to check an input quickly."""

    __slots__ = ("datatype", "dtype", "shape", "spec")

    def __init__(self, spec: TensorSpec) -> None:
        self.spec = spec
        self.datatype = spec.datatype
        self.dtype = tensors.DTYPE[spec.datatype]
        self.shape = spec.shape


class Live:
    """A session that serves: admits requests, hands them to its runner, makes answers of outputs.

    On the loop's thread only.
    """

    def __init__(
        self,
        candidate: Candidate,
        opened: Opened,
        profile: Profile,
        policy: Policy,
        memory_bytes: int,
        statistics: Statistics,
        cache: Cache | None = None,
    ) -> None:
        self.candidate, self.opened, self.profile, self.policy = candidate, opened, profile, policy
        self.memory_bytes = memory_bytes
        self.statistics, self.cache = statistics, cache
        self.last_used_ns = time.monotonic_ns()
        if not opened.steady:
            profile = replace(profile, steady=False)
        loop = asyncio.get_running_loop()
        self.runner = Runner(
            candidate.name, opened.session, profile, policy, self._finished, statistics.ran, loop
        )
        self.in_flight = 0
        self._retired: Callable[[Live], None] | None = None
        self._inputs = {spec.name: _Input(spec) for spec in opened.inputs}
        self._outputs = {spec.name: spec for spec in opened.outputs}
        self._quantised = {s.name: s for s in opened.outputs if s.scale is not None}
        self._timeout_ns = round(policy.timeout_s * 1e9)
        open_rest = any(-1 in spec.shape[1:] for spec in opened.inputs)
        self._one_shape = self.runner.batches and not open_rest
        self._plain = 0
        """Values of the inputs that were measured, where others may come whose rows do not count; else 0."""
        if any(-1 in spec.shape for spec in opened.inputs) and not self._one_shape:
            self._plain = sum(array.size for array in made_up(opened.inputs, 1).values())

    def retire(self, then: Callable[["Live"], None]) -> None:
        """Call ``then`` when the last request that was admitted is answered; admits none after this."""
        self._retired = then
        if self.cache is not None:
            self.cache.clear()
            self.cache = None
        self._drained()

    @property
    def all_bytes(self) -> int:
        """Of the session and of the answers that are kept."""
        return self.memory_bytes + (0 if self.cache is None else self.cache.bytes)

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """See ``Routed``."""
        return self.opened.labels

    @property
    def batches(self) -> bool:
        """See ``Routed``."""
        return self.runner.batches

    def crowded(self) -> PitheadError | None:
        """Return why nobody is taken just now, and count who is told so; None: ``submit`` says it."""
        if self.cache is not None:
            return None
        error = self.runner.crowded()
        if error is not None:
            self.statistics.refused += 1
        return error

    def hold(self, _request: InferRequest) -> Held:
        """See ``Routed``."""
        self.in_flight += 1
        return _Held(self)

    def release(self) -> None:
        """End a ``hold``."""
        self.in_flight -= 1
        self._drained()

    def submit(self, request: InferRequest, done: Done) -> None:
        """Answer ``request`` through ``done``, once, perhaps before this returns.

        Raises ``serve.bad_request`` and ``serve.overloaded`` instead where that is known at once.
        """
        began = time.monotonic_ns()
        inputs, rows, key, real = self._check(request)
        wanted = self._wanted(request)
        if self.cache is not None:
            kept = self._kept(self.cache, request, (inputs, wanted, real), done, began)
            if kept is None:
                return
            done = kept
        timeout = request.timeout_us * 1000 if request.timeout_us else self._timeout_ns
        job = Job(inputs, rows, key, request.priority, began + timeout, (request, wanted, real, done, began))
        if self._plain:
            job.large = sum(array.size for array in inputs.values()) > LARGER * self._plain
        self.in_flight += 1
        self.last_used_ns = began
        try:
            self.runner.submit(job)
        except PitheadError:
            self.in_flight -= 1
            self.statistics.refused += 1
            self._drained()
            raise

    def _kept(
        self,
        cache: Cache,
        request: InferRequest,
        asked: tuple[dict[str, Array], tuple[str, ...] | None, bool],
        done: Done,
        began: int,
    ) -> Done | None:
        """Answer from what is kept and return None, or return what answers and keeps the answer."""
        if "sequence_id" in request.parameters:
            return done
        inputs, wanted, real = asked
        looked = time.monotonic_ns()
        question = question_of(self._inputs, inputs, wanted, real=real)
        found = cache.get(question)
        now = time.monotonic_ns()
        candidate = self.candidate
        if found is not None:
            self.last_used_ns = began
            self.statistics.hit(now - began)
            done(InferResponse(candidate.name, candidate.version, found, request.id, cached=True))
            return None
        looking = now - looked

        def keep(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                done(answer)
                return
            outputs = answer.outputs  # who is told may put others in their place
            done(answer)
            start = time.monotonic_ns()
            cache.put(question, inputs, outputs)
            self.statistics.missed(looking + time.monotonic_ns() - start)

        return keep

    def _check(self, request: InferRequest) -> tuple[dict[str, Array], int, Any, bool]:
        """Return the inputs as the session takes them, rows, batch key, and whether they were real values."""
        given, known = request.inputs, self._inputs
        if given.keys() != known.keys():
            self._wrong_names(given)
        inputs, real = given, False
        for name, wanted in known.items():
            array = given[name]
            if array.shape != wanted.shape and not fits(array.shape, wanted.shape):
                raise tensors.refuse(
                    f"input {name!r}: shape",
                    f"{list(array.shape)} does not fit the model's {list(wanted.shape)}",
                )
            if array.dtype is not wanted.dtype and array.dtype != wanted.dtype:
                if inputs is given:
                    inputs = dict(given)
                inputs[name] = _quantised(name, array, wanted)
                real = True
        if not self.runner.batches:
            return inputs, 1, None, real
        shapes = [array.shape for array in given.values()]
        rows = shapes[0][0]
        if any(shape[0] != rows for shape in shapes):
            raise tensors.refuse("inputs", f"have different batch sizes: {[s[0] for s in shapes]}")
        if rows == 0:
            return inputs, 1, None, real
        return inputs, rows, () if self._one_shape else tuple(shape[1:] for shape in shapes), real

    def _wrong_names(self, given: dict[str, Array]) -> NoReturn:
        wanted = list(self._inputs)
        missing = [name for name in wanted if name not in given]
        unknown = [name[:100] for name in given if name not in self._inputs]
        said = [f"{missing[0]!r} is missing"] if missing else []
        said += [f"{unknown[0]!r} is no input"] if unknown else []
        raise tensors.refuse("inputs", f"{', '.join(said)}; the model's are {wanted}")

    def _wanted(self, request: InferRequest) -> tuple[str, ...] | None:
        if not request.outputs:
            return None
        for output in request.outputs:
            if output.name not in self._outputs:
                raise tensors.refuse(
                    "outputs", f"{output.name[:100]!r} is no output; the model's are {list(self._outputs)}"
                )
        return tuple(output.name for output in request.outputs)

    def _finished(self, job: Job, result: Outputs | PitheadError, start: int, end: int) -> None:
        request, wanted, real, done, began = job.context
        statistics = self.statistics
        if isinstance(result, PitheadError):
            if result.code == "serve.overloaded":
                statistics.refused += 1
            else:
                statistics.failed(end - began, result.code)
            answer: InferResponse | PitheadError = result
        else:
            outputs = result if wanted is None else {name: result[name] for name in wanted}
            if real and self._quantised:
                outputs = {
                    name: dequantise(array, self._quantised[name]) if name in self._quantised else array
                    for name, array in outputs.items()
                }
            candidate = self.candidate
            answer = InferResponse(candidate.name, candidate.version, outputs, request.id)
            queued = job.queued
            now = time.monotonic_ns()
            statistics.succeeded(
                job.rows,
                start - queued if queued else 0,
                (queued or start) - began,
                end - start,
                now - end,
            )
        self.in_flight -= 1
        try:
            done(answer)
        finally:
            if self._retired is not None:
                self._drained()

    def _drained(self) -> None:
        if self._retired is not None and self.in_flight == 0:
            then, self._retired = self._retired, None
            self.runner.close()
            then(self)


class _Held:
    """A session that stays until it is released, also when another has taken its place."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def submit(self, request: InferRequest, done: Done) -> None:
        """See ``Held``."""
        if self._live.runner.lost:
            raise PitheadError("serve.model_lost", "a run of it hangs")
        self._live.submit(request, done)

    def release(self) -> None:
        """See ``Held``."""
        self._live.release()


def fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether ``shape`` is as wanted, where -1 wants anything."""
    if len(shape) != len(wanted):
        return False
    for a, b in zip(shape, wanted, strict=True):  # noqa: SIM110 - a generator costs more than the loop
        if b not in (-1, a):
            return False
    return True


def _quantised(name: str, array: Array, wanted: _Input) -> Array:
    """Return real values as the integers that the model takes; raises ``serve.bad_request``."""
    if wanted.spec.scale is None or array.dtype != REAL:
        also = "" if wanted.spec.scale is None else ", or real values as FP32"
        raise tensors.refuse(
            f"input {name!r}: datatype",
            f"{tensors.DATATYPE.get(array.dtype)}, the model takes {wanted.datatype}{also}",
        )
    if not np.isfinite(array).all():
        raise tensors.refuse(f"input {name!r}", "has NaN or infinity, which have no integer")
    return quantise(array, wanted.spec)
