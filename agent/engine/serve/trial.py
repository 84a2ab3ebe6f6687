"""``python -m agent.engine.serve.trial``: open a model that nobody vouches for, run it, and end.

A bare file has no golden vectors to agree with. What can be learnt is whether
it loads, which accelerator really runs it, and that it neither crashes nor
hangs nor eats the machine when it is run; all of it where that hurts nobody.
"""

import os
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from contract.errors import PitheadError
from inference.probing import Limits

RUNS: Final = 3
_MB: Final = 1024 * 1024


class TrialRequest(Struct, frozen=True):
    """What the parent asks."""

    model: str
    sha256: str
    format: str
    limits: Limits
    parent: int


class TrialReport(Struct, frozen=True, tag="report"):
    """What was seen."""

    accelerator: str
    sandbox: str
    ran: bool
    """False where no input could be made up for it: its first request is its first run."""


class Failure(Struct, frozen=True, tag="failure"):
    """Why the model is not to be opened."""

    code: str
    detail: str


def main() -> None:
    """Answer one request on standard input."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TrialRequest)
    # Runtimes write on standard output as they please; the answer goes where they cannot.
    answer = os.dup(1)
    os.dup2(2, 1)
    said: TrialReport | Failure
    try:
        said = _try(request)
    except PitheadError as error:
        said = Failure(error.code, error.detail[:1500])
    except MemoryError:
        said = Failure("probe.over_budget", f"more than {request.limits.memory_mb} MB of address space")
    os.write(answer, msgspec.json.encode(said))
    # A model that was opened here is not worth a clean farewell.
    os._exit(0)


def _try(request: TrialRequest) -> TrialReport:
    import hashlib  # noqa: PLC0415 - the parent imports this module for its types only

    from inference import registry  # noqa: PLC0415
    from inference.made_up import made_up  # noqa: PLC0415 - as above, and numpy with it
    from inference.sandbox import confine  # noqa: PLC0415
    from inference.screening import SCREENS  # noqa: PLC0415

    opener = registry.load_runtime(request.format, warm_up=True)
    model = registry.read_file(Path(request.model))
    if hashlib.sha256(model).hexdigest() != request.sha256:
        raise PitheadError("package.file_mismatch", "the file changed while it was looked at")
    report = confine(
        memory_bytes=request.limits.memory_mb * _MB, cpu_s=request.limits.cpu_s, parent=request.parent
    )
    SCREENS[request.format](model)
    session: Any = None
    for accelerator in registry.plain(request.format):
        session = opener(model, accelerator, 1)
        # A delegate that takes no node is no accelerator of this model.
        if session.accelerator == accelerator:
            break
    feed = made_up(session.inputs, rows=1)
    ran = True
    for _ in range(RUNS):
        try:
            session.run(feed)
        except PitheadError:
            # Zeros need not make sense to it, and lengths that are open were guessed.
            ran = False
            break
    return TrialReport(session.accelerator, report.level, ran)


if __name__ == "__main__":
    main()
