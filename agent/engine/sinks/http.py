"""Messages as HTTP requests: a webhook gets each as JSON, or several at once as a JSON array."""

import base64
import http.client
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from agent.engine.sinks.base import WHERE, Message, Table, failed, invalid, settings
from agent.engine.sources.credentials import credentials
from contract.errors import PitheadError

MESSAGE: Final = {400, 409, 410, 411, 413, 414, 415, 422}
"""Answers by which a server refuses what it was sent; all others but 2xx are not about this message."""
TOKEN: Final = re.compile(r"[!-~]+")
ANSWER_BYTES: Final = 64 * 1024


class HttpSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's own keys."""

    kind: Literal["http"]
    url: Annotated[str, Meta(pattern=r"^https?://[^@\s/]+(/\S*)?$")]
    """Without credentials: they have a file of their own."""
    batch: Annotated[int, Meta(ge=1, le=100)] = 1
    """Messages in one request; above 1 the body is an array, even of one."""
    timeout_s: Annotated[float, Meta(ge=0.1, le=60)] = 5.0
    ca_file: str | None = None
    """Default: the authorities that the system trusts."""
    certificate_file: str | None = None
    key_file: str | None = None
    credentials_file: str | None = None
    """TOML with ``username`` and ``password``."""
    token_file: str | None = None
    """A bearer token and nothing else."""


SETTINGS: Final = HttpSettings


class HttpSink:
    """One connection that is kept open as long as the server likes."""

    at_once: int
    """Messages of one request: what was taken must not come again with what was not."""

    def __init__(self, given: HttpSettings) -> None:
        self._given, self.at_once = given, given.batch
        parts = urlsplit(given.url)
        self._name = f"http {parts.scheme}://{parts.netloc}"
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = {"Content-Type": "application/json", "User-Agent": "pithead"}
        if (authorization := _authorization(given)) is not None:
            self._headers["Authorization"] = authorization
        host, port = str(parts.hostname), parts.port
        self._connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = _tls(given)
            self._connection = http.client.HTTPSConnection(
                host, port, timeout=given.timeout_s, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(host, port, timeout=given.timeout_s)

    def send(self, messages: Sequence[Message]) -> int:
        """See ``MessageSink``; refused is what the server will not take however often it comes."""
        refused = 0
        for first in range(0, len(messages), self._given.batch):
            some = messages[first : first + self._given.batch]
            body = msgspec.json.encode(some if self._given.batch > 1 else some[0])
            refused += 0 if self._posted(body) else len(some)
        return refused

    def close(self) -> None:
        """See ``MessageSink``."""
        self._connection.close()

    def _posted(self, body: bytes) -> bool:
        try:
            status, reason = self._exchange(body)
        except (http.client.HTTPException, OSError) as error:
            raise failed(self._name, str(error) or type(error).__name__) from error
        if 200 <= status < 300:  # noqa: PLR2004 - HTTP's good answers
            return True
        if status in MESSAGE:
            return False
        raise failed(self._name, f"{status} {reason}")

    def _exchange(self, body: bytes) -> tuple[int, str]:
        kept = self._connection.sock is not None
        try:
            self._connection.request("POST", self._path, body, self._headers)
            answer = self._connection.getresponse()
        except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
            self._connection.close()
            if not kept:
                raise
            # A server may close what was idle at any time; that is no failure.
            self._connection.request("POST", self._path, body, self._headers)
            answer = self._connection.getresponse()
        if len(answer.read(ANSWER_BYTES)) == ANSWER_BYTES:
            self._connection.close()
        return answer.status, answer.reason


def _authorization(given: HttpSettings) -> str | None:
    if given.token_file is not None:
        try:
            token = Path(given.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise PitheadError(
                "sink.failed", f"{WHERE}.token_file {given.token_file}: {type(error).__name__}"
            ) from error
        if TOKEN.fullmatch(token) is None:
            raise PitheadError("sink.failed", f"{WHERE}.token_file {given.token_file} holds no single token")
        return f"Bearer {token}"
    if given.credentials_file is None:
        return None
    login = credentials(given.credentials_file, WHERE, "sink.failed")
    pair = base64.b64encode(f"{login.username}:{login.password}".encode()).decode("ascii")
    return f"Basic {pair}"


def _tls(given: HttpSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=given.ca_file)
        if given.certificate_file is not None:
            context.load_cert_chain(given.certificate_file, given.key_file)
    except (OSError, ssl.SSLError) as error:
        raise PitheadError(
            "sink.failed", f"{WHERE}: ca_file, certificate_file or key_file: {error}"
        ) from error
    return context


def check(table: Table, _keys: object) -> None:
    """Raise ``config.invalid`` for keys that do not go together."""
    given = settings(table, HttpSettings)
    try:
        parts = urlsplit(given.url)
        if not parts.hostname or parts.port == 0:
            raise invalid("url", f"is {given.url!r}: no host, or no port")
    except ValueError as error:
        raise invalid("url", f"is {given.url!r}: {error}") from error
    if parts.scheme == "http" and given.ca_file is not None:
        raise invalid("ca_file", "stands beside http://, which encrypts nothing; write https://")
    if given.key_file is not None and given.certificate_file is None:
        raise invalid("key_file", "stands without certificate_file")
    if given.token_file is not None and given.credentials_file is not None:
        raise invalid("token_file", "stands beside credentials_file; name one of them")


def open_sink(table: Table) -> HttpSink:
    """Make ready; the connection is made with the first message. Raises ``sink.failed`` for its files."""
    return HttpSink(settings(table, HttpSettings))
