"""A model that is ready to run, the same for every runtime."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.accelerators import NO_LIMITS, Accelerator, Resources
from inference.arithmetic import DTYPES, quantise
from inference.reports import Placement

Array = NDArray[Any]

TENSORS: Final[dict[str, DTypeLike]] = {**DTYPES, "BYTES": np.object_}
"""Numpy's name of each datatype of the Open Inference Protocol; texts are ``bytes`` objects."""
_NO_MEMORY: Final = ("bad_alloc", "Failed to allocate memory", "Cannot allocate memory")
"""As C++ (and so most of a runtime), ONNX Runtime's arena, and the system say it."""
REALS: Final = frozenset(np.dtype(d) for d in (np.float16, np.float32, np.float64))


class Session(Protocol):
    """An open model.

    Not safe for several threads at once: a lane owns its session.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """As the runtime sees them: -1 where a dimension is dynamic; scales where the format carries them."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """As ``inputs``."""
        ...

    @property
    def accelerator(self) -> str:
        """What really runs the model, which may be less than what was asked for."""
        ...

    @property
    def runtime(self) -> str:
        """Name and version of the runtime."""
        ...

    @property
    def placement(self) -> Placement:
        """Which nodes run where."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, in the model's own datatypes; they belong to the caller.

        A quantised input is fed as its integers, or as real values, which are
        quantised with the model's own scale. Quantised outputs are integers
        (``inference.reals`` shows them as real values). Texts are ``bytes``
        on the way out, ``bytes`` or ``str`` on the way in.
        Raises ``inference.bad_input`` for a wrong name, datatype or shape,
        ``inference.run_failed`` when the runtime gives up.
        """
        ...

    def reset(self) -> None:
        """Forget what earlier runs left in the model's variables; nothing where it has none."""
        ...

    def close(self) -> None:
        """Free the model. It may take long (hundreds of ms): call it where nobody waits."""
        ...


class Accompanied:
    """A session, and the graph that feeds it: both end together."""

    def __init__(self, session: Session, graph: Session) -> None:
        self._session, self.graph = session, graph
        self.run, self.reset = session.run, session.reset

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
        """See ``Session``; the graph runs on the CPU."""
        return self._session.accelerator

    @property
    def runtime(self) -> str:
        """See ``Session``."""
        return self._session.runtime

    @property
    def placement(self) -> Placement:
        """See ``Session``."""
        return self._session.placement

    def close(self) -> None:
        """See ``Session``."""
        self._session.close()
        self.graph.close()


class Opener(Protocol):
    """What makes a session of a model file's bytes."""

    def __call__(
        self,
        content: bytes,
        accelerator: str | Accelerator = "cpu",
        threads: int = 1,
        resources: Resources = NO_LIMITS,
    ) -> Session:
        """Open a model; raises ``inference.accelerator_missing`` and ``inference.load_failed``."""
        ...


def failed(error: BaseException, otherwise: str) -> PitheadError:
    """Return what a runtime raised as ours: ``inference.out_of_memory``, else with the code ``otherwise``.

    Runtimes say it in C++'s word or in their own.
    """
    words = first_line(error)
    if isinstance(error, MemoryError) or any(word in words for word in _NO_MEMORY):
        return PitheadError("inference.out_of_memory", words)
    return PitheadError(otherwise, words)


