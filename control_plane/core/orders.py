"""How a rollout edits desired documents: one function per order, each of them idempotent."""

from collections.abc import Sequence

from msgspec.structs import replace

from contract.messages import Desired, ModelAssignment, Reporting, Role


def stage(desired: Desired, new: ModelAssignment) -> Desired:
    """Have ``new`` at hand beside the active version."""
    staged = replace(new, role=Role.STAGED, activation=0)
    kept = tuple(m for m in desired.models if m.model_name != new.model_name or m.role is Role.ACTIVE)
    return replace(desired, models=(*kept, staged))


def report(desired: Desired, wanted: Sequence[Reporting]) -> Desired:
    """Report as often as the most eager of the open rollouts needs it, and let trials last as the longest.

    Rollouts of other models are on the same device. Without any, the device
    goes on as it does.
    """
    if not wanted:
        return desired
    finest = Reporting(
        bucket_s=min(one.bucket_s for one in wanted),
        health_s=min(one.health_s for one in wanted),
        trial_s=max(one.trial_s for one in wanted),
    )
    return replace(desired, reporting=finest)


def activate(desired: Desired, new: ModelAssignment) -> Desired:
    """Make ``new`` the active version; nothing changes when it is already."""
    if any(_same(m, new) for m in desired.models):
        return desired
    active = replace(new, role=Role.ACTIVE, activation=next_activation(desired, new.model_name))
    return replace(desired, models=(*_others(desired, new.model_name), active))


def restart(desired: Desired, model_name: str, rollout: str) -> Desired:
    """Activate the active version once more (sham restart)."""
    activation = next_activation(desired, model_name)
    models = tuple(
        replace(m, activation=activation, rollout=rollout)
        if m.model_name == model_name and m.role is Role.ACTIVE
        else m
        for m in desired.models
    )
    return replace(desired, models=models)


def withdraw(desired: Desired, model_name: str) -> Desired:
    """Keep the active version and nothing else of the model."""
    kept = tuple(m for m in desired.models if m.model_name != model_name or m.role is Role.ACTIVE)
    return replace(desired, models=kept)


def put_back(
    desired: Desired, model_name: str, previous: ModelAssignment | None, rollout: str, *, again: bool
) -> Desired:
    """Make ``previous`` the active version again; without one the model is removed.

    ``again`` activates it; without, the device runs it already and is not disturbed.
    """
    others = _others(desired, model_name)
    if previous is None:
        return replace(desired, models=others)
    activation = next_activation(desired, model_name) if again else previous.activation
    back = replace(previous, role=Role.ACTIVE, activation=activation, rollout=rollout)
    return replace(desired, models=(*others, back))


def active(desired: Desired, model_name: str) -> ModelAssignment | None:
    """Return the version of the model that shall be in service, if any."""
    found = [m for m in desired.models if m.model_name == model_name and m.role is Role.ACTIVE]
    return max(found, key=lambda m: m.activation) if found else None


def next_activation(desired: Desired, model_name: str) -> int:
    """Return an activation number above all that the document has for the model."""
    return 1 + max((m.activation for m in desired.models if m.model_name == model_name), default=0)


def _others(desired: Desired, model_name: str) -> tuple[ModelAssignment, ...]:
    return tuple(m for m in desired.models if m.model_name != model_name)


def _same(m: ModelAssignment, new: ModelAssignment) -> bool:
    return (
        m.role is Role.ACTIVE
        and m.model_name == new.model_name
        and m.manifest_sha256 == new.manifest_sha256
        and m.attempt == new.attempt
        and m.rollout == new.rollout
    )
