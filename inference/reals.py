"""A session whose quantised tensors are real values, in and out."""

from collections.abc import Mapping, Sequence

import msgspec

from contract.manifest import TensorSpec
from inference.arithmetic import dequantise
from inference.reports import Placement
from inference.session import Array, InputGate, Session


class RealSession:
    """Shows another session's quantised tensors as FP32; see ``Session``."""

    def __init__(self, session: Session, known: Sequence[TensorSpec] = ()) -> None:
        """``known`` has the scales that a file format does not carry, as a manifest does."""
        self._session = session
        inside = [_completed(t, known) for t in session.inputs]
        self._scaled = {t.name: t for t in (_completed(t, known) for t in session.outputs) if _quantised(t)}
        self._gate = InputGate(inside)
        self.inputs = tuple(_real(t) for t in inside)
        self.outputs = tuple(_real(_completed(t, known)) for t in session.outputs)
        self.accelerator = session.accelerator
        self.runtime = session.runtime

    @property
    def placement(self) -> Placement:
        """See ``Session``."""
        return self._session.placement

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Session``."""
        self._gate.admit(inputs)
        answer = self._session.run(self._gate.converted(inputs) if self._gate.converts else inputs)
        for name, tensor in self._scaled.items():
            answer[name] = dequantise(answer[name], tensor)
        return answer

    def reset(self) -> None:
        """See ``Session``."""
        self._session.reset()

    def close(self) -> None:
        """See ``Session``."""
        self._session.close()


def _quantised(tensor: TensorSpec) -> bool:
    return tensor.scale is not None and "INT" in tensor.datatype


def _completed(tensor: TensorSpec, known: Sequence[TensorSpec]) -> TensorSpec:
    if tensor.scale is not None:
        return tensor
    return next((k for k in known if k.name == tensor.name and k.datatype == tensor.datatype), tensor)


def _real(tensor: TensorSpec) -> TensorSpec:
    if not _quantised(tensor):
        return tensor
    return msgspec.structs.replace(tensor, datatype="FP32", scale=None, zero_point=None)
