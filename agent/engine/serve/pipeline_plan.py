"""Check a pipeline against the models that it is made of, and say what runs after what.

A pipeline is a graph: steps are served models, edges are tensors with names of
the pipeline's own (the sense of Triton's ensemble scheduling). All that can be
known before the first request is checked here: every name, type and shape,
that every tensor is made once and used, and that nothing waits for itself.
Pure: models come in as what they take and give.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from agent.core.serve_models import PipelineSpec as Spec
from agent.core.serve_models import Step
from agent.engine.serve.requests import RequestedOutput
from contract.errors import PitheadError
from contract.manifest import TensorSpec


class Interface(NamedTuple):
    """What a model takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batches: bool = False
    labels: Mapping[str, tuple[str, ...]] = {}


class Planned(Struct, frozen=True):
    """A step that is known to fit."""

    label: str
    model: str
    version: str
    inputs: tuple[tuple[str, str], ...]
    """(the model's input, the pipeline's tensor)."""
    outputs: tuple[tuple[str, str], ...]
    wanted: tuple[RequestedOutput, ...]
    """The outputs that are asked of the model."""
    waits: int
    """Its inputs that other steps make."""


class Plan(Struct, frozen=True):
    """A pipeline that is known to fit together."""

    inputs: tuple[TensorSpec, ...]
    """Types and shapes are those of the models that take them."""
    outputs: tuple[TensorSpec, ...]
    steps: tuple[Planned, ...]
    first: tuple[int, ...]
    """Steps that need no other."""
    takers: Mapping[str, tuple[int, ...]]
    """Which steps take a tensor that another made; twice where it is bound twice."""
    reals: frozenset[str]
    """Inputs that are also taken as real values, since only quantised inputs take them."""
    batches: bool
    labels: Mapping[str, tuple[str, ...]]


class _Bound(NamedTuple):
    """A model's tensor in its place."""

    step: int
    spec: TensorSpec


def plan(name: str, spec: Spec, known: Mapping[tuple[str, str], Interface]) -> Plan:
    """Return how the pipeline runs on the models ``known``, by name and version.

    Raises ``config.invalid``, which names the pipeline, the step and the tensor.
    """
    return _Planner(name, spec, known).plan()


