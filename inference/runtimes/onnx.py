"""ONNX Runtime."""

import base64
import os
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import onnxruntime

from contract.errors import PitheadError
from contract.manifest import Datatype, TensorSpec
from inference.accelerators import NO_LIMITS, ONNX, Accelerator, Resources, find
from inference.reports import Placement
from inference.session import Array, InputGate, as_bytes, counted, failed, first_line, missing

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
    "tensor(string)": "BYTES",
}
_SILENT: Final = 4
_LARGE: Final = 2 * 1024 * 1024
_CPU: Final = "CPUExecutionProvider"
_SMALLEST: Final = b"c-rIOurlW2;bN>1VyskR2};c=6=F<};s*(EadB`k3bAl8aWEzU1uBsRoLIOR1b6`jng;C"
"""y = Relu(x), zlib in base 85."""
_MB: Final = 1024 * 1024

_arena_lock: Final = threading.Lock()
_arena_mb: list[int] = []
"""The limit of the arena that all sessions of this process share, once it is there: it cannot be changed."""


def warm_up(accelerator: Accelerator = ONNX[-1]) -> None:
    """Load what an execution provider loads with its first model, before a sandbox closes."""
    if accelerator.provider != _CPU:
        # Kept: with its last session a provider may let go of what it has loaded.
        _warm.append(OnnxSession(zlib.decompress(base64.b85decode(_SMALLEST)), accelerator))


_warm: "Final[list[OnnxSession]]" = []


class OnnxSession:
    """A model in ONNX Runtime."""

    def __init__(
        self,
        content: bytes,
        accelerator: str | Accelerator = "cpu",
        threads: int = 1,
        resources: Resources = NO_LIMITS,
    ) -> None:
        wanted = find("onnx", accelerator) if isinstance(accelerator, str) else accelerator
        options = _options(threads, resources)
        providers = _providers(wanted, options)
        # Its exceptions share no base; they stop here. What its own Python part would do instead of
        # raising, another session on the CPU, nobody asked for.
        try:
            with _handed_over(content, wanted) as source:
                self._session = onnxruntime.InferenceSession(
                    source, sess_options=options, enable_fallback=0, **providers
                )
        except Exception as error:
            raise failed(error, "inference.load_failed") from error
        if wanted.provider not in self._session.get_providers():
            raise missing(wanted, f"did not start in onnxruntime {onnxruntime.__version__}: see its log")
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self._wanted = wanted
        self.accelerator = wanted.name
        if wanted.provider != _CPU and not self.placement.nodes_on(wanted.name):
            self.accelerator = "cpu"
        self.inputs = tuple(_spec(node) for node in self._session.get_inputs())
        self.outputs = tuple(_spec(node) for node in self._session.get_outputs())
        self._gate = InputGate(self.inputs)
        self._names = [spec.name for spec in self.outputs]
        self._texts = [spec.name for spec in self.outputs if spec.datatype == "BYTES"]

    @property
    def placement(self) -> Placement:
        """See ``Session``; as the graph was when it was divided, before the last optimisations."""
        names = {a.provider: a.name for a in ONNX}
        names[self._wanted.provider] = self._wanted.name
        return counted(
            (names.get(part.ep_name, part.ep_name), node.op_type)
            for part in self._session.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        )

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Session``."""
        gate = self._gate
        gate.admit(inputs)
        if gate.converts:
            inputs = gate.converted(inputs)
        try:
            outputs = self._session.run(self._names, inputs)
        except Exception as error:
            raise failed(error, "inference.run_failed") from error
        answer = dict(zip(self._names, map(np.asarray, outputs), strict=True))
        for name in self._texts:
            answer[name] = as_bytes(answer[name])
        return answer

    def reset(self) -> None:
        """See ``Session``. An ONNX model keeps nothing: its state goes in and out as tensors."""

    def close(self) -> None:
        """See ``Session``."""
        del self._session


@contextmanager
def _handed_over(content: bytes, wanted: Accelerator) -> Iterator[bytes | str]:
    """Yield what the runtime reads the model from.

    It parses bytes while it holds the interpreter's lock, half a millisecond
    for each MB, and keeps them; files it does not. So a large model becomes a
    file that has no name and that nobody else can change. Where that is not
    to be had (in the probe's sandbox), the bytes are as good.
    """
    handle = _unnamed(content) if len(content) >= _LARGE and wanted.provider == _CPU else None
    if handle is None:
        yield content
        return
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)


def _unnamed(content: bytes) -> int | None:
    """Return the descriptor of a file in memory with this content, or None where there are no such files."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        handle = os.memfd_create("model", os.MFD_CLOEXEC)
    except OSError:
        return None
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(handle, left) :]
    except OSError:
        os.close(handle)
        return None
    return handle


def _options(threads: int, resources: Resources) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _SILENT
    # The arena keeps the largest batch's memory for ever; a device has better uses for it.
    options.enable_cpu_mem_arena = False
    # Never guess: what was screened as ONNX must not be read as something else.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if resources.memory_mb is not None:
        _limit_arena(resources.memory_mb)
        options.enable_cpu_mem_arena = True
        options.add_session_config_entry("session.use_env_allocators", "1")
    return options


def _limit_arena(memory_mb: int) -> None:
    """Give this process one arena that ends at ``memory_mb``; the first limit stands until it ends."""
    with _arena_lock:
        if _arena_mb:
            return
        where = onnxruntime.OrtMemoryInfo(
            "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
        )
        # Grow by what is asked for, not to the next power of two.
        shape = {"max_mem": memory_mb * _MB, "arena_extend_strategy": 1}
        onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg(shape))
        _arena_mb.append(memory_mb)


def _providers(wanted: Accelerator, options: Any) -> dict[str, Any]:
    """Return the session's arguments that ask for an accelerator, the CPU after it."""
    if wanted.library:
        options.add_provider_for_devices(_devices(wanted), dict(wanted.options))
        return {}
    if not wanted.provider:
        raise missing(wanted, "names no execution provider")
    if wanted.provider not in onnxruntime.get_available_providers():
        raise missing(wanted, f"is not in this build of onnxruntime {onnxruntime.__version__}")
    if wanted.provider == _CPU:
        return {"providers": [_CPU]}
    return {"providers": [(wanted.provider, dict(wanted.options)), _CPU]}


def _devices(wanted: Accelerator) -> list[Any]:
    """Register a provider that is a library of its own, once; return the devices that it found."""
    name = f"pithead.{wanted.name}"
    try:
        if not any(d.ep_name == wanted.provider for d in onnxruntime.get_ep_devices()):
            onnxruntime.register_execution_provider_library(name, wanted.library)
        found = [d for d in onnxruntime.get_ep_devices() if d.ep_name == wanted.provider]
    except Exception as error:
        raise missing(wanted, f"needs {wanted.library}: {first_line(error)}") from error
    if not found:
        raise missing(wanted, f"found no device: {wanted.library} offers none as {wanted.provider!r}")
    return found


def _spec(node: Any) -> TensorSpec:
    datatype = _DATATYPES.get(node.type)
    if datatype is None:
        raise PitheadError("inference.load_failed", f"tensor {node.name!r} is of the type {node.type}")
    shape = tuple(d if isinstance(d, int) and d >= 0 else -1 for d in node.shape)
    return TensorSpec(node.name, datatype, shape)
