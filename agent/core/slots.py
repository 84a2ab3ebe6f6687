"""The slots of one model and the few ways in which they change.

Each change is one value that is written durably before anything acts on it,
so a power cut falls between two of them and never inside one.
"""

from typing import Final, Literal

import msgspec
from msgspec import Struct

from contract.messages import (
    Aftermath,
    Count,
    ErrorCode,
    Micros,
    ModelAssignment,
    Name,
    Sha256,
    Text,
    Version,
)

MAX_REJECTED: Final = 64
"""Oldest rejections beyond this are forgotten."""


class Installed(Struct, frozen=True, omit_defaults=True):
    """A version whose files are here and of which one variant passed its probe."""

    version: Version
    digest: Sha256
    """SHA-256 of the manifest."""
    variant: Name
    accelerator: str
    files: dict[str, Sha256]
    """Path in the package -> object; what a session of this variant needs."""


class Serving(Struct, frozen=True, omit_defaults=True):
    """A version in service and the order that put it there."""

    installed: Installed
    activation: Count = 0
    attempt: Count = 0
    rollout: str | None = None
    confirmed_at: Micros = 0

    @property
    def digest(self) -> Sha256:
        """SHA-256 of the manifest."""
        return self.installed.digest


class Rejected(Struct, frozen=True, omit_defaults=True):
    """What will not be tried again by itself.

    ``final`` rejects the version for this attempt; otherwise only
    ``variant`` is out and the next one may be tried.
    """

    version: Version
    digest: Sha256
    attempt: Count
    activation: Count
    code: ErrorCode
    detail: Text = ""
    stage: Literal["fetch", "probe", "trial"] = "probe"
    final: bool = True
    variant: Name | None = None
    accelerator: str | None = None
    aftermath: Aftermath = Aftermath.NO_CHANGE


class Slots(Struct, frozen=True, omit_defaults=True):
    """Durable pointers of one model.

    ``active`` is what was confirmed; while ``trial`` stands, the trial serves
    and ``active`` is what a rollback returns to. ``last_good`` was confirmed
    before ``active``.
    """

    model_name: Name
    active: Serving | None = None
    trial: Serving | None = None
    trial_starts: Count = 0
    """Engine processes started since the trial began."""
    deaths: Count = 0
    """Engines that died of ``active``, each within a short life, or of too much memory."""
    died_of: Text = ""
    """How the last of them died: a code and, after a colon, its detail."""
    standby: Installed | None = None
    last_good: Installed | None = None
    rejected: tuple[Rejected, ...] = ()

    @property
    def serving(self) -> Serving | None:
        """What the engine shall run."""
        return self.trial or self.active

    def installed(self) -> tuple[Installed, ...]:
        """Everything that a slot points to."""
        serving = [s.installed for s in (self.trial, self.active) if s is not None]
        return (*serving, *(i for i in (self.standby, self.last_good) if i is not None))

    def find(self, digest: Sha256) -> Installed | None:
        """The installed version with this digest, if a slot holds it."""
        return next((i for i in self.installed() if i.digest == digest), None)


def stage(slots: Slots, installed: Installed) -> Slots:
    """Put a version that passed its probe into standby."""
    return msgspec.structs.replace(slots, standby=installed)


def choose_again(slots: Slots, installed: Installed) -> Slots:
    """Run the active version as another variant or on another accelerator; its order stays."""
    if slots.active is None or slots.active.digest != installed.digest:
        return slots
    return msgspec.structs.replace(slots, active=msgspec.structs.replace(slots.active, installed=installed))


def discard_standby(slots: Slots) -> Slots:
    """Give up a standby that is wanted no more."""
    return msgspec.structs.replace(slots, standby=None)


def activate(slots: Slots, wanted: ModelAssignment) -> Slots:
    """Start a trial of an installed version; ``LookupError`` when no slot holds it."""
    installed = slots.find(wanted.manifest_sha256)
    if installed is None:
        raise LookupError(f"{wanted.model_name} {wanted.version} is in no slot")
    standby = slots.standby
    return msgspec.structs.replace(
        slots,
        trial=Serving(installed, wanted.activation, wanted.attempt, wanted.rollout),
        trial_starts=0,
        standby=None if standby is not None and standby.digest == installed.digest else standby,
    )


