"""A connection to a controller by Modbus TCP, for the source and the sink of that kind."""

import logging
import socket
from importlib import import_module
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from contract.errors import PitheadError

FORMATS: Final = {
    "int16": "h",
    "uint16": "H",
    "int32": "i",
    "uint32": "I",
    "int64": "q",
    "uint64": "Q",
    "float32": "f",
    "float64": "d",
}
"""Of ``struct``, by the datatypes of the configuration."""
READS: Final = {"coil": 1, "discrete": 2, "holding": 3, "input": 4}
WRITES: Final = {"coil": 5, "holding": 6, "several": 16}
"""Function codes, by the protocol; an answer has its request's."""
HIGHEST: Final = 65535
"""The last register, and the largest value of one."""
HIGHEST_UNIT: Final = 255


class ModbusServer(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a controller is."""

    host: Annotated[str, Meta(min_length=1)]
    port: Annotated[int, Meta(ge=1, le=65535)] = 502
    unit_id: Annotated[int, Meta(ge=0, le=255)] = 1
    """Of addresses that name none."""
    word_order: Literal["big", "little"] = "big"
    """Which register of a value of 32 or 64 bits comes first: the most significant is ``big``."""
    timeout_s: Annotated[float, Meta(ge=0.05, le=60)] = 2.0


class Link:
    """Makes connections to one controller; errors have the ``code``."""

    def __init__(self, server: ModbusServer, code: str) -> None:
        self._server = server
        try:
            self._client: Any = import_module("pymodbus.client").ModbusTcpClient
            self.error: Any = import_module("pymodbus.exceptions").ModbusException
        except ImportError as error:
            raise PitheadError(code, "modbus: pymodbus is missing; install the extra `modbus`") from error
        # What goes wrong is said by us, once; the library says it again with each try.
        logging.getLogger("pymodbus").setLevel(logging.CRITICAL)

    def connected(self) -> tuple[Any, socket.socket]:
        """Return a client that asks once, and its socket; raises ``OSError`` when nobody answers."""
        server = self._server
        made = socket.create_connection((server.host, server.port), server.timeout_s)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client = self._client(server.host, port=server.port, timeout=server.timeout_s, retries=0)
        client.socket = made
        return client, made

    def told(self, error: Exception) -> str:
        """Return what an error of the library says, in a line."""
        text = str(error)
        return f"no answer in {self._server.timeout_s:g} s" if "No response" in text else text.splitlines()[0]
