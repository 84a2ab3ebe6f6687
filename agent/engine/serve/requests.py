"""One inference as values, the same for REST, gRPC and MQTT."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, TypeAlias

from msgspec import Struct

from inference.session import Array

Parameter: TypeAlias = bool | int | float | str
Parameters: TypeAlias = Mapping[str, Parameter]

NO_PARAMETERS: Final[Parameters] = MappingProxyType({})
"""Always this one: msgspec would copy an empty dictionary for each value."""


class Region(Struct, frozen=True, gc=False):
    """A piece of a registered shared memory region."""

    name: str
    offset: int
    size: int
    """Bytes."""


class SharedInput(Struct, frozen=True):
    """An input whose values lie in shared memory."""

    datatype: str
    shape: tuple[int, ...]
    region: Region


class RequestedOutput(Struct, frozen=True):
    """An output that the client named."""

    name: str
    classes: int = 0
    """Not 0: the best so many, as ``value:index`` texts."""
    region: Region | None = None
    """Where to write it instead of sending it."""


class InferRequest(Struct):
    """What is asked of a model."""

    model: str
    inputs: dict[str, Array]
    """By name. Texts (BYTES) are arrays of ``bytes`` objects."""
    version: str = ""
    """Empty: the one that the version policy serves."""
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    """Empty: all, in the model's order."""
    parameters: Parameters = NO_PARAMETERS
    shared: dict[str, SharedInput] | None = None
    """Inputs that are not in ``inputs`` since they lie in shared memory."""
    priority: int = 0
    """1 is served first; 0 is the default, between all and none."""
    timeout_us: int = 0
    """Longest wait before a run begins; 0: the service's own."""
    client: str = ""
    """Who asks; empty for what this process asks itself."""


class InferResponse(Struct):
    """What the model answered."""

    model: str
    version: str
    outputs: dict[str, Array]
    """In the order that was asked for; BYTES as arrays of ``bytes`` objects."""
    id: str = ""
    parameters: Parameters = NO_PARAMETERS
    written: dict[str, Region] | None = None
    """Outputs that were written to shared memory: their values are not to be sent."""
    cached: bool = False
    """Nothing ran for it; clients are not told."""
