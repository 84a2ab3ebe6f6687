"""Who is to blame when an engine has died: decided from what was at work in it at that moment.

One engine runs all models of a device. So only what was loading or in service
can have killed it, the newest change is suspected first, and one death proves
something only where there is one suspect.
"""

from collections.abc import Collection, Mapping
from typing import Final

from msgspec import Struct

from agent.core import slots as slot
from agent.core.slots import Serving, Slots
from contract.messages import Count, Name, Sha256

SOON_S: Final = 600.0
"""An engine that lived longer was steady: its death begins a new count."""


class Suspect(Struct, frozen=True):
    """A session that was loading or in service."""

    model_name: Name
    digest: Sha256
    activation: Count


class Sentence(Struct, frozen=True):
    """What follows from a death."""

    crashed: Name | None = None
    """The model whose trial is over."""
    charged: Name | None = None
    """The model whose confirmed version has one more death to its name."""


def sentence(found: Mapping[Name, Slots], suspects: Collection[Suspect]) -> Sentence:
    """Return who is to blame.

    A trial goes before every confirmed version; one of a version that was
    confirmed before, and one among several, uses up a start and no more.
    Among confirmed versions the newest that has something to fall back to is
    charged.
    """

    def suspected(s: Slots, serving: Serving | None) -> bool:
        return serving is not None and Suspect(s.model_name, serving.digest, serving.activation) in suspects

    trials = [(s, s.trial) for s in found.values() if s.trial is not None and suspected(s, s.trial)]
    if trials:
        s, trial = trials[0]
        sure = len(trials) == 1 and not slot.proven(s, trial.digest)
        return Sentence(crashed=s.model_name if sure else None)
    confirmed = [
        (s.active.confirmed_at, s.model_name)
        for s in found.values()
        if s.trial is None and s.active is not None and s.last_good is not None and suspected(s, s.active)
    ]
    return Sentence(charged=max(confirmed)[1] if confirmed else None)