def confirm(slots: Slots, now: int = 0) -> Slots:
    """Make the trial the active version at ``now``; what was active becomes the last good one."""
    trial, active = slots.trial, slots.active
    if trial is None:
        return slots
    another = active is not None and active.digest != trial.digest
    return msgspec.structs.replace(
        slots,
        active=msgspec.structs.replace(trial, confirmed_at=now),
        trial=None,
        trial_starts=0,
        deaths=0,
        died_of="",
        last_good=active.installed if active is not None and another else slots.last_good,
    )


def roll_back(slots: Slots, rejected: Rejected | None) -> Slots:
    """End the trial; the active version serves again.

    Without a rejection (another version is wanted now) the trial's version
    stays in standby, from where it can come back at once.
    """
    trial = slots.trial
    if trial is None:
        return slots
    ended = msgspec.structs.replace(slots, trial=None, trial_starts=0)
    if rejected is not None:
        return reject(ended, rejected)
    if ended.standby is None and ended.find(trial.digest) is None:
        return stage(ended, trial.installed)
    return ended


def fall_back(slots: Slots, rejected: Rejected) -> Slots:
    """Put what was confirmed before ``active`` back into service, and reject ``active``."""
    last = slots.last_good
    if last is None:
        return slots
    back = msgspec.structs.replace(slots, active=Serving(last), last_good=None, deaths=0, died_of="")
    return reject(back, rejected)


def proven(slots: Slots, digest: Sha256) -> bool:
    """Whether a version was confirmed here before, as far as the slots know."""
    confirmed = (slots.active and slots.active.digest, slots.last_good and slots.last_good.digest)
    return digest in confirmed


def reject(slots: Slots, rejected: Rejected) -> Slots:
    """Remember what must not be tried again; a final rejection empties its standby."""
    others = tuple(
        r
        for r in slots.rejected
        if (r.digest, r.variant, r.final) != (rejected.digest, rejected.variant, rejected.final)
    )
    standby = slots.standby
    if rejected.final and standby is not None and standby.digest == rejected.digest:
        standby = None
    return msgspec.structs.replace(slots, standby=standby, rejected=(*others, rejected)[-MAX_REJECTED:])


def again(slots: Slots) -> Slots:
    """Count one more engine process for the trial."""
    if slots.trial is None:
        return slots
    return msgspec.structs.replace(slots, trial_starts=slots.trial_starts + 1)


def died(slots: Slots, *, soon: bool, of: str = "") -> Slots:
    """Count an engine that died of the active version; one that lived long begins a new count."""
    return msgspec.structs.replace(slots, deaths=slots.deaths + 1 if soon else 1, died_of=of[:500])


def aftermath(slots: Slots) -> Aftermath:
    """What is left in service when the trial ends badly."""
    return Aftermath.UNABLE_TO_ROLL_BACK if slots.active is None else Aftermath.ROLLED_BACK


def rejection(slots: Slots, wanted: ModelAssignment) -> Rejected | None:
    """The final rejection that forbids ``wanted``, if any.

    A higher attempt lifts it. The version in service may also be restarted
    by a higher activation, since going without it would not be safer.
    """
    in_service = slots.active is not None and slots.active.digest == wanted.manifest_sha256
    for r in reversed(slots.rejected):
        if r.digest != wanted.manifest_sha256 or not r.final or wanted.attempt > r.attempt:
            continue
        if in_service and wanted.activation > r.activation:
            continue
        return r
    return None


def rejected_variants(slots: Slots, wanted: ModelAssignment) -> dict[str, Rejected]:
    """Variants that failed in this attempt, by name."""
    return {
        r.variant: r
        for r in slots.rejected
        if r.digest == wanted.manifest_sha256 and r.variant is not None and r.attempt >= wanted.attempt
    }
