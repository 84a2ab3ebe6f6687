"""Nothing on the wire is without bounds: what decodes can be calculated with and stored."""

from collections.abc import Iterator

import pytest
from msgspec import inspect

from contract.bundle import EnrolRequest
from contract.manifest import Manifest
from contract.messages import Desired, DesiredHint, Envelope, Status


def unbounded(kind: inspect.Type, path: str, seen: set[type]) -> Iterator[str]:
    """Yield the paths of all that a stranger could make as large as a payload, or not finite."""
    if not bounded(kind):
        yield path
    for name, part in parts(kind, path, seen):
        yield from unbounded(part, name, seen)


def bounded(kind: inspect.Type) -> bool:
    match kind:
        case inspect.FloatType() | inspect.IntType():
            low, high = (kind.ge, kind.gt), (kind.le, kind.lt)
            return low != (None, None) and high != (None, None)
        case inspect.StrType(max_length=most, pattern=pattern):
            # A pattern with a count bounds itself; without any, a text may hold what no database takes.
            return pattern is not None and (most is not None or "{64}" in pattern)
        case inspect.DictType(max_length=most) | inspect.VarTupleType(max_length=most):
            return most is not None
    return True


def parts(kind: inspect.Type, path: str, seen: set[type]) -> list[tuple[str, inspect.Type]]:
    match kind:
        case inspect.StructType(cls=cls, fields=fields) if cls not in seen:
            seen.add(cls)
            return [(f"{cls.__name__}.{field.encode_name}", field.type) for field in fields]
        case inspect.UnionType(types=types) | inspect.TupleType(item_types=types):
            return [(path, one) for one in types]
        case inspect.DictType(key_type=key, value_type=value):
            return [(f"{path} (key)", key), (f"{path}[...]", value)]
        case inspect.VarTupleType(item_type=item):
            return [(f"{path}[...]", item)]
    return []


@pytest.mark.parametrize("kind", [Envelope, Status, DesiredHint, Desired, EnrolRequest, Manifest])
def test_everything_on_the_wire_is_bounded(kind: type):
    assert list(unbounded(inspect.type_info(kind), kind.__name__, set())) == []


def test_the_test_sees_what_is_unbounded():
    found = list(unbounded(inspect.type_info(dict[str, float | int | tuple[str, ...]]), "$", set()))
    assert sorted(found) == ["$", "$ (key)", "$[...]", "$[...]", "$[...]", "$[...][...]"]
