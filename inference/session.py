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


def check_inputs(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> None:
    """Raise ``inference.bad_input``, naming tensor, wanted and given, unless ``inputs`` fit ``specs``."""
    if len(inputs) != len(specs) or any(spec.name not in inputs for spec in specs):
        wanted = [spec.name for spec in specs]
        raise PitheadError(
            "inference.bad_input", f"the model's inputs are {wanted}, given were {sorted(inputs)}"
        )
    for spec in specs:
        array = inputs[spec.name]
        if array.dtype != DTYPES.get(spec.datatype):
            raise PitheadError(
                "inference.bad_input",
                f"input {spec.name!r} must be {spec.datatype}, given was {array.dtype}",
                tensor=spec.name,
            )
        if not fits(array.shape, spec.shape):
            raise PitheadError(
                "inference.bad_input",
                f"input {spec.name!r} must have the shape {list(spec.shape)}, given was {list(array.shape)}",
                tensor=spec.name,
            )


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return whether ``shape`` is ``wanted``, where -1 takes any length."""
    return len(shape) == len(wanted) and all(b in (-1, a) for a, b in zip(shape, wanted, strict=True))


def datatype_of(dtype: Any) -> str | None:
    """Return the Open Inference Protocol's name of a numpy datatype, or None."""
    wanted = np.dtype(dtype)
    return next((name for name, known in DTYPES.items() if np.dtype(known) == wanted), None)
