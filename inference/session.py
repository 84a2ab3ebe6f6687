"""A model that is ready to run, the same for every runtime."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.arithmetic import DTYPES

Array = NDArray[Any]


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

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs by name, in the model's own datatypes; they belong to the caller.

        Quantised tensors are integers here (``inference.arithmetic`` converts).
        Raises ``inference.bad_input`` for a wrong name, datatype or shape,
        ``inference.run_failed`` when the runtime gives up.
        """
        ...

    def close(self) -> None:
        """Free the model. It may take long (hundreds of ms): call it where nobody waits."""
        ...


class InputGate:
    """Lets inputs through that fit a model; cheap where they look like the ones before."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._last: list[tuple[str, np.dtype[Any], tuple[int, ...]]] = []

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
        self._check(inputs)
        self._last = [(name, array.dtype, array.shape) for name, array in inputs.items()]
        return False

    def _check(self, inputs: Mapping[str, Array]) -> None:
        if inputs.keys() != self._specs.keys():
            raise PitheadError(
                "inference.bad_input",
                f"the model's inputs are {list(self._specs)}, given were {sorted(inputs)}",
            )
        for name, spec in self._specs.items():
            array = inputs[name]
            if array.dtype != DTYPES.get(spec.datatype):
                raise PitheadError(
                    "inference.bad_input",
                    f"input {name!r} must be {spec.datatype}, given was {array.dtype}",
                    tensor=name,
                )
            if not fits(array.shape, spec.shape):
                raise PitheadError(
                    "inference.bad_input",
                    f"input {name!r} must have the shape {list(spec.shape)}, given was {list(array.shape)}",
                    tensor=name,
                )


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return whether ``shape`` is ``wanted``, where -1 takes any length."""
    return len(shape) == len(wanted) and all(b in (-1, a) for a, b in zip(shape, wanted, strict=True))


def datatype_of(dtype: Any) -> str | None:
    """Return the Open Inference Protocol's name of a numpy datatype, or None."""
    wanted = np.dtype(dtype)
    return next((name for name, known in DTYPES.items() if np.dtype(known) == wanted), None)