class InputGate:
    """Lets inputs through that fit a model; cheap where they look like the ones before."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._last: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []
        self._texts = [spec.name for spec in specs if spec.datatype == "BYTES"]
        self.converts: tuple[str, ...] = ()
        """Inputs that the runtime cannot take as they were given last: reals to be quantised, and texts."""

    def admit(self, inputs: Mapping[str, Array]) -> bool:
        """Return whether all shapes are those of the call before.

        Raises ``inference.bad_input``, naming tensor, wanted and given, for what does not fit.
        """
        if self._last and len(inputs) == len(self._last):
            for name, dtype, shape in self._last:
                array = inputs.get(name)
                if array is None or array.dtype is not dtype or array.shape != shape:
                    break
            else:
                return True
        reals = self._check(inputs)
        self._last = [(name, array.dtype, array.shape) for name, array in inputs.items()]
        self.converts = (*reals, *self._texts)
        return False

    def converted(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return ``inputs`` as the runtime takes them."""
        changed = dict(inputs)
        for name in self.converts:
            spec, array = self._specs[name], inputs[name]
            if spec.datatype == "BYTES":
                changed[name] = _as_text(name, array)
            else:
                # An infinity is saturated; a NaN becomes what the processor likes, and looks like a number.
                if np.isnan(array).any():
                    raise PitheadError(
                        "inference.bad_input",
                        f"input {name!r} is quantised and was given NaN, for which it has no integer",
                        tensor=name,
                    )
                changed[name] = quantise(array.astype(np.float32, copy=False), spec)
        return changed

    def _check(self, inputs: Mapping[str, Array]) -> list[str]:
        """Return the inputs that are reals where the model takes integers."""
        if inputs.keys() != self._specs.keys():
            raise PitheadError(
                "inference.bad_input",
                f"the model's inputs are {list(self._specs)}, given were {sorted(inputs)}",
            )
        reals = []
        for name, spec in self._specs.items():
            array = inputs[name]
            if array.dtype != TENSORS.get(spec.datatype) and not _is_text(spec, array):
                if spec.scale is None or array.dtype not in REALS:
                    raise PitheadError(
                        "inference.bad_input",
                        f"input {name!r} must be {spec.datatype}, given was {array.dtype}",
                        tensor=name,
                    )
                reals.append(name)
            if not fits(array.shape, spec.shape):
                raise PitheadError(
                    "inference.bad_input",
                    f"input {name!r} must have the shape {list(spec.shape)}, given was {list(array.shape)}",
                    tensor=name,
                )
        return reals


def _is_text(spec: TensorSpec, array: Array) -> bool:
    return spec.datatype == "BYTES" and array.dtype.kind in "SU"


def _as_text(name: str, array: Array) -> Array:
    """Return an array of ``str``: the runtime reads texts as UTF-8."""
    texts = np.empty(array.shape, np.object_)
    try:
        for at, value in np.ndenumerate(array):
            texts[at] = value.decode() if isinstance(value, bytes) else value
            if not isinstance(texts[at], str):
                raise PitheadError(
                    "inference.bad_input", f"input {name!r}: {type(value).__name__} is no text", tensor=name
                )
    except UnicodeDecodeError as error:
        raise PitheadError("inference.bad_input", f"input {name!r}: {error}", tensor=name) from error
    return texts


def as_bytes(array: Array) -> Array:
    """Return the texts of a runtime's output as ``bytes`` objects."""
    texts = np.empty(array.shape, np.object_)
    for at, value in np.ndenumerate(array):
        texts[at] = value if isinstance(value, bytes) else str(value).encode()
    return texts


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return whether ``shape`` is ``wanted``, where -1 takes any length."""
    return len(shape) == len(wanted) and all(b in (-1, a) for a, b in zip(shape, wanted, strict=True))


def datatype_of(dtype: Any) -> str | None:
    """Return the Open Inference Protocol's name of a numpy datatype, or None."""
    wanted = np.dtype(dtype)
    return next((name for name, known in DTYPES.items() if np.dtype(known) == wanted), None)


def counted(nodes: Iterable[tuple[str, str]]) -> Placement:
    """Return the placement of (accelerator, operator) pairs."""
    where: dict[str, Counter[str]] = {}
    for accelerator, operator in nodes:
        where.setdefault(accelerator, Counter())[operator] += 1
    return Placement({name: dict(sorted(found.items())) for name, found in sorted(where.items())})


def first_line(error: BaseException) -> str:
    """Return what a runtime's exception says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


def missing(accelerator: Accelerator, why: str) -> PitheadError:
    """Return ``inference.accelerator_missing``."""
    return PitheadError(
        "inference.accelerator_missing", f"{accelerator.name!r} {why}", accelerator=accelerator.name
    )
