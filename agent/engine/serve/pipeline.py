"""Run a pipeline: each step as soon as its tensors are there, with the arrays that the steps before it made.

An array that one model gives is the very one that the next one gets: steps
share a process, so nothing is encoded, sent or copied in between. (A step
that runs several requests as one batch puts their rows together, as it does
without a pipeline.)

A request keeps the models that were in service when it came, to its end: when
one of them is swapped meanwhile, no request sees the old one in one step and
the new one in another.
"""

import time
from collections.abc import Callable, Mapping
from typing import Final

from agent.core.serve_models import PipelineSpec as Spec
from agent.engine.serve import tensors
from agent.engine.serve.pipeline_plan import Plan, Planned
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.routing import Done, Held
from agent.engine.serve.served import fits
from agent.engine.serve.statistics import Statistics
from contract.errors import PitheadError
from inference.session import Array

VERSION: Final = "1"
"""A pipeline has no versions; clients want one."""

_REAL: Final = tensors.DTYPE["FP32"]


class Pipeline:
    """What a pipeline's name leads to."""

    def __init__(
        self,
        name: str,
        spec: Spec,
        holds: Callable[[Planned, InferRequest], Held],
        missing: "Callable[[Pipeline, InferRequest, Done], None]",
        timeout_s: float,
    ) -> None:
        """``holds`` returns what answers for a step now; ``missing`` deals with requests without a plan."""
        self.name, self.spec = name, spec
        self._holds, self._missing = holds, missing
        self.timeout_s = timeout_s
        self._timeout_ns = round(timeout_s * 1e9)
        self.plan: Plan | None = None
        self.statistics = Statistics()
        self.in_flight = 0
        self.last_used_ns = 0
        self.unloaded = False

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        """See ``Routed``."""
        return {} if self.plan is None else self.plan.labels

    @property
    def batches(self) -> bool:
        """See ``Routed``."""
        return self.plan is not None and self.plan.batches

    def hold(self, request: InferRequest) -> Held:  # noqa: ARG002 - of ``Routed``
        """Refuse: pipelines are made of models, which the plan has made sure of."""
        raise PitheadError("serve.unsupported", f"{self.name} is a pipeline itself")

    def submit(self, request: InferRequest, done: Done) -> None:
        """See ``Routed``."""
        plan = self.plan
        if plan is None:
            self._missing(self, request, done)
            return
        began = time.monotonic_ns()
        _check(plan, request)
        outputs = _wanted(plan, request)
        rows = len(request.inputs[plan.inputs[0].name]) if plan.batches else 1
        timeout = request.timeout_us * 1000 if request.timeout_us else self._timeout_ns
        held = self._hold_all(plan, request)
        self.in_flight += 1
        self.last_used_ns = began

        def finish(answer: dict[str, Array] | PitheadError) -> None:
            self.in_flight -= 1
            now = time.monotonic_ns()
            if isinstance(answer, PitheadError):
                if answer.code == "serve.overloaded":
                    self.statistics.refused += 1
                else:
                    self.statistics.failed(now - began, answer.code)
                done(answer)
                return
            self.statistics.ran(rows, now - began)
            self.statistics.succeeded(rows, 0, 0, now - began, 0)
            done(InferResponse(self.name, VERSION, {name: answer[name] for name in outputs}, request.id))

        _Run(plan, held, request, began + timeout, finish).start()

    def _hold_all(self, plan: Plan, request: InferRequest) -> list[Held]:
        """Return what answers for each step now: of all, or of none."""
        held: list[Held] = []
        try:
            for step in plan.steps:
                held.append(self._holds(step, request))  # noqa: PERF401 - what was held before an error counts
        except PitheadError:
            for each in held:
                each.release()
            raise
        return held


