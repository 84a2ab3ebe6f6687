"""Answers that are kept, by their questions, for one session: what was asked before is not run again.

A question is the very bytes of the inputs, as the session would take them,
with their datatypes and shapes, and which outputs are wanted. The bytes
themselves are the key: Python hashes them (SipHash, under a secret of the
process) quicker than SHA-256 or BLAKE2b can at any size, 0.35 us for 256
bytes and 37 us for 150 kB, and no two questions are ever taken for one
another. They count towards the budget as the answers do.

It belongs to one session, so no version and no activation ever gives
another's answer: it goes with the session.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias

import numpy as np

from agent.engine.serve import tensors
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.made_up import made_up
from inference.session import Array, Session

Question: TypeAlias = tuple[object, ...]

ENTRY_BYTES: Final = 600
TENSOR_BYTES: Final = 160
TEXT_BYTES: Final = 49
"""What Python takes for an entry, for each array of its question and its answer, and for each text."""

KEEPS_STATE: Final = frozenset({
    *("VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "CALL_ONCE"),
    *("HASHTABLE", "HASHTABLE_FIND", "HASHTABLE_IMPORT", "SVDF", "RNN", "LSTM"),
    *("UNIDIRECTIONAL_SEQUENCE_RNN", "UNIDIRECTIONAL_SEQUENCE_LSTM"),
    *("BIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_LSTM"),
})  # fmt: skip
"""TFLite's operators that may remember earlier runs; ONNX has none."""
ROLLS_DICE: Final = frozenset({
    *("RANDOM_UNIFORM", "RANDOM_STANDARD_NORMAL", "MULTINOMIAL"),
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
})  # fmt: skip


class Cache:
    """Least recently used out first. On the loop's thread only."""

    __slots__ = ("_entries", "_limit", "bytes")

    def __init__(self, limit_bytes: int) -> None:
        self._entries: OrderedDict[Question, tuple[dict[str, Array], int]] = OrderedDict()
        self._limit = limit_bytes
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, question: Question) -> dict[str, Array] | None:
        """Return the answer's outputs, of which none may be changed."""
        found = self._entries.get(question)
        if found is None:
            return None
        self._entries.move_to_end(question)
        return dict(found[0])

    def put(self, question: Question, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Keep an answer, unless it is too large or has NaN or infinity: that may be a fault of the run."""
        size = ENTRY_BYTES + size_of(inputs.values()) + size_of(outputs.values())
        if size > self._limit or question in self._entries or not _finite(outputs.values()):
            return
        # An output may be a part of a whole batch's, or the runtime's memory.
        kept = {name: array.copy() for name, array in outputs.items()}
        for array in kept.values():
            array.setflags(write=False)
        self._entries[question] = (kept, size)
        self.bytes += size
        while self.bytes > self._limit:
            self.bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Forget all, and keep nothing from now on."""
        self._entries.clear()
        self.bytes = self._limit = 0


def question_of(
    names: Iterable[str], inputs: Mapping[str, Array], outputs: tuple[str, ...] | None, *, real: bool
) -> Question:
    """Return what is asked; ``real`` is whether quantised outputs are wanted as real values."""
    parts: list[object] = [outputs, real]
    for name in names:
        array = inputs[name]
        values = tuple(array.ravel().tolist()) if array.dtype == tensors.TEXT else array.tobytes()
        parts += (array.dtype.str, array.shape, values)
    return tuple(parts)


def size_of(arrays: Iterable[Array]) -> int:
    """Return the bytes that arrays take."""
    total = 0
    for array in arrays:
        total += TENSOR_BYTES + array.nbytes
        if array.dtype == tensors.TEXT:
            total += sum(TEXT_BYTES + len(text) for text in array.ravel())
    return total


def _finite(arrays: Iterable[Array]) -> bool:
    for array in arrays:  # noqa: SIM110 - a generator costs more than the loop
        # Looking for a 0 takes a third of the time of numpy's `all`.
        if array.dtype.kind == "f" and b"\0" in np.isfinite(array).tobytes():
            return False
    return True


def why_not(session: Session, specs: Sequence[TensorSpec]) -> str:
    """Return why a session's answers cannot be kept; empty where they can. Where nobody waits.

    Its operators tell, and so do four runs, of which all but the third are asked the same.
    """
    operators = {name for nodes in session.placement.nodes.values() for name in nodes}
    for known, words in ((KEEPS_STATE, "may remember earlier runs"), (ROLLS_DICE, "is random")):
        if found := sorted(operators & known):
            return f"{found[0]} {words}"
    one, other = made_up(specs, 1, random=True), made_up(specs, 1)
    try:
        session.reset()
        first, second, _, last = [session.run(given) for given in (one, one, other, one)]
    except PitheadError:
        return ""  # it does not like what was made up, which says nothing
    finally:
        session.reset()
    texts = tensors.TEXT
    same = all(
        a.tobytes() == second[name].tobytes() == last[name].tobytes()
        for name, a in first.items()
        if a.dtype != texts
    )
    return "" if same else "the same question gets another answer the second time"
