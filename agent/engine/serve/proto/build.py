"""Message classes out of tables, one line for each field.

A field is ``"name number type"``. Before the type may stand ``many`` (repeated) or ``map`` (by
string); behind it ``of choice``, the name of the oneof that it belongs to. A type is a scalar's
name in protobuf's language, an enumeration's, or a message's.
"""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

Table: TypeAlias = Mapping[str, tuple[str, ...]]

_Field: Final = descriptor_pb2.FieldDescriptorProto
_SCALARS: Final = {
    name: getattr(_Field, f"TYPE_{name.upper()}")
    for name in ("bool", "bytes", "double", "float", "int32", "int64", "string", "uint32", "uint64")
}


def classes(package: str, messages: Table, enums: Table) -> dict[str, Any]:
    """Return the class of each message, by name; values of enumerations count from 0."""
    file = descriptor_pb2.FileDescriptorProto(name=f"pithead/{package}", package=package, syntax="proto3")
    for name, values in enums.items():
        made = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            made.value.add(name=value, number=number)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for line in fields:
            _add(message, line, package, enums)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
        for name in messages
    }


def _add(message: Any, line: str, package: str, enums: Table) -> None:
    name, number, *words = line.split()
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if words[0] in {"many", "map"}:
        field.label = _Field.LABEL_REPEATED
        if words.pop(0) == "map":
            words = [_entry(message, name, words[0], package, enums)]
    _type(field, words[0], package, enums)
    if len(words) > 1:
        choice = words[2]
        known = [oneof.name for oneof in message.oneof_decl]
        if choice not in known:
            message.oneof_decl.add(name=choice)
            known.append(choice)
        field.oneof_index = known.index(choice)


def _entry(message: Any, name: str, kind: str, package: str, enums: Table) -> str:
    """Add the message that a map's entries are on the wire; return its name."""
    entry = message.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
    entry.options.map_entry = True
    key = entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL)
    _type(key, "string", package, enums)
    value = entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL)
    _type(value, kind, package, enums)
    return f"{message.name}.{entry.name}"


def _type(field: Any, kind: str, package: str, enums: Table) -> None:
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        field.type = scalar
        return
    field.type = _Field.TYPE_ENUM if kind in enums else _Field.TYPE_MESSAGE
    field.type_name = f".{package}.{kind}"
