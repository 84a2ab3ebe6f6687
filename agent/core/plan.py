"""Choose the agent's next step from what is wanted and what is seen.

Level-triggered: only the arguments count, so a lost, repeated or reordered
message cannot change the answer. Models are independent of each other; each
has at most one step at a time.
"""

from collections.abc import Collection, Mapping
from typing import Final, Literal

from msgspec import Struct

from agent.core import slots as slot
from agent.core.health import Judgement, Verdict
from agent.core.slots import Serving, Slots
from contract.messages import Count, Desired, ErrorCode, ModelAssignment, Name, Role, Sha256, Text


class Goal(Struct, frozen=True):
    """What is wanted of one model. A version to be shadowed is kept ready like a staged one."""

    active: ModelAssignment | None = None
    staged: ModelAssignment | None = None

    @property
    def assignments(self) -> tuple[ModelAssignment, ...]:
        """Both, the more urgent first."""
        return tuple(a for a in (self.active, self.staged) if a is not None)


class Package(Struct, frozen=True):
    """How much of one version is on the disk."""

    candidates: tuple[Name, ...]
    """Variants that this device could run, in the order in which they are to be tried."""
    complete: frozenset[Name] = frozenset()
    """Variants whose files are all here."""
    measured: frozenset[Name] = frozenset()
    """Variants that passed their probe, while another might be cheaper."""


class Failure(Struct, frozen=True):
    """How the last task for a version ended, when it failed for good."""

    stage: Literal["fetch", "probe"]
    code: ErrorCode
    detail: Text = ""
    variant: Name | None = None
    """None when the failure is the whole version's."""


class Observed(Struct, frozen=True):
    """One model as the device is now."""

    slots: Slots
    packages: Mapping[Sha256, Package] = {}
    """By digest; a version without an entry has no manifest here yet."""
    broken: frozenset[Sha256] = frozenset()
    """Installed versions of which a file is gone or damaged."""
    failures: Mapping[Sha256, Failure] = {}
    not_before: Mapping[Sha256, float] = {}
    """When the next try may begin, by the monotonic clock."""
    verdict: Verdict = Verdict()
    """On what serves: the trial, or the active version."""
    stale: frozenset[Sha256] = frozenset()
    """Installed versions whose accelerator was chosen under another system, runtime or driver."""


class Fetch(Struct, frozen=True):
    """Download the manifest (``variant`` None) or the files of one variant."""

    wanted: ModelAssignment
    variant: Name | None = None


class Probe(Struct, frozen=True):
    """Try a variant in a process of its own; when it passes, and none can be cheaper, it becomes the standby.

    With ``again`` it serves already, and only its accelerator is chosen anew.
    """

    wanted: ModelAssignment
    variant: Name
    again: bool = False


class Stage(Struct, frozen=True):
    """Make the cheapest of the measured variants the standby."""

    wanted: ModelAssignment


class Activate(Struct, frozen=True):
    """Start a trial of an installed version."""

    wanted: ModelAssignment


class Confirm(Struct, frozen=True):
    """Keep the version on trial."""


class Rollback(Struct, frozen=True):
    """End the trial. ``superseded`` does not reject the version."""

    code: ErrorCode
    detail: Text = ""
    superseded: bool = False


class Fallback(Struct, frozen=True):
    """Give up the confirmed version for the one that was confirmed before it."""

    code: ErrorCode
    detail: Text = ""
    attempt: Count = 0
    activation: Count = 0
    """Up to which the version is given up."""


class Reject(Struct, frozen=True):
    """Give up a variant, or with ``final`` the version, for this attempt."""

    wanted: ModelAssignment
    failure: Failure
    final: bool


class Discard(Struct, frozen=True):
    """Empty the standby slot."""


class Remove(Struct, frozen=True):
    """Forget a model that is wanted no more."""


Step = Fetch | Probe | Stage | Activate | Confirm | Rollback | Fallback | Reject | Discard | Remove
TASKS: Final = (Fetch, Probe)
"""Steps that take time and run beside the loop; all others are one durable write."""


def goals(desired: Desired) -> dict[Name, Goal]:
    """Return what is wanted of each model; of two orders for one role the newest counts."""
    wanted: dict[Name, Goal] = {}
    for a in sorted(desired.models, key=lambda a: (a.activation, a.release_counter)):
        goal = wanted.get(a.model_name, Goal())
        if a.role is Role.ACTIVE:
            wanted[a.model_name] = Goal(a, goal.staged)
        else:
            wanted[a.model_name] = Goal(goal.active, a)
    return wanted


def plan(desired: Desired | None, observed: Mapping[Name, Observed], now: float) -> dict[Name, Step]:
    """Return the next step of each model that has one.

    ``now`` is monotonic, in seconds. Without any desired document yet,
    everything stays as it is, except for what cannot serve.
    """
    wanted = goals(desired) if desired is not None else {}
    steps: dict[Name, Step] = {}
    for name in {*wanted, *observed}:
        seen = observed.get(name, Observed(Slots(name)))
        step = next_step(wanted.get(name), seen, now) if desired is not None else _without_orders(seen)
        if step is not None:
            steps[name] = step
    return steps


def next_step(goal: Goal | None, seen: Observed, now: float) -> Step | None:
    """Return the one step that brings a model nearer to its goal; None means wait."""
    if goal is None:
        return Remove()
    return _toward_active(goal, seen, now) or _toward_staged(goal, seen, now)


def _without_orders(seen: Observed) -> Step | None:
    if seen.slots.trial is None:
        return _fall_back(None, seen)
    return _rollback(seen.verdict) if seen.verdict.judgement is Judgement.BAD else None


