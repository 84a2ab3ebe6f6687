"""How windows become calls of a model, whatever batch its file was made for."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.arithmetic import dequantise, quantise
from inference.session import TENSORS, Session

BATCH: Final = 64
"""Windows in one run of a model that takes any number."""

Rows = Mapping[str, NDArray[Any]]
"""By input tensor: windows on the first axis, real values, without the model's own batch axis."""


def calls(inputs: tuple[TensorSpec, ...], rows: Rows, most: int = BATCH) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the calls that feed all ``rows``, ``most`` windows at once where every input takes any number.

    Raises ``inference.bad_input`` for rows that do not fit.
    """
    count = common_length(inputs, rows)
    together = all(spec.shape and spec.shape[0] == -1 for spec in inputs)
    step = most if together else 1
    for start in range(0, count, step):
        yield {s.name: _fed(s, rows[s.name][start : start + step], together=together) for s in inputs}


def common_length(inputs: tuple[TensorSpec, ...], rows: Rows) -> int:
    """Return how many windows there are; raises ``inference.bad_input`` where tensors disagree."""
    if rows.keys() != {spec.name for spec in inputs}:
        raise PitheadError(
            "inference.bad_input",
            f"the model's inputs are {[s.name for s in inputs]}, the data has {sorted(rows)}",
        )
    lengths = {len(array) for array in rows.values()}
    if len(lengths) != 1 or not (count := lengths.pop()):
        raise PitheadError(
            "inference.bad_input", "the data has no rows, or a different number for each input"
        )
    return count


def _fed(spec: TensorSpec, rows: NDArray[Any], *, together: bool) -> NDArray[Any]:
    shape: tuple[int, ...] = (len(rows), *spec.shape[1:]) if together else spec.shape
    row = rows.shape[1:]
    if not together and shape and len(shape) == len(row) + 1:
        shape = (1, *shape[1:])
    if -1 in shape and len(shape) == len(row) + 1:
        # Open dimensions other than the batch are what the data says.
        shape = (shape[0], *(b if a == -1 else a for a, b in zip(shape[1:], row, strict=True)))
    if -1 in shape or math.prod(shape) != rows.size:
        raise PitheadError(
            "inference.bad_input",
            f"input {spec.name!r} has the shape {list(spec.shape)}, a row of the data {list(row)}",
            tensor=spec.name,
        )
    values = rows.reshape(shape)
    if spec.scale is not None and values.dtype.kind == "f":
        return quantise(values.astype(np.float32, copy=False), spec)
    return np.ascontiguousarray(values.astype(TENSORS[spec.datatype], copy=False))


def answers(session: Session, rows: Rows) -> dict[str, NDArray[Any]]:
    """Return by output tensor what a model gives for all windows: real values, windows on the first axis."""
    session.reset()
    count = common_length(session.inputs, rows)
    parts: dict[str, list[NDArray[Any]]] = {spec.name: [] for spec in session.outputs}
    for feed in calls(session.inputs, rows):
        found = session.run(feed)
        for spec in session.outputs:
            if spec.datatype != "BYTES":
                parts[spec.name].append(dequantise(found[spec.name], spec).reshape(-1))
    return {name: np.concatenate(some).reshape(count, -1) for name, some in parts.items() if some}
