"""Which version a rollout brings, and to which devices."""

from collections.abc import Sequence

from sqlmodel import Session

from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, target_path
from contract.messages import AssignmentState, ModelAssignment, Role
from control_plane.core import orders, strata
from control_plane.core.policy import Policy
from control_plane.services import desired
from control_plane.store import devices as device_store
from control_plane.store import registry
from control_plane.store import rollouts as store
from control_plane.store.devices import DeviceRecord
from control_plane.store.rollouts import AssignmentRecord, Selection


def released(tx: Session, model_name: str, version: str) -> ModelAssignment:
    """Return a released version as it is ordered; ``request.not_found`` when it is not released."""
    found = registry.version(tx, model_name, version)
    if found is None:
        raise PitheadError("request.not_found", f"{model_name} {version} is not released")
    return ModelAssignment(
        model_name=model_name,
        version=version,
        role=Role.ACTIVE,
        manifest_path=target_path(model_name, version, MANIFEST_NAME),
        manifest_sha256=found.manifest_sha256,
        manifest_length=found.manifest_length,
        release_counter=found.release_counter,
    )


def select(tx: Session, selection: Selection) -> list[DeviceRecord]:
    """Return the active devices that match; ``rollout.no_devices`` names those that there are not."""
    labels = dict(selection.labels)
    if selection.group is not None:
        labels |= device_store.group(tx, selection.group).selector
    found = device_store.devices(tx, labels=labels, state="active")
    if not selection.devices:
        return found
    known = {device.id for device in found}
    unknown = sorted(set(selection.devices) - known)
    if unknown:
        raise PitheadError("rollout.no_devices", f"no active device {', '.join(unknown)}", devices=unknown)
    return [device for device in found if device.id in selection.devices]


def members(
    tx: Session, assignment: ModelAssignment, devices: Sequence[DeviceRecord]
) -> list[AssignmentRecord]:
    """Return the devices that do not have the version yet, with their strata.

    Each begins with an attempt that it has not made at this version, so that
    a new rollout offers it again where the device once rejected it.
    """
    tried = store.attempts(tx, assignment.model_name, assignment.version, assignment.manifest_sha256)
    site = strata.merge_small({device.id: _stratum(device) for device in devices})
    members = []
    for device in devices:
        active = orders.active(desired.read(tx, device.id), assignment.model_name)
        if active is not None and active.manifest_sha256 == assignment.manifest_sha256:
            continue
        members.append(
            AssignmentRecord(
                rollout_id="",
                device_id=device.id,
                stratum=site[device.id],
                state=AssignmentState.PLANNED,
                changed_at=0,
                previous=active,
                attempt=tried.get(device.id, -1) + 1,
            )
        )
    return members


def _stratum(device: DeviceRecord) -> str:
    accelerators = "+".join(sorted(device.accelerators))
    return f"{device.hardware}/{accelerators}/{device.labels.get('site', '-')}"


def check_lock(tx: Session, model_name: str, devices: Sequence[str]) -> None:
    """Raise ``rollout.overlap`` when another open rollout of the model has one of ``devices``."""
    locked = store.locked(tx, model_name, devices)
    if locked:
        device, other = min(locked.items())
        raise PitheadError(
            "rollout.overlap",
            f"{len(locked)} devices, for example {device}, are in rollout {other}",
            rollout=other,
            devices=sorted(locked)[:20],
        )


def check_strategy(policy: Policy, members: Sequence[AssignmentRecord]) -> None:
    """Raise ``rollout.policy_invalid`` when the policy compares and there is nothing to compare with."""
    if policy.strategy == "canary" and all(m.previous is None for m in members):
        raise PitheadError(
            "rollout.policy_invalid",
            "none of the devices has a version of this model, so there is nothing to compare with: use "
            '`strategy = "all_at_once"` for a first install (guardrails and confirmations only)',
        )