def _toward_active(goal: Goal, seen: Observed, now: float) -> Step | None:
    wanted, slots = goal.active, seen.slots
    if slots.trial is not None:
        return _on_trial(wanted, slots.trial, seen.verdict)
    if wanted is None:
        return _fall_back(None, seen)
    digest, active = wanted.manifest_sha256, slots.active
    if active is not None and active.digest == digest and active.activation >= wanted.activation:
        return _fall_back(wanted, seen) or _repair(wanted, seen, now) or _again(wanted, active, seen, now)
    if slot.rejection(slots, wanted) is not None:
        return _fall_back(wanted, seen)
    if slots.find(digest) is not None and digest not in seen.broken:
        return Activate(wanted)
    return _fall_back(wanted, seen) or _prepare(wanted, seen, now)


def _fall_back(wanted: ModelAssignment | None, seen: Observed) -> Step | None:
    """Leave a confirmed version that cannot serve, if there is one to go back to."""
    active, last = seen.slots.active, seen.slots.last_good
    if active is None or last is None or last.digest in seen.broken:
        return None
    if seen.verdict.judgement is not Judgement.BAD:
        return None
    same = wanted is not None and wanted.manifest_sha256 == active.digest
    attempt, activation = (wanted.attempt, wanted.activation) if wanted is not None and same else (0, 0)
    return Fallback(
        seen.verdict.code or "trial.unhealthy",
        seen.verdict.detail,
        attempt=max(attempt, active.attempt),
        activation=max(activation, active.activation),
    )


def _rollback(verdict: Verdict) -> Rollback:
    return Rollback(verdict.code or "trial.unhealthy", verdict.detail)


def _on_trial(wanted: ModelAssignment | None, trial: Serving, verdict: Verdict) -> Step | None:
    if wanted is None or wanted.manifest_sha256 != trial.digest:
        return Rollback("trial.superseded", "another version is wanted now", superseded=True)
    if wanted.activation > trial.activation:
        return Activate(wanted)
    steps: dict[Judgement, Step] = {
        Judgement.GOOD: Confirm(),
        Judgement.BAD: _rollback(verdict),
    }
    return steps.get(verdict.judgement)


def _toward_staged(goal: Goal, seen: Observed, now: float) -> Step | None:
    slots = seen.slots
    kept = {a.manifest_sha256 for a in goal.assignments}
    if slots.standby is not None and slots.standby.digest not in kept:
        return Discard()
    wanted = goal.staged
    if wanted is None or slot.rejection(slots, wanted) is not None:
        return None
    digest = wanted.manifest_sha256
    if slots.find(digest) is not None and digest not in seen.broken:
        return None
    if _busy_with_active(goal, seen):
        return None
    return _prepare(wanted, seen, now)


def _busy_with_active(goal: Goal, seen: Observed) -> bool:
    """Whether the version to be active still needs the standby slot."""
    wanted, slots = goal.active, seen.slots
    if wanted is None or slots.trial is not None:
        return False
    reached = slots.active is not None and slots.active.digest == wanted.manifest_sha256
    return not reached and slot.rejection(slots, wanted) is None


def _repair(wanted: ModelAssignment, seen: Observed, now: float) -> Step | None:
    """Fetch again what the disk has lost of the version in service."""
    return _fetch(wanted, seen, now) if wanted.manifest_sha256 in seen.broken else None


def _again(wanted: ModelAssignment, active: Serving, seen: Observed, now: float) -> Step | None:
    """Choose the accelerator anew where system, runtime or driver are not those of the last choice."""
    digest = wanted.manifest_sha256
    package = seen.packages.get(digest)
    if digest not in seen.stale or now < seen.not_before.get(digest, now):
        return None
    variant = active.installed.variant
    known = package is not None and variant in package.candidates and variant in package.complete
    return Probe(wanted, variant, again=True) if known else None


def _prepare(wanted: ModelAssignment, seen: Observed, now: float) -> Step | None:
    package = seen.packages.get(wanted.manifest_sha256)
    passed = package is not None and bool(package.measured)
    failure = seen.failures.get(wanted.manifest_sha256)
    if failure is not None:
        # What has passed is not given up for want of what might be cheaper.
        alone = failure.variant is None and not passed
        return Stage(wanted) if failure.variant is None and passed else Reject(wanted, failure, final=alone)
    if package is None:
        return _fetch(wanted, seen, now)
    out = slot.rejected_variants(seen.slots, wanted)
    variant = _next(package, out)
    waits = now < seen.not_before.get(wanted.manifest_sha256, now)
    if passed and (variant is None or waits):
        return Stage(wanted)
    if variant is None:
        return Reject(wanted, _why_none(package, out), final=True)
    if variant not in package.complete:
        return _fetch(wanted, seen, now)
    return None if waits else Probe(wanted, variant)


def _next(package: Package, out: Collection[Name]) -> Name | None:
    """Return the most preferred variant that is neither out nor measured."""
    return next((v for v in package.candidates if v not in out and v not in package.measured), None)


def _fetch(wanted: ModelAssignment, seen: Observed, now: float) -> Step | None:
    digest = wanted.manifest_sha256
    if now < seen.not_before.get(digest, now):
        return None
    package = seen.packages.get(digest)
    if package is None:
        return Fetch(wanted)
    installed = seen.slots.find(digest)
    if installed is not None:
        return Fetch(wanted, installed.variant)
    out = slot.rejected_variants(seen.slots, wanted)
    return Fetch(wanted, _next(package, out))


def _why_none(package: Package, out: Mapping[Name, slot.Rejected]) -> Failure:
    """The most preferred variant's failure stands for all."""
    if not package.candidates:
        return Failure("probe", "probe.no_variant", "no variant fits this architecture and its runtimes")
    first = out[package.candidates[0]]
    return Failure("probe", first.code, first.detail, first.variant)
