"""One question to a child process that opens what nobody has opened before, and its one answer.

``converse`` is the parent's side, ``answer_one`` the child's; what is asked and
answered is each child's own. The runtime is the child's too: nothing here
imports one.
"""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

import msgspec
from msgspec import Struct

from contract.errors import PitheadError
from inference.probing import Limits, in_child

_LONGEST = 1500


class Failure(Struct, frozen=True, tag="failure"):
    """Why there is no answer."""

    code: str
    detail: str


class Request(Protocol):
    """What a child is asked: a struct, with what answering may cost."""

    @property
    def limits(self) -> Limits:
        """Beyond which the child is killed."""
        ...


def converse(module: str, request: Request, about: str, answers: Any, most: int) -> Any:
    """Return what ``python -m module`` answers: one of the structs of ``answers``, which have tags.

    ``about`` names the model for people. Raises what the child met, and ``probe.*`` where the model took
    its process with it.
    """
    answer = in_child(module, msgspec.msgpack.encode(request), request.limits, most)
    try:
        said = msgspec.msgpack.decode(answer, type=answers | Failure)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise PitheadError("probe.crashed", f"{about}: its answer is not readable: {error}") from error
    if isinstance(said, Failure):
        raise PitheadError(said.code, said.detail)
    return said


R = TypeVar("R", bound=Request)


def answer_one(kind: type[R], work: Callable[[R], Struct]) -> NoReturn:
    """Answer the request on standard input with what ``work`` makes of it, and end."""
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=kind)
    # Runtimes write on standard output as they please; the answer goes where they cannot.
    answer = os.dup(1)
    os.dup2(2, 1)
    said: Struct
    try:
        said = work(request)
    except PitheadError as error:
        said = Failure(error.code, error.detail[:_LONGEST])
    except MemoryError:
        said = Failure("probe.over_budget", f"more than {request.limits.memory_mb} MB of address space")
    left = memoryview(msgspec.msgpack.encode(said))
    while left:
        left = left[os.write(answer, left) :]
    # A model that was opened here is not worth a clean farewell.
    os._exit(0)
