"""Whose pages may reach a server that asks for no token: none but those of this machine's own names.

A page of ``http://evil.example`` may let that name lead to 127.0.0.1 a moment
later (DNS rebinding): its requests are of the same origin then, come without
an ``Origin``, and the page may read the answers. They say the name they were
sent to, though. An address in ``Host`` is nobody's name, so it passes.
"""

import ipaddress
from collections.abc import Iterable
from typing import Final

from contract.errors import PitheadError

MOST: Final = 256
"""Spellings that are remembered: the port belongs to them."""


class Hosts:
    """The names that this server goes by, in ``Host``."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(name.lower().rstrip(".") for name in names)
        self._seen: set[bytes | None] = {None}
        """What passed before. No browser leaves ``Host`` out."""

    def check(self, said: bytes | None) -> None:
        """Raise ``auth.forbidden`` for another server's name."""
        if said in self._seen:
            return
        text = (said or b"").decode("latin-1")
        if not self._own(_name(text)):
            raise PitheadError(
                "auth.forbidden",
                f"Host {text[:100]!r} is no name of this server, which asks for no token: see --allow-host",
            )
        if len(self._seen) < MOST:
            self._seen.add(said)

    def _own(self, name: str) -> bool:
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _name(text: str) -> str:
    """Return ``Host`` without its port, brackets and final dot, in lower case."""
    text = text.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0].rstrip(".") if ":" in text else text.rstrip(".")