class _Planner:
    def __init__(self, name: str, spec: Spec, known: Mapping[tuple[str, str], Interface]) -> None:
        self._name, self._spec = name, spec
        self._labels = [f"step {i + 1} ({step.model})" for i, step in enumerate(spec.steps)]
        self._models = [self._model(i, step, known) for i, step in enumerate(spec.steps)]
        self._made: dict[str, _Bound] = {}
        self._taken: dict[str, list[_Bound]] = {}
        self._inputs: list[dict[str, str]] = []
        self._outputs: list[dict[str, str]] = []

    def plan(self) -> Plan:
        for tensors, what in ((self._spec.inputs, "inputs"), (self._spec.outputs, "outputs")):
            if len(set(tensors)) != len(tensors):
                raise self._wrong(what, f"{_twice(tensors)!r} stands twice")
        for i, step in enumerate(self._spec.steps):
            self._bind(i, step)
        self._check_names()
        order = self._order()
        flow = self._types(order)
        batches = all(model.batches for model in self._models)
        labels = {}
        for tensor in self._spec.outputs:
            at, made = self._made[tensor]
            if made.name in self._models[at].labels:
                labels[tensor] = self._models[at].labels[made.name]
        given = self._spec.inputs
        return Plan(
            inputs=tuple(replace(flow[t], name=t) for t in given),
            outputs=tuple(replace(flow[t], name=t) for t in self._spec.outputs),
            steps=tuple(self._planned(i) for i in range(len(self._models))),
            first=tuple(i for i in order if not self._waits(i)),
            takers={t: tuple(b.step for b in self._taken.get(t, ())) for t in self._made},
            reals=frozenset(t for t in given if all(b.spec.scale is not None for b in self._taken[t])),
            batches=batches,
            labels=labels,
        )

    def _wrong(self, where: str, why: str) -> PitheadError:
        return PitheadError("config.invalid", f"pipeline {self._name}: {where}: {why}")

    def _model(self, at: int, step: Step, known: Mapping[tuple[str, str], Interface]) -> Interface:
        found = known.get((step.model, step.version))
        if found is None:
            version = f" version {step.version!r} of" if step.version else ""
            raise self._wrong(self._labels[at], f"no{version} model {step.model!r} is served")
        return found

    # ---- names

    def _bind(self, at: int, step: Step) -> None:
        model, label = self._models[at], self._labels[at]
        inputs = self._named(f"{label}: inputs", step.inputs, model.inputs, "input")
        inputs = {spec.name: inputs.get(spec.name, spec.name) for spec in model.inputs}
        if step.outputs is None:
            outputs = {spec.name: spec.name for spec in model.outputs}
        else:
            outputs = self._named(f"{label}: outputs", step.outputs, model.outputs, "output")
        for spec in model.inputs:
            self._taken.setdefault(inputs[spec.name], []).append(_Bound(at, spec))
        for spec in model.outputs:
            tensor = outputs.get(spec.name)
            if tensor is None:
                continue
            if tensor in self._made:
                other = self._labels[self._made[tensor].step]
                raise self._wrong(label, f"makes tensor {tensor!r}, and so does {other}")
            if tensor in self._spec.inputs:
                raise self._wrong(label, f"makes tensor {tensor!r}, which is an input of the pipeline")
            self._made[tensor] = _Bound(at, spec)
        self._inputs.append(inputs)
        self._outputs.append(outputs)

    def _named(
        self, where: str, given: Mapping[str, str], specs: Iterable[TensorSpec], kind: str
    ) -> dict[str, str]:
        names = [spec.name for spec in specs]
        for name in given:
            if name not in names:
                raise self._wrong(where, f"{name!r} is no {kind} of the model; it has {names}")
        return dict(given)

    def _check_names(self) -> None:
        there = [*self._spec.inputs, *self._made]
        for tensor, bounds in self._taken.items():
            if tensor not in there:
                step, spec = bounds[0]
                raise self._wrong(
                    self._labels[step],
                    f"input {spec.name!r} takes tensor {tensor!r}, which nothing makes; there are {there}",
                )
        for tensor in self._spec.inputs:
            if tensor not in self._taken:
                raise self._wrong("inputs", f"no step takes tensor {tensor!r}")
        for tensor in self._spec.outputs:
            if tensor not in self._made:
                raise self._wrong("outputs", f"no step makes tensor {tensor!r}; they make {list(self._made)}")
        for at, label in enumerate(self._labels):
            if not any(t in self._taken or t in self._spec.outputs for t in self._outputs[at].values()):
                raise self._wrong(label, f"nothing takes what it makes: {list(self._outputs[at].values())}")

    # ---- order

    def _order(self) -> list[int]:
        """Return the steps so that each comes after those that it needs (Kahn's algorithm)."""
        left = {i: self._waits(i) for i in range(len(self._models))}
        order: list[int] = []
        ready = [i for i, n in left.items() if n == 0]
        while ready:
            at = ready.pop(0)
            order.append(at)
            del left[at]
            for tensor in self._outputs[at].values():
                for taker in self._taken.get(tensor, ()):
                    left[taker.step] -= 1
                    if left[taker.step] == 0:
                        ready.append(taker.step)
        if left:
            raise self._cycle(set(left))
        return order

    def _cycle(self, stuck: set[int]) -> PitheadError:
        """Follow what is waited for until a step comes again."""
        path: list[tuple[int, str]] = []
        at = min(stuck)
        while at not in [step for step, _ in path]:
            tensor = next(
                t for t in self._inputs[at].values() if t in self._made and self._made[t].step in stuck
            )
            path.append((at, tensor))
            at = self._made[tensor].step
        path = path[[step for step, _ in path].index(at) :]
        words = ", ".join(f"{self._labels[step]} needs {tensor!r}" for step, tensor in reversed(path))
        return self._wrong(self._labels[path[0][0]], f"waits for itself: {words}")

    def _waits(self, at: int) -> int:
        return sum(tensor in self._made for tensor in self._inputs[at].values())

    # ---- types

    def _types(self, order: Sequence[int]) -> dict[str, TensorSpec]:
        """Return what flows under each name."""
        flow = {tensor: self._of_input(tensor) for tensor in self._spec.inputs}
        for at in order:
            real = False
            for spec in self._models[at].inputs:
                tensor = self._inputs[at][spec.name]
                real = self._check_type(at, spec, tensor, flow[tensor]) or real
                if tensor in self._made:
                    self._check_shape(at, spec, tensor, flow[tensor])
            for spec in self._models[at].outputs:
                name = self._outputs[at].get(spec.name)
                if name is not None:
                    flow[name] = _as_real(spec) if real else spec
        return flow

    def _of_input(self, tensor: str) -> TensorSpec:
        """Return what a request must bring for all that take it."""
        bounds = self._taken[tensor]
        found = bounds[0].spec
        for bound in bounds[1:]:
            spec = bound.spec
            if not _alike(found, spec):
                # Real values suit any quantised input; which do not, is found later.
                found = _as_real(found if found.scale is not None else spec)
                if found.datatype != "FP32":
                    found = bounds[0].spec
            shape = _both(found.shape, spec.shape)
            if shape is None:
                raise self._wrong(
                    self._labels[bound.step],
                    f"input {spec.name!r}: shape {list(spec.shape)} does not fit tensor {tensor!r}, "
                    f"{list(found.shape)} for {self._labels[bounds[0].step]}",
                )
            found = replace(found, shape=shape)
        return found

    def _check_type(self, at: int, spec: TensorSpec, tensor: str, flows: TensorSpec) -> bool:
        """Return whether the model gets real values for a quantised input."""
        if _alike(flows, spec):
            return False
        if spec.scale is not None and flows.datatype == "FP32":
            return True
        have, want = str(flows.datatype), str(spec.datatype)
        if have == want:
            have = f"{have} (scale {flows.scale}, zero point {flows.zero_point})"
            want = f"{want} (scale {spec.scale}, zero point {spec.zero_point})"
        raise self._wrong(
            self._labels[at],
            f"input {spec.name!r} takes {want}, tensor {tensor!r}{self._maker(tensor)} is {have}",
        )

    def _check_shape(self, at: int, spec: TensorSpec, tensor: str, flows: TensorSpec) -> None:
        if _both(flows.shape, spec.shape) is None:
            raise self._wrong(
                self._labels[at],
                f"input {spec.name!r}: shape {list(spec.shape)} does not fit tensor "
                f"{tensor!r}{self._maker(tensor)}, {list(flows.shape)}",
            )

    def _maker(self, tensor: str) -> str:
        bound = self._made.get(tensor)
        return "" if bound is None else f" (output {bound.spec.name!r} of {self._labels[bound.step]})"

    def _planned(self, at: int) -> Planned:
        step = self._spec.steps[at]
        used = {
            name: t for name, t in self._outputs[at].items() if t in self._taken or t in self._spec.outputs
        }
        return Planned(
            label=self._labels[at],
            model=step.model,
            version=step.version,
            inputs=tuple(self._inputs[at].items()),
            outputs=tuple(used.items()),
            wanted=tuple(map(RequestedOutput, used)),
            waits=self._waits(at),
        )


def _alike(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether values of one mean the same in the other; integers whose scale is unknown are integers."""
    if a.datatype != b.datatype:
        return False
    scaled = a.scale is not None and b.scale is not None
    return not scaled or (a.scale, a.zero_point or 0) == (b.scale, b.zero_point or 0)


def _as_real(spec: TensorSpec) -> TensorSpec:
    if spec.scale is None:
        return spec
    return TensorSpec(spec.name, "FP32", spec.shape)


def _both(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape that is both, or None."""
    if len(a) != len(b):
        return None
    if any(x != y and -1 not in (x, y) for x, y in zip(a, b, strict=True)):
        return None
    return tuple(max(x, y) for x, y in zip(a, b, strict=True))


def _twice(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])
