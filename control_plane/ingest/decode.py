"""From an MQTT message to records that may be stored, or to the reason why not. No I/O.

A batch with one bad record loses that record only: the others are stored,
and the bad one is acknowledged too where its number can be read, so that
the device does not send it for ever.
"""

from collections.abc import Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from contract import codec, topics
from contract.errors import PitheadError
from contract.messages import NO_NUL, PROTOCOL_VERSION, Envelope, PriorityClass, Status

STATUS_SEGMENT: Final = "status"
MAX_RECORDS: Final = 2_000
"""Records of one message, ten times what an agent sends: each may cost a row, good or bad."""
MAX_EPOCHS: Final = 16
"""Epochs in one message: each costs a watermark, and has a part in the acknowledgement."""


class Inbound(msgspec.Struct, frozen=True):
    """A message as it came."""

    topic: str
    payload: bytes
    content_type: str | None
    t_received: int


class Number(msgspec.Struct, frozen=True, rename={"priority": "class"}):
    """What can be read of a record that is otherwise wrong."""

    epoch: Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)]
    priority: PriorityClass
    seq: Annotated[int, Meta(ge=1, le=2**62)]


class Refused(msgspec.Struct, frozen=True):
    """A message or a record that is never stored, and why."""

    device: str
    topic: str
    payload: bytes
    code: str
    detail: str
    t_received: int
    number: Number | None = None
    """Set when the record can be acknowledged."""


class Accepted(msgspec.Struct, frozen=True):
    """A record to be stored."""

    envelope: Envelope
    t_received: int


class Decoded(msgspec.Struct, frozen=True):
    """All that one message held."""

    device: str
    accepted: tuple[Accepted, ...] = ()
    refused: tuple[Refused, ...] = ()
    status: Status | None = None


def decode(message: Inbound) -> Decoded:
    """Return what ``message`` holds; this never raises, whatever a device sends."""
    device = ""
    try:
        device, segment = topics.parse_up(message.topic)
        if segment == STATUS_SEGMENT:
            return Decoded(device, status=_status(device, message))
        return _batch(device, _priority(segment), message)
    except PitheadError as error:
        return Decoded(device, refused=(_refuse(device, message, message.payload, error),))


def _status(device: str, message: Inbound) -> Status | None:
    if not message.payload:
        return None  # a retained message that was cleared
    status = codec.decode(message.payload, Status)
    if status.v != PROTOCOL_VERSION:
        raise PitheadError("message.unsupported_version", f"v is {status.v}, not {PROTOCOL_VERSION}")
    if status.device != device:
        raise PitheadError("message.wrong_device", f"{status.device} speaks on the topic of {device}")
    return status


def _priority(segment: str) -> PriorityClass:
    try:
        return PriorityClass(segment)
    except ValueError as error:
        raise PitheadError("message.malformed", f"topic: there is no class {segment!r}") from error


def _batch(device: str, priority: PriorityClass, message: Inbound) -> Decoded:
    try:
        envelopes = codec.decode_batch(message.payload, message.content_type)
        _check_count(len(envelopes))
        for envelope in envelopes:
            _check(device, priority, envelope)
    except PitheadError as error:
        if error.code == "message.too_large":
            raise
        return _one_by_one(device, priority, message)
    _check_epochs(envelope.epoch for envelope in envelopes)
    return Decoded(device, accepted=tuple(Accepted(envelope, message.t_received) for envelope in envelopes))


def _one_by_one(device: str, priority: PriorityClass, message: Inbound) -> Decoded:
    plain = codec.open_payload(message.payload, message.content_type)
    raws = codec.decode(plain, list[msgspec.Raw])
    _check_count(len(raws))
    accepted: list[Accepted] = []
    refused: list[Refused] = []
    for raw in raws:
        try:
            envelope = codec.decode(bytes(raw), Envelope)
            _check(device, priority, envelope)
        except PitheadError as error:
            # a newer protocol may be understood one day: what speaks it is not acknowledged
            final = error.code != "message.unsupported_version"
            number = _read_number(bytes(raw), priority) if final else None
            refused.append(_refuse(device, message, bytes(raw), error, number))
        else:
            accepted.append(Accepted(envelope, message.t_received))
    _check_epochs(
        [
            *(entry.envelope.epoch for entry in accepted),
            *(entry.number.epoch for entry in refused if entry.number is not None),
        ]
    )
    return Decoded(device, tuple(accepted), tuple(refused))


def _check_count(count: int) -> None:
    if count > MAX_RECORDS:
        raise PitheadError(
            "message.too_large", f"{count} records in one message, limit {MAX_RECORDS}", limit=MAX_RECORDS
        )


def _check_epochs(epochs: Iterable[str]) -> None:
    found = len(set(epochs))
    if found > MAX_EPOCHS:
        raise PitheadError("message.malformed", f"{found} epochs in one message, limit {MAX_EPOCHS}")


def _check(device: str, priority: PriorityClass, envelope: Envelope) -> None:
    if envelope.v != PROTOCOL_VERSION:
        raise PitheadError("message.unsupported_version", f"v is {envelope.v}, not {PROTOCOL_VERSION}")
    if envelope.device != device:
        raise PitheadError("message.wrong_device", f"{envelope.device} speaks on the topic of {device}")
    if envelope.priority is not priority:
        raise PitheadError(
            "message.malformed", f"class: {envelope.priority.value} on the topic of {priority.value}"
        )


def _read_number(raw: bytes, priority: PriorityClass) -> Number | None:
    try:
        number = codec.decode(raw, Number)
    except PitheadError:
        return None
    return number if number.priority is priority else None


def _refuse(
    device: str, message: Inbound, payload: bytes, error: PitheadError, number: Number | None = None
) -> Refused:
    return Refused(
        device=device,
        topic=message.topic,
        payload=payload,
        code=error.code,
        detail=error.detail or error.spec.summary,
        t_received=message.t_received,
        number=number,
    )
