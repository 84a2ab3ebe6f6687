"""Compare what the director wants with what was released. Pure: two verified repositories decide.

A device runs a model only when both say the same of it: so neither the
control plane alone nor a release alone puts anything onto a device.
"""

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any, Final, Protocol, TypeVar

import msgspec

from contract import codec
from contract.errors import PitheadError
from contract.manifest import MANIFEST_NAME, floor_path, target_path
from contract.messages import PROTOCOL_VERSION, Desired, ModelAssignment

DEVICES: Final = "devices/"

T = TypeVar("T")


class Target(Protocol):
    """A signed target, as python-tuf gives it."""

    @property
    def length(self) -> int:
        """Bytes."""

    @property
    def hashes(self) -> dict[str, str]:
        """Hex digests by algorithm."""

    @property
    def custom(self) -> Any:
        """What the signer added."""


def desired_of(device: str, targets: Mapping[str, Target]) -> Desired:
    """Return the assignment among the director's targets.

    ``update.wrong_device`` when any target or the document is another
    device's, ``update.metadata_invalid`` for a malformed one.
    """
    path = DEVICES + device
    others = [name for name in targets if name != path]
    if others:
        raise PitheadError("update.wrong_device", f"the director names {others[0]}, this is {device}")
    target = targets.get(path)
    if target is None:
        raise PitheadError("update.wrong_device", f"the director does not name {path}")
    text = target.custom.get("desired") if isinstance(target.custom, dict) else None
    if not isinstance(text, str):
        raise PitheadError("update.metadata_invalid", f"director: {path} has no desired document")
    data = text.encode()
    if (len(data), sha256(data).hexdigest()) != (target.length, target.hashes.get("sha256")):
        raise PitheadError("update.metadata_invalid", f"director: {path} differs from its own length or hash")
    head = _decode(data, _Head, path)
    if head.v != PROTOCOL_VERSION:
        raise PitheadError(
            "message.unsupported_version", f"the desired document has version {head.v}", version=head.v
        )
    desired = _decode(data, Desired, path)
    if desired.device != device:
        raise PitheadError("update.wrong_device", f"the document is for {desired.device}, this is {device}")
    return desired


def check_assignment(assignment: ModelAssignment, released: Callable[[str], Target | None]) -> None:
    """Raise unless the image repository agrees on an assignment and its floor allows it.

    ``update.not_released``, ``update.repositories_disagree``,
    ``update.below_floor``.
    """
    name, version = assignment.model_name, assignment.version
    path = target_path(name, version, MANIFEST_NAME)
    target = released(path)
    if target is None:
        raise PitheadError("update.not_released", f"{name} {version}: no release key has signed {path}")
    counter = _number(target, "release_counter")
    director = {
        "path": assignment.manifest_path,
        "sha256": assignment.manifest_sha256,
        "length": assignment.manifest_length,
        "release_counter": assignment.release_counter,
    }
    image = {
        "path": path,
        "sha256": target.hashes.get("sha256"),
        "length": target.length,
        "release_counter": counter,
    }
    for field, wanted in director.items():
        if image[field] != wanted:
            raise PitheadError(
                "update.repositories_disagree",
                f"{name} {version}: {field} is {wanted} for the director, {image[field]} as released",
                field=field,
            )
    floor = released(floor_path(name))
    minimum = None if floor is None else _number(floor, "min_release_counter")
    if floor is not None and minimum is None:
        raise PitheadError(
            "update.metadata_invalid", f"image: the floor of {name} has no min_release_counter"
        )
    if minimum is not None and assignment.release_counter < minimum:
        raise PitheadError(
            "update.below_floor",
            f"{name} {version} has the release counter {assignment.release_counter}, the floor is {minimum}",
            floor=minimum,
            release_counter=assignment.release_counter,
        )


class _Head(msgspec.Struct):
    """The one field that says how to read the others."""

    v: int


def _decode(data: bytes, kind: type[T], path: str) -> T:
    try:
        return codec.decode(data, kind)
    except PitheadError as error:
        raise PitheadError("update.metadata_invalid", f"director: {path}: {error.detail}") from error


def _number(target: Target, field: str) -> int | None:
    custom = target.custom
    value = custom.get(field) if isinstance(custom, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
