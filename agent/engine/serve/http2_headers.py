"""Blocks of header fields: decoded by ``hpack``, and not decoded again where that is certain to be the same.

Clients send the same few blocks in call after call, most of them indices into the table that both ends
keep. A block means the same as long as that table is the same; so what a block means is remembered from
one change of the table to the next, and only of blocks that do not change it themselves.
"""

from collections.abc import Callable
from typing import Final, Generic, TypeVar

from hpack import Decoder, HPACKError

from agent.engine.serve import http2_frames as h2

MOST_REMEMBERED: Final = 64
LONGEST_REMEMBERED: Final = 1024
MAX_FIELDS: Final = 100
MAX_UPDATES: Final = 2
"""Changes of the table's size at the beginning of a block (RFC 7541, 4.2)."""
TABLE_BYTES: Final = 4096
_CONNECTION: Final = {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
_PSEUDO: Final = {b":method", b":scheme", b":path", b":authority"}

T = TypeVar("T")


class MalformedError(Exception):
    """The fields make no request (RFC 9113, 8.1.1): its stream is reset."""


class Blocks(Generic[T]):
    """What one connection's blocks mean, as ``meaning`` makes it of their fields."""

    def __init__(self, most_bytes: int, meaning: Callable[[list[tuple[bytes, bytes]]], T]) -> None:
        self._most_bytes = most_bytes
        self._decoder = Decoder(max_header_list_size=most_bytes)
        self._decoder.max_allowed_table_size = TABLE_BYTES
        self._meaning = meaning
        self._known: dict[bytes, T] = {}

    def decode(self, block: bytes) -> T:
        """Return the meaning; raises ``BrokenError``, ``MalformedError``."""
        known = self._known.get(block)
        if known is not None:
            return known
        if len(block) > self._most_bytes:
            raise h2.BrokenError(h2.ENHANCE_YOUR_CALM, "too many header fields")
        _few_updates(block)
        table = self._decoder.header_table
        before = (len(table.dynamic_entries), table.dynamic_entries[0] if table.dynamic_entries else None)
        size = table.maxsize
        try:
            fields = [(bytes(each[0]), bytes(each[1])) for each in self._decoder.decode(block, raw=True)]
        except HPACKError as error:
            raise h2.BrokenError(h2.COMPRESSION_ERROR, f"header fields: {error}") from error
        entries = table.dynamic_entries
        same = len(entries) == before[0] and (entries[0] if entries else None) is before[1]
        if not same or table.maxsize != size:
            self._known.clear()
            return self._meaning(fields)
        made = self._meaning(fields)
        if len(block) <= LONGEST_REMEMBERED:
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known[block] = made
        return made


def _few_updates(block: bytes) -> None:
    at = count = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:  # noqa: PLR2004 - RFC 7541, 6.3
        count += 1
        if count > MAX_UPDATES:
            raise h2.BrokenError(h2.COMPRESSION_ERROR, "the table's size changes again and again")
        if block[at] & 0x1F == 0x1F:  # noqa: PLR2004
            at += 1
            while at < len(block) and block[at] & 0x80:
                at += 1
        at += 1


def fields_of(fields: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """Return a request's fields by name, of several of one name the last; raises ``MalformedError``."""
    if len(fields) > MAX_FIELDS:
        raise MalformedError
    made: dict[bytes, bytes] = {}
    regular = False
    for name, value in fields:
        if name[:1] == b":":
            if regular or name not in _PSEUDO or name in made:
                raise MalformedError
        else:
            regular = True
            if not name or name != name.lower() or name in _CONNECTION:
                raise MalformedError
        made[name] = value
    if b":method" not in made or b":path" not in made or b":scheme" not in made:
        raise MalformedError
    return made
