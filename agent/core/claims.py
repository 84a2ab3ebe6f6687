"""What two lanes must not both have: a register, a node, a file, a name at a broker.

Two writers of one register are worse than none: the one that sees nothing
wrong wipes out the other's alarm. A broker lets the newest client of a name
in and throws the older one out, so two of one name end each other for ever.
"""

import posixpath
from collections.abc import Iterator, Mapping
from typing import Any, Final

WORDS: Final = {"int32": 2, "uint32": 2, "float32": 2, "float64": 4}
"""Registers of a score; others take one."""
OUTPUTS: Final = ("alarm", "score", "quality", "heartbeat")
BROKER: Final = ("mqtt", "sparkplug")


def of_sink(table: Mapping[str, Any]) -> Iterator[str]:
    """Return what a sink's table claims, each in one spelling; what is malformed claims nothing."""
    kind = table.get("kind")
    if kind == "modbus":
        yield from _registers(table)
    elif kind == "opcua":
        server = f"{table.get('url')}".rstrip("/").lower()
        yield from (f"node {table[key]} of {server}" for key in OUTPUTS if isinstance(table.get(key), str))
    elif kind == "file" and isinstance(path := table.get("path"), str):
        yield f"file {posixpath.normpath(path)}"
    yield from of_client(table)


def of_client(table: Mapping[str, Any]) -> Iterator[str]:
    """Return what a table claims by being a client: of a source, a sink, or anything with a broker."""
    name = table.get("client_id")
    if table.get("kind") in BROKER and isinstance(name, str) and name:
        host = str(table.get("host", "127.0.0.1")).lower()
        port = table.get("port") or (8883 if table.get("tls") else 1883)
        yield f"client_id {name!r} at {host}:{port}"


def _registers(table: Mapping[str, Any]) -> Iterator[str]:
    controller = f"{table.get('host')}:{table.get('port', 502)}".lower()
    for key in OUTPUTS:
        unit, _, address = f"{table.get(key)}".rpartition("/")
        kind, _, start = address.partition(":")
        if not start.isdecimal():
            continue
        for n in range(WORDS.get(f"{table.get('score_datatype')}", 1) if key == "score" else 1):
            yield f"{unit or table.get('unit_id', 1)}/{kind}:{int(start) + n} of {controller}"
