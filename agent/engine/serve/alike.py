"""Whether two versions of a model can answer the same requests. Pure.

A request that names no version fits what most of its kind have fitted before;
a version with other inputs, or other outputs, would refuse it or answer
something else. Such a one is not asked beside the others.
"""

from collections.abc import Sequence

from msgspec import Struct

from contract.manifest import TensorSpec


class Face(Struct, frozen=True):
    """What a version takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def apart(one: Face, other: Face) -> str:
    """Return what a request or an answer of ``one`` would lack at ``other``; empty where they are alike.

    A quantised tensor is as good as one of real values: both take and give FP32.
    """
    return _apart("input", one.inputs, other.inputs) or _apart("output", one.outputs, other.outputs)


def _apart(kind: str, ours: Sequence[TensorSpec], theirs: Sequence[TensorSpec]) -> str:
    known = {spec.name: spec for spec in theirs}
    if known.keys() != {spec.name for spec in ours}:
        return f"{kind}s {[spec.name for spec in ours]} and {list(known)}"
    for spec in ours:
        other = known[spec.name]
        if spec.datatype != other.datatype and not (_real(spec) and _real(other)):
            return f"{kind} {spec.name!r}: {spec.datatype} and {other.datatype}"
        if len(spec.shape) != len(other.shape) or any(
            a != b and -1 not in (a, b) for a, b in zip(spec.shape, other.shape, strict=True)
        ):
            return f"{kind} {spec.name!r}: shapes {list(spec.shape)} and {list(other.shape)}"
    return ""


def _real(spec: TensorSpec) -> bool:
    return spec.datatype == "FP32" or spec.scale is not None
