"""ONNX Runtime."""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnxruntime

from contract.errors import PitheadError
from contract.manifest import Datatype, TensorSpec
from inference.session import Array, InputGate

PROVIDERS: Final[Mapping[str, str]] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "acl": "ACLExecutionProvider",
    "qnn": "QNNExecutionProvider",
}
"""Our name of each accelerator, and the execution provider that drives it."""

_DATATYPES: Final[Mapping[str, Datatype]] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
_SILENT: Final = 4


def warm_up() -> None:
    """Nothing: onnxruntime looks at the machine when it is imported."""


class OnnxSession:
    """A model in ONNX Runtime."""

    def __init__(self, content: bytes, accelerator: str, threads: int) -> None:
        provider = PROVIDERS.get(accelerator)
        if provider is None or provider not in onnxruntime.get_available_providers():
            raise PitheadError(
                "inference.accelerator_missing",
                f"onnxruntime {onnxruntime.__version__} has no {accelerator!r} here",
                accelerator=accelerator,
            )
        # Its exceptions share no base; they stop here.
        try:
            self._session = onnxruntime.InferenceSession(
                content, sess_options=_options(threads), providers=[provider]
            )
        except Exception as error:
            raise PitheadError("inference.load_failed", _first_line(error)) from error
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        used = self._session.get_providers()[0]
        self.accelerator = next((name for name, p in PROVIDERS.items() if p == used), used)
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self._gate = InputGate(self.inputs)
        self._names = [spec.name for spec in self.outputs]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Session``."""
        self._gate.admit(inputs)
        try:
            outputs = self._session.run(self._names, inputs)
        except Exception as error:
            raise PitheadError("inference.run_failed", _first_line(error)) from error
        return dict(zip(self._names, map(np.asarray, outputs), strict=True))

    def close(self) -> None:
        """See ``Session``."""
        del self._session


def _options(threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    # The arena keeps the largest batch's memory for ever; a device has better uses for it.
    options.enable_cpu_mem_arena = False
    # Never guess: what was screened as ONNX must not be read as something else.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _spec(node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise PitheadError("inference.load_failed", f"tensor {node.name!r} is of the type {node.type}")
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape)
    return TensorSpec(node.name, datatype, shape)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
