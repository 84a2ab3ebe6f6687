"""The update server over HTTPS: ``http.client`` with a deadline over the exchange and a cap on its size."""

import http.client
import json
import ssl
import time
from typing import Final
from urllib.parse import urlsplit

from msgspec import Struct

from agent.link.tls import outdated
from contract.bundle import BUNDLE_PATH
from contract.errors import ERRORS, PitheadError

MAX_BODY: Final = 4 * 1024 * 1024
CHUNK: Final = 64 * 1024
DEADLINE_S: Final = 30.0


class Answer(Struct, frozen=True):
    """Status, the headers that matter, and the body."""

    status: int
    etag: str | None
    body: bytes
    date: str | None = None


class ServerAddress(Struct, frozen=True):
    """Host and port of ``https://host[:port]``."""

    host: str
    port: int


def parse_url(url: str) -> ServerAddress:
    """Return where ``url`` points to; ``config.invalid`` for anything but ``https://host[:port]``."""
    try:
        parts = urlsplit(url)
        port = parts.port or 443
    except ValueError as error:
        raise PitheadError("config.invalid", f"{url!r}: {error}") from error
    if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/"):
        raise PitheadError("config.invalid", f"{url!r} is not like https://host:port")
    return ServerAddress(parts.hostname, port)


class Channel:
    """One connection to the server, kept open between requests as long as both sides like."""

    def __init__(self, server: ServerAddress, tls: ssl.SSLContext) -> None:
        self.server = server
        self.tls = tls
        self._connection: http.client.HTTPSConnection | None = None

    def exchange(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Answer:
        """Send one request and return the answer, whatever its status.

        Raises ``update.unreachable`` when there is none within the deadline,
        and ``request.too_large`` when it does not end.
        """
        until = time.monotonic() + deadline_s
        kept = self._connection is not None
        try:
            return self._exchange(method, path, body, headers or {}, until)
        except (ConnectionError, http.client.RemoteDisconnected, ssl.SSLError) as error:
            self.close()
            if not kept:
                raise self._unreachable(error) from error
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            self.close()
            raise self._unreachable(error) from error
        except PitheadError:
            self.close()
            raise
        # The server had closed the kept connection meanwhile.
        return self.exchange(
            method, path, body=body, headers=headers, deadline_s=max(0.1, until - time.monotonic())
        )

    def close(self) -> None:
        """Close the connection; the next exchange makes a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _exchange(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str], until: float
    ) -> Answer:
        if outdated(self.tls):
            self.close()
        connection = self._connection
        if connection is None:
            connection = http.client.HTTPSConnection(
                self.server.host, self.server.port, timeout=_left(until), context=self.tls
            )
            self._connection = connection
        if connection.sock is not None:
            connection.sock.settimeout(_left(until))
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        received = bytearray()
        while True:
            if connection.sock is not None:
                connection.sock.settimeout(_left(until))
            chunk = response.read1(CHUNK)
            if not chunk:
                break
            received += chunk
            if len(received) > MAX_BODY:
                raise PitheadError("request.too_large", f"an answer of more than {MAX_BODY} bytes")
        response.read()  # nothing is left; only this makes the connection ready for the next request
        etag, date = response.getheader("ETag"), response.getheader("Date")
        return Answer(response.status, etag, bytes(received), date)

    def _unreachable(self, error: Exception) -> PitheadError:
        where = f"https://{self.server.host}:{self.server.port}"
        return PitheadError("update.unreachable", f"{where}: {error or type(error).__name__}")


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("no end within the deadline")
    return left


def problem(answer: Answer) -> PitheadError:
    """Return the error that an answer with a failure status stands for."""
    code, detail = "", ""
    try:
        document = json.loads(answer.body)
        if isinstance(document, dict):
            detail = str(document.get("detail") or document.get("title") or "")
            code = str(document.get("type") or "")
    except ValueError:
        detail = answer.body[:200].decode("utf-8", errors="replace")
    if code not in ERRORS:
        code = {401: "auth.missing", 403: "auth.forbidden", 404: "update.not_found"}.get(
            answer.status, "update.unreachable"
        )
    return PitheadError(code, detail or f"status {answer.status}", status=answer.status)


class UpdateServer:
    """The device's end of the update server, with its certificate."""

    def __init__(self, server: ServerAddress, tls: ssl.SSLContext) -> None:
        self._channel = Channel(server, tls)

    def bundle(self, etag: str | None) -> Answer | None:
        """Return the newest bundle, or None when it is the one that ``etag`` names.

        Raises ``update.*``, ``auth.*``, ``identity.revoked``.
        """
        headers = {"If-None-Match": etag} if etag else {}
        answer = self._channel.exchange("GET", BUNDLE_PATH, headers=headers)
        if answer.status == http.client.NOT_MODIFIED:
            return None
        if answer.status != http.client.OK:
            raise problem(answer)
        return answer
