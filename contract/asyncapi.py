"""The AsyncAPI 3.0 document of the MQTT side, made from the message types and the topics.

``docs/asyncapi.yaml`` is this document; a test holds the two together.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from contract import topics
from contract.codec import MAX_DECODED, MAX_PAYLOAD
from contract.messages import PROTOCOL_VERSION, Ack, DesiredHint, Envelope, PriorityClass, Status

_REF: Final = "#/components/schemas/{name}"
_DEVICE: Final = "{device}"


def document() -> dict[str, Any]:
    """Return the document as plain JSON values."""
    messages: Mapping[str, Any] = {
        "Batch": list[Envelope],
        "Status": Status,
        "Ack": Ack,
        "DesiredHint": DesiredHint,
    }
    schemas, components = msgspec.json.schema_components(list(messages.values()), ref_template=_REF)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Pithead devices",
            "version": str(PROTOCOL_VERSION),
            "description": (
                "What devices and the control plane say over MQTT 5. Unknown fields are ignored. "
                f"A payload has at most {MAX_PAYLOAD} bytes, {MAX_DECODED} after decompression; "
                "batches above 1 kB are compressed with zstd and say so in their content type."
            ),
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {**_up_channels(), **_down_channels()},
        "operations": _operations(),
        "components": {
            "messages": {name: {"payload": schema} for name, schema in zip(messages, schemas, strict=True)},
            "schemas": components,
        },
    }


def _channel(address: str, message: str, description: str) -> dict[str, Any]:
    return {
        "address": address,
        "description": description,
        "parameters": {"device": {"description": "Id of the device, the common name of its certificate."}},
        "messages": {message: {"$ref": f"#/components/messages/{message}"}},
    }


def _up_channels() -> dict[str, Any]:
    channels = {
        f"{priority.value}Records": _channel(
            topics.records(_DEVICE, priority),
            "Batch",
            f"Records of class {priority.value}, QoS 1, kept by the device until they are acknowledged.",
        )
        for priority in PriorityClass
    }
    status = _channel(topics.status(_DEVICE), "Status", "Retained presence; the will says offline.")
    return {**channels, "status": status}


def _down_channels() -> dict[str, Any]:
    return {
        "ack": _channel(topics.ack(_DEVICE), "Ack", "What of the device's records is committed."),
        "desired": _channel(
            topics.desired(_DEVICE), "DesiredHint", "Retained hint that the device's signed metadata changed."
        ),
    }


def _operations() -> dict[str, Any]:
    def operation(action: str, channel: str) -> dict[str, Any]:
        return {"action": action, "channel": {"$ref": f"#/channels/{channel}"}}

    sends = {f"send{name[0].upper()}{name[1:]}": operation("send", name) for name in _up_channels()}
    receives = {
        f"receive{name[0].upper()}{name[1:]}": operation("receive", name) for name in _down_channels()
    }
    return {**sends, **receives}
