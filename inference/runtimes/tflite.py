"""TensorFlow Lite: LiteRT where it is installed, else tflite-runtime."""

import base64
import functools
import importlib.metadata
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import numpy as np

from contract.errors import PitheadError
from contract.manifest import Datatype, TensorSpec
from inference.accelerators import NO_LIMITS, Accelerator, Resources, find
from inference.reports import Placement
from inference.runtimes.delegate import Delegate
from inference.session import Array, InputGate, counted, datatype_of, failed, missing

try:
    from ai_edge_litert import interpreter as tflite
except ImportError:  # armv7l has only the older one
    from tflite_runtime import interpreter as tflite

PACKAGE: Final[str] = tflite.__name__.partition(".")[0].replace("_", "-")

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
FAILURES: Final = (ValueError, RuntimeError, SystemError, MemoryError)
"""What the interpreter raises."""
_DELEGATE: Final = "DELEGATE"
_VARIABLE: Final = "VAR_HANDLE"


def warm_up(accelerator: Accelerator | None = None) -> None:
    """Make the runtime and a delegate read what they read once in a process, before a sandbox closes.

    XNNPACK looks at the processor's features, and takes no node where it cannot.
    """
    smallest = zlib.decompress(base64.b85decode(_SMALLEST))
    TfliteSession(smallest, "xnnpack").close()
    if accelerator is not None and accelerator.library:
        TfliteSession(smallest, accelerator).close()


class TfliteSession:
    """A model in a TFLite interpreter; tensors are set and read by index, the cheapest public way."""

    def __init__(
        self,
        content: bytes,
        accelerator: str | Accelerator = "cpu",
        threads: int = 1,
        resources: Resources = NO_LIMITS,  # noqa: ARG002 - other runtimes limit their arena by it
    ) -> None:
        """See ``Opener``. LiteRT's arena is as large as the model's tensors need, and cannot be limited."""
        wanted = find("tflite", accelerator) if isinstance(accelerator, str) else accelerator
        self._make = functools.partial(_interpreter, content, threads, wanted.name, _delegate(wanted))
        try:
            self._interpreter = self._make()
            inputs = self._interpreter.get_input_details()
            outputs = self._interpreter.get_output_details()
            # There is no public way to ask.
            operators = {op["op_name"] for op in self._interpreter._get_ops_details()}  # noqa: SLF001
        except FAILURES as error:
            raise failed(error, "inference.load_failed") from error
        self.runtime = f"{PACKAGE} {VERSION}"
        self.accelerator = wanted.name if _DELEGATE in operators else "cpu"
        self._has_resources = _VARIABLE in operators
        self.inputs = tuple(_spec(d) for d in inputs)
        self.outputs = tuple(_spec(d) for d in outputs)
        self._gate = InputGate(self.inputs)
        self._feeds = [(d["name"], d["index"]) for d in inputs]
        self._fetches = [(d["name"], d["index"]) for d in outputs]
        self._shapes: dict[str, tuple[int, ...]] = {
            d["name"]: tuple(int(n) for n in d["shape"]) for d in inputs
        }

    @property
    def placement(self) -> Placement:
        """See ``Session``."""
        return _placement(self._interpreter._get_ops_details(), self.accelerator)  # noqa: SLF001

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See ``Session``. Another batch size than the last one costs a new allocation."""
        gate = self._gate
        same = gate.admit(inputs)
        if gate.converts:
            inputs = gate.converted(inputs)
        interpreter = self._interpreter
        try:
            if not same and any(inputs[name].shape != shape for name, shape in self._shapes.items()):
                self._resize(inputs)
            for name, index in self._feeds:
                interpreter.set_tensor(index, inputs[name])
            interpreter.invoke()
            return {name: interpreter.get_tensor(index) for name, index in self._fetches}
        except FAILURES as error:
            self._gate = InputGate(self.inputs)
            raise failed(error, "inference.run_failed") from error

    def reset(self) -> None:
        """See ``Session``. Variables that are resources live as long as their interpreter."""
        if not self._has_resources:
            self._interpreter.reset_all_variables()
            return
        try:
            self._interpreter = self._make()
        except FAILURES as error:
            raise failed(error, "inference.run_failed") from error
        self._gate = InputGate(self.inputs)
        self._shapes = {
            d["name"]: tuple(int(n) for n in d["shape"]) for d in self._interpreter.get_input_details()
        }

    def close(self) -> None:
        """See ``Session``."""
        del self._interpreter, self._make

    def _resize(self, inputs: Mapping[str, Array]) -> None:
        # Should this fail half-way, the next call resizes whatever its shape.
        self._shapes = dict.fromkeys(self._shapes, ())
        for name, index in self._feeds:
            self._interpreter.resize_tensor_input(index, inputs[name].shape)
        try:
            self._interpreter.allocate_tensors()
        except RuntimeError as error:
            if str(error):
                raise
            # Of all that can fail here it has words, but for this.
            raise MemoryError(f"no room for inputs of {[a.shape for a in inputs.values()]}") from error
        self._shapes = {name: inputs[name].shape for name, _ in self._feeds}


def _interpreter(content: bytes, threads: int, accelerator: str, delegate: Delegate | None) -> Any:
    interpreter = tflite.Interpreter(
        model_content=content,
        num_threads=threads,
        experimental_delegates=None if delegate is None else [delegate],
        experimental_op_resolver_type=_AUTO if accelerator == "xnnpack" else _PLAIN,
    )
    interpreter.allocate_tensors()
    return interpreter


def _delegate(wanted: Accelerator) -> Delegate | None:
    """Return the delegate that an accelerator is, or None for those that LiteRT has in itself."""
    if wanted.library:
        return Delegate(wanted)
    if wanted.name not in {"cpu", "xnnpack"}:
        raise missing(wanted, "names no delegate library")
    return None


def _placement(operators: Sequence[Mapping[str, Any]], accelerator: str) -> Placement:
    """Return which nodes a delegate took: those between its node's inputs and outputs.

    The interpreter lists the nodes that were there before too, but not which
    of them a delegate's node stands for.
    """
    plain = [op for op in operators if op["op_name"] != _DELEGATE]
    makes = {int(t): i for i, op in enumerate(plain) for t in op["outputs"]}
    taken: set[int] = set()
    for op in operators:
        if op["op_name"] != _DELEGATE:
            continue
        given = {int(t) for t in op["inputs"]}
        open_ends = [int(t) for t in op["outputs"]]
        while open_ends:
            tensor = open_ends.pop()
            maker = makes.get(tensor)
            if maker is None or maker in taken or tensor in given:
                continue
            taken.add(maker)
            open_ends += [int(t) for t in plain[maker]["inputs"]]
    return counted((accelerator if i in taken else "cpu", str(op["op_name"])) for i, op in enumerate(plain))


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
