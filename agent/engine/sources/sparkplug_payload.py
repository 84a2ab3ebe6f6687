"""What a Sparkplug B payload says, as far as samples need it.

Field numbers and datatypes are those of the Eclipse Sparkplug specification,
3.0, "Payloads". What is not described here (data sets, templates, metadata)
is passed over by the protobuf library, as it passes over any unknown field.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

Field = descriptor_pb2.FieldDescriptorProto
PACKAGE: Final = "pithead.sparkplug"
ONE, MANY = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED

MESSAGES: Final[Mapping[str, tuple[tuple[str, int, int | str, int], ...]]] = {
    "Payload": (
        ("timestamp", 1, Field.TYPE_UINT64, ONE),
        ("metrics", 2, "Metric", MANY),
        ("seq", 3, Field.TYPE_UINT64, ONE),
    ),
    "Metric": (
        ("name", 1, Field.TYPE_STRING, ONE),
        ("alias", 2, Field.TYPE_UINT64, ONE),
        ("timestamp", 3, Field.TYPE_UINT64, ONE),
        ("datatype", 4, Field.TYPE_UINT32, ONE),
        ("is_historical", 5, Field.TYPE_BOOL, ONE),
        ("is_null", 7, Field.TYPE_BOOL, ONE),
        ("properties", 9, "PropertySet", ONE),
        ("int_value", 10, Field.TYPE_UINT32, ONE),
        ("long_value", 11, Field.TYPE_UINT64, ONE),
        ("float_value", 12, Field.TYPE_FLOAT, ONE),
        ("double_value", 13, Field.TYPE_DOUBLE, ONE),
        ("boolean_value", 14, Field.TYPE_BOOL, ONE),
        ("string_value", 15, Field.TYPE_STRING, ONE),
    ),
    "PropertySet": (("keys", 1, Field.TYPE_STRING, MANY), ("values", 2, "PropertyValue", MANY)),
    "PropertyValue": (("type", 1, Field.TYPE_UINT32, ONE), ("int_value", 3, Field.TYPE_UINT32, ONE)),
}
"""Fields of each message: name, number, type or message, and how many."""

NUMBERS: Final = ("int_value", "long_value", "float_value", "double_value", "boolean_value")
SIGNED: Final = {1: 8, 2: 16, 3: 32, 4: 64}
"""Bits of the datatypes whose values are two's complements in unsigned fields: Int8 to Int64."""
BOOLEAN: Final = 11
GOOD: Final = 192
"""Of the property ``Quality``; 0 is bad, 500 stale."""
REBIRTH: Final = "Node Control/Rebirth"


@dataclass(frozen=True, slots=True)
class Sample:
    """One metric of a payload."""

    name: str
    """Empty where only the alias stands."""
    alias: int | None
    datatype: int
    """0 where it stands in the birth only."""
    t: int | None
    """Microseconds UTC."""
    historical: bool
    raw: float | int | None
    """None is a value that is known to be missing."""
    textual: bool
    """Whether the value is no number."""
    text: str | None = None
    """The value, where it is a text."""

    def value(self, datatype: int) -> float:
        """Return the value, of the datatype that the birth gave; NaN where it is missing."""
        if self.raw is None:
            return math.nan
        bits = SIGNED.get(datatype)
        if bits is None:
            return float(self.raw)
        number = int(self.raw) & (1 << bits) - 1
        return float(number - (1 << bits) if number >> (bits - 1) else number)


@dataclass(frozen=True, slots=True)
class Payload:
    """One message's content."""

    seq: int | None
    samples: tuple[Sample, ...]


def _described() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="pithead/sparkplug.proto", package=PACKAGE, syntax="proto2"
    )
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, number, kind, label in fields:
            added = message.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                added.type, added.type_name = Field.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.Payload"))


_Payload: Final = _described()


def parsed(data: bytes) -> Payload:
    """Return what ``data`` says; ``ValueError`` where that is no payload."""
    try:
        found = _Payload.FromString(data)
    except DecodeError as error:
        raise ValueError(f"no Sparkplug payload: {error}") from error
    sent = found.timestamp if found.HasField("timestamp") else None
    seq = found.seq if found.HasField("seq") else None
    return Payload(seq, tuple(_samples(found.metrics, sent)))


def _samples(metrics: Any, sent_ms: int | None) -> Iterator[Sample]:
    for metric in metrics:
        t = metric.timestamp if metric.HasField("timestamp") else sent_ms
        kinds = [kind for kind in NUMBERS if metric.HasField(kind)]
        missing = metric.is_null or not _is_good(metric)
        yield Sample(
            name=metric.name,
            alias=metric.alias if metric.HasField("alias") else None,
            datatype=metric.datatype,
            t=None if t is None else t * 1000,
            historical=metric.is_historical,
            raw=None if missing or not kinds else getattr(metric, kinds[-1]),
            textual=not missing and not kinds,
            text=metric.string_value if not missing and metric.HasField("string_value") else None,
        )


def _is_good(metric: Any) -> bool:
    for key, value in zip(metric.properties.keys, metric.properties.values, strict=False):
        if key == "Quality" and value.HasField("int_value"):
            return bool(value.int_value == GOOD)
    return True


def rebirth(now: int) -> bytes:
    """Return the command by which an edge node is asked for its births; ``now`` in microseconds UTC."""
    payload = _Payload(timestamp=now // 1000)
    payload.metrics.add(name=REBIRTH, timestamp=now // 1000, datatype=BOOLEAN, boolean_value=True)
    return bytes(payload.SerializeToString())