class _Run:
    """One request on its way through the steps."""

    __slots__ = ("_deadline", "_finish", "_held", "_left", "_over", "_plan", "_request", "_tensors", "_waits")

    def __init__(
        self,
        plan: Plan,
        held: list[Held],
        request: InferRequest,
        deadline: int,
        finish: Callable[[dict[str, Array] | PitheadError], None],
    ) -> None:
        self._plan, self._request = plan, request
        self._held: list[Held | None] = list(held)
        self._deadline, self._finish = deadline, finish
        self._tensors: dict[str, Array] = dict(request.inputs)
        self._waits = [step.waits for step in plan.steps]
        self._left = len(plan.steps)
        self._over = False

    def start(self) -> None:
        """Begin with the steps that need no other."""
        for at in self._plan.first:
            self._begin(at)

    def _begin(self, at: int) -> None:
        if self._over:
            return
        step, request, there = self._plan.steps[at], self._request, self._tensors
        held, self._held[at] = self._held[at], None
        assert held is not None
        left = (self._deadline - time.monotonic_ns()) // 1000
        if left <= 0:
            held.release()
            self._fail(step, PitheadError("serve.timeout", "it did not begin in time"))
            return
        asked = InferRequest(
            step.model,
            {name: there[tensor] for name, tensor in step.inputs},
            step.version,
            request.id,
            step.wanted,
            request.parameters,
            priority=request.priority,
            timeout_us=left,
        )
        try:
            held.submit(asked, lambda answer: self._ended(step, answer))
        except PitheadError as error:
            self._fail(step, error)
        finally:
            held.release()  # what was admitted keeps its session itself

    def _ended(self, step: Planned, answer: InferResponse | PitheadError) -> None:
        if self._over:
            return
        if isinstance(answer, PitheadError):
            self._fail(step, answer)
            return
        self._left -= 1
        ready: list[int] = []
        for name, tensor in step.outputs:
            self._tensors[tensor] = answer.outputs[name]
            for taker in self._plan.takers[tensor]:
                self._waits[taker] -= 1
                if self._waits[taker] == 0:
                    ready.append(taker)
        if self._left == 0:
            self._over = True
            self._finish(self._tensors)
            return
        for at in ready:
            self._begin(at)

    def _fail(self, step: Planned, error: PitheadError) -> None:
        if self._over:
            return
        self._over = True
        for held in self._held:
            if held is not None:
                held.release()
        said = f"{step.label}: {error.detail or error.spec.summary}"
        self._finish(PitheadError(error.code, said, **error.facts))


def _check(plan: Plan, request: InferRequest) -> None:
    """Raise ``serve.bad_request`` for what the first steps would refuse, in the pipeline's own names."""
    given = request.inputs
    names = [spec.name for spec in plan.inputs]
    for name in given:
        if name not in names:
            raise tensors.refuse("inputs", f"{name[:100]!r} is no input; the pipeline's are {names}")
    rows = None
    for spec in plan.inputs:
        array = given.get(spec.name)
        if array is None:
            raise tensors.refuse("inputs", f"{spec.name!r} is missing; the pipeline's are {names}")
        if not fits(array.shape, spec.shape):
            raise tensors.refuse(
                f"input {spec.name!r}: shape",
                f"{list(array.shape)} does not fit the pipeline's {list(spec.shape)}",
            )
        if array.dtype != tensors.DTYPE[spec.datatype] and not (
            array.dtype == _REAL and spec.name in plan.reals
        ):
            also = ", or real values as FP32" if spec.name in plan.reals else ""
            raise tensors.refuse(
                f"input {spec.name!r}: datatype",
                f"{tensors.DATATYPE.get(array.dtype)}, the pipeline takes {spec.datatype}{also}",
            )
        if plan.batches:
            if rows is not None and len(array) != rows:
                raise tensors.refuse("inputs", f"have different batch sizes: {rows} and {len(array)}")
            rows = len(array)


def _wanted(plan: Plan, request: InferRequest) -> tuple[str, ...]:
    names = tuple(spec.name for spec in plan.outputs)
    for output in request.outputs:
        if output.name not in names:
            raise tensors.refuse(
                "outputs", f"{output.name[:100]!r} is no output; the pipeline's are {list(names)}"
            )
    return tuple(output.name for output in request.outputs) or names
