"""What the signer signs. Pure: the payload, the role and the time decide.

The signer stands apart from the API so that whoever owns the API cannot use
the online keys for anything but metadata of their own roles: no root, no
delegation, no second target, no time from the future.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

import msgspec

from contract.errors import PitheadError
from control_plane.signing.metadata import SIGNED_AT, Document, canonical

MAX_PAYLOAD: Final = 256 * 1024
MAX_LIFETIME: Final = timedelta(days=32)
CLOCK_TOLERANCE_US: Final = 300 * 1_000_000
DEVICE_PREFIX: Final = "devices/"
COMMON: Final = frozenset({"_type", "spec_version", "version", "expires"})


def check(role: str, payload: bytes, now: int) -> None:
    """Raise ``signing.refused`` unless ``role`` may sign ``payload`` now (microseconds UTC)."""
    rule = RULES.get(role)
    if rule is None:
        raise _refused(f"{role!r} is not an online role")
    if len(payload) > MAX_PAYLOAD:
        raise _refused(f"{len(payload)} bytes, limit {MAX_PAYLOAD}")
    try:
        document = msgspec.json.decode(payload, type=Document)
        same = canonical(document) == payload
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _refused(f"not a JSON object: {error}") from error
    if not same:
        raise _refused("the payload is not in canonical form")
    kind, allowed, content = rule
    if document.get("_type") != kind:
        raise _refused(f"{role} does not sign the type {document.get('_type')!r}")
    if set(document) != COMMON | allowed:
        raise _refused(f"{role} signs the fields {sorted(COMMON | allowed)}, not {sorted(document)}")
    version = document["version"]
    if not isinstance(version, int) or version < 1:
        raise _refused(f"version {version!r}")
    _check_expiry(document["expires"], now)
    content(document, now)


def _check_expiry(expires: object, now: int) -> None:
    try:
        until = datetime.strptime(str(expires), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise _refused(f"expires {expires!r}") from error
    if until > datetime.fromtimestamp(now / 1_000_000, UTC) + MAX_LIFETIME:
        raise _refused(f"expires {expires} is more than {MAX_LIFETIME.days} days ahead")


def _one_device(document: Document, _now: int) -> None:
    targets = document["targets"]
    paths = list(targets) if isinstance(targets, dict) else []
    if len(paths) != 1 or not paths[0].startswith(DEVICE_PREFIX):
        raise _refused(f"the director signs one target, {DEVICE_PREFIX}<device>, not {paths[:3]}")


def _meta(*allowed: str) -> Callable[[Document, int], None]:
    def content(document: Document, _now: int) -> None:
        names = set(document["meta"]) if isinstance(document["meta"], dict) else set()
        if names != set(allowed):
            raise _refused(f"meta names {sorted(names)}, not {sorted(allowed)}")

    return content


def _timestamp(document: Document, now: int) -> None:
    _meta("snapshot.json")(document, now)
    signed_at = document[SIGNED_AT]
    if not isinstance(signed_at, int) or signed_at > now + CLOCK_TOLERANCE_US:
        raise _refused(f"{SIGNED_AT} {signed_at!r} is in the future")


def _refused(detail: str) -> PitheadError:
    return PitheadError("signing.refused", detail)


RULES: Final[Mapping[str, tuple[str, frozenset[str], Callable[[Document, int], None]]]] = {
    "image-snapshot": ("snapshot", frozenset({"meta"}), _meta("targets.json", "release.json")),
    "image-timestamp": ("timestamp", frozenset({"meta", SIGNED_AT}), _timestamp),
    "director-targets": ("targets", frozenset({"targets"}), _one_device),
    "director-snapshot": ("snapshot", frozenset({"meta"}), _meta("targets.json")),
    "director-timestamp": ("timestamp", frozenset({"meta", SIGNED_AT}), _timestamp),
}
"""Online role -> its metadata type, its own fields, and the check of their content."""
