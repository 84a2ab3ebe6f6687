"""MQTT topics. A device's id is a segment, so that the broker can isolate devices by pattern."""

import re
from typing import Final

from contract.errors import PitheadError
from contract.messages import PriorityClass

ROOT: Final = "pithead/v1"
DEVICE_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{6,38})[a-z0-9]")
UP: Final = re.compile(rf"{ROOT}/([^/]+)/up/([^/]+)")
SERVICE_PREFIX: Final = "svc-"
"""Reserved for services, so that no device can be given a service's name."""

SHARED_GROUP: Final = "ingest"


def records(device: str, priority: PriorityClass) -> str:
    """Batches of envelopes of one priority class, device to control plane, QoS 1."""
    return f"{ROOT}/{device}/up/{priority.value}"


def status(device: str) -> str:
    """Retained ``Status``; also the connection's will."""
    return f"{ROOT}/{device}/up/status"


def ack(device: str) -> str:
    """``Ack``, control plane to device, after the commit."""
    return f"{ROOT}/{device}/down/ack"


def desired(device: str) -> str:
    """Retained ``DesiredHint``, control plane to device."""
    return f"{ROOT}/{device}/down/desired"


def all_records(*, shared: bool = True) -> str:
    """Subscription to what all devices send."""
    topic = f"{ROOT}/+/up/+"
    return f"$share/{SHARED_GROUP}/{topic}" if shared else topic


def parse_up(topic: str) -> tuple[str, str]:
    """Return ``(device, last segment)`` of a topic that a device published on.

    Raises ``message.malformed`` when it is not such a topic.
    """
    matched = UP.fullmatch(topic)
    if matched is None:
        raise PitheadError("message.malformed", f"topic {topic!r} is not {ROOT}/<device>/up/<class>")
    device, segment = matched.groups()
    if not valid_device_id(device):
        raise PitheadError("message.malformed", f"topic {topic!r}: {device!r} is not a device id")
    return device, segment


def valid_device_id(device: str) -> bool:
    """Whether ``device`` may name a device: 8 to 40 of ``[a-z0-9-]``, not reserved."""
    return DEVICE_ID.fullmatch(device) is not None and not device.startswith(SERVICE_PREFIX)
