"""TensorFlow Lite: LiteRT where it is installed, else tflite-runtime."""

import base64
import ctypes
import importlib.metadata
import zlib
from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np

from contract.errors import PitheadError
from contract.manifest import Datatype, TensorSpec
from inference.session import Array, InputGate, datatype_of

try:
    from ai_edge_litert import interpreter as tflite
except ImportError:  # armv7l has only the older one
    from tflite_runtime import interpreter as tflite

PACKAGE: Final[str] = tflite.__name__.partition(".")[0].replace("_", "-")

DELEGATES: Final[Mapping[str, str]] = {
    "edgetpu": "libedgetpu.so.1",
    "gpu": "libtensorflowlite_gpu_delegate.so",
    "ethosu": "libethosu_delegate.so",
    "armnn": "libarmnnDelegate.so",
    "vx": "libvx_delegate.so",
}
"""Accelerators that are a shared library. ``cpu`` (the built-in kernels) and ``xnnpack`` need none."""

VERSION: Final = importlib.metadata.version(PACKAGE)
"""Read now: in the probe's sandbox no file can be opened any more."""

_SMALLEST: Final = (
    b"c-n1{F%E)25Jd+>gK<MBC@d^If{B(Uc2*P?_6DO75=9arwjRI}cn%NZ0X&0Oz`wIY0OOLEot@18`xlpp*2{4ED9bWH"
    b"9fB2jSwtN&%)l5p;Db3wYO{Le;?$F#>E9N2%vBSxqJS%phNyf}tns8j0y_|cqj;R6B>mOuU26voEtcy`?eJ$bRrbom"
    b"ZuBkb>)9vBz+BE5a;ruztwXD{_@zYWBF~Dv_S3vYV{<+;w@sqUW>U{6PEP!8#pn8MeQ@0;hd5_R%R3OAR#vG4(f`ZX"
    b"1xd;gTRxU#Q~dvokCMCf_66^_FkS"
)
"""A dense layer of one neuron (``models.tflite_builder``), zlib in base 85."""

_PLAIN: Final = tflite.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
_AUTO: Final = tflite.OpResolverType.AUTO


def warm_up() -> None:
    """Make the runtime read what it reads once in a process, before a sandbox closes.

    XNNPACK looks at the processor's features, and takes no node where it cannot.
    """
    TfliteSession(zlib.decompress(base64.b85decode(_SMALLEST)), "xnnpack", 1).close()


class TfliteSession:
    """A model in a TFLite interpreter; tensors are set and read by index, the cheapest public way."""

    def __init__(self, content: bytes, accelerator: str, threads: int) -> None:
        delegates = _delegates(accelerator)
        resolver = _AUTO if accelerator == "xnnpack" else _PLAIN
        try:
            self._interpreter = tflite.Interpreter(
                model_content=content,
                num_threads=threads,
                experimental_delegates=delegates,
                experimental_op_resolver_type=resolver,
            )
            self._interpreter.allocate_tensors()
            inputs = self._interpreter.get_input_details()
            outputs = self._interpreter.get_output_details()
            delegated = _delegated(self._interpreter)
        except (ValueError, RuntimeError, SystemError) as error:
            raise PitheadError("inference.load_failed", _first_line(error)) from error
        self.runtime = f"{PACKAGE} {VERSION}"
        self.accelerator = accelerator if delegated or accelerator == "cpu" else "cpu"
        self.inputs = tuple(_spec(d) for d in inputs)
        self.outputs = tuple(_spec(d) for d in outputs)
        self._gate = InputGate(self.inputs)
        self._feeds = [(d["name"], d["index"]) for d in inputs]
        self._fetches = [(d["name"], d["index"]) for d in outputs]
        self._shapes: dict[str, tuple[int, ...]] = {
            d["name"]: tuple(int(n) for n in d["shape"]) for d in inputs
        }

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Session``. Another batch size than the last one costs a new allocation."""
        same = self._gate.admit(inputs)
        interpreter = self._interpreter
        try:
            if not same and any(inputs[name].shape != shape for name, shape in self._shapes.items()):
                self._resize(inputs)
            for name, index in self._feeds:
                interpreter.set_tensor(index, inputs[name])
            interpreter.invoke()
            return {name: interpreter.get_tensor(index) for name, index in self._fetches}
        except (ValueError, RuntimeError, SystemError) as error:
            self._gate = InputGate(self.inputs)
            raise PitheadError("inference.run_failed", _first_line(error)) from error

    def close(self) -> None:
        """See ``Session``."""
        del self._interpreter

    def _resize(self, inputs: Mapping[str, Array]) -> None:
        # Should this fail half-way, the next call resizes whatever its shape.
        self._shapes = dict.fromkeys(self._shapes, ())
        for name, index in self._feeds:
            self._interpreter.resize_tensor_input(index, inputs[name].shape)
        self._interpreter.allocate_tensors()
        self._shapes = {name: inputs[name].shape for name, _ in self._feeds}


def _delegates(accelerator: str) -> list[Any] | None:
    if accelerator in {"cpu", "xnnpack"}:
        return None
    library = DELEGATES.get(accelerator)
    if library is None:
        raise PitheadError(
            "inference.accelerator_missing", f"{PACKAGE} knows no {accelerator!r}", accelerator=accelerator
        )
    try:
        # Its own loader leaves half an object behind when there is no such library.
        ctypes.CDLL(library)
        return [tflite.load_delegate(library)]
    except (OSError, ValueError, AttributeError) as error:
        raise PitheadError(
            "inference.accelerator_missing",
            f"{accelerator!r} needs {library}: {_first_line(error)}",
            accelerator=accelerator,
        ) from error


def _delegated(interpreter: Any) -> bool:
    """Return whether a delegate took at least one node. There is no public way to ask."""
    return any(op["op_name"] == "DELEGATE" for op in interpreter._get_ops_details())  # noqa: SLF001


def _spec(details: Mapping[str, Any]) -> TensorSpec:
    datatype = datatype_of(details["dtype"])
    if datatype is None:
        raise PitheadError(
            "inference.load_failed", f"tensor {details['name']!r} is of the type {details['dtype']}"
        )
    signature = details["shape_signature"]
    shape = tuple(int(n) for n in (signature if len(signature) else details["shape"]))
    scale, zero_point = details["quantization"]
    quantised = np.dtype(details["dtype"]).kind in "iu" and scale != 0
    return TensorSpec(
        details["name"],
        cast("Datatype", datatype),
        shape,
        float(scale) if quantised else None,
        int(zero_point) if quantised else None,
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
