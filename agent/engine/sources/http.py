"""Rows that others push: a small listener for ``POST /samples``.

One row is ``{"t": ..., "values": {...}}``; a body is a row, a JSON list of
rows, or, as ``application/x-ndjson``, one row a line. ``values`` is an object
by channel name, in which other names are left alone, or a list in the order
of the channels; null is a missing sample. ``t`` is RFC 3339, or microseconds
since 1970 UTC; without it a row is of now. A row that is not newer than the
one before is late: it is counted and left out, so a batch may be sent again.

Where the manifest has a sample rate, rows that should have come in between
are counted as lost. A request is taken whole or not at all; when the lane
does not follow, 429 says so and the sender keeps its rows.
"""

import asyncio
import ssl
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from agent.engine.clock import Clock
from agent.engine.serve.http import Limits, Request, Respond, Response, Server
from agent.engine.serve.tokens import Tokens, read
from agent.engine.sources.base import Source, Table, settings
from agent.engine.sources.inbox import MAX_WAITING
from agent.engine.sources.loop import LoopSource
from agent.engine.sources.marks import value_of
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline

PATH: Final = b"/samples"
LINES: Final = {b"application/x-ndjson", b"application/ndjson", b"application/jsonl"}
EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)  # noqa: UP017 - beside timedelta, one name less
MICROSECOND: Final = timedelta(microseconds=1)
EARLIEST_US: Final = 946_684_800_000_000
"""2000-01-01: what is before was counted in seconds or milliseconds."""
LATEST_US: Final = 2**63
"""Later than any time; JSON has integers that no float holds."""
AHEAD_US: Final = 60_000_000
"""A time further in the future would make everything after it late."""
CLOSE_S: Final = 0.5
STATUS: Final = {"auth.missing": 401, "auth.invalid": 401}


class HttpSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The lane's ``source`` table."""

    kind: Literal["http"]
    port: Annotated[int, Meta(ge=1, le=65535)]
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    """Address to listen on. Beyond loopback, ``tokens_file`` is needed."""
    tokens_file: str | None = None
    """As ``pithead-agent serve`` uses: a line with SHA-256 and name for each token."""
    certificate_file: str | None = None
    """PEM; with ``key_file`` the listener speaks TLS."""
    key_file: str | None = None
    rate_hz: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    """Of the rows; default: the manifest's."""
    max_body_bytes: Annotated[int, Meta(ge=1024, le=64 * 1024 * 1024)] = 1024 * 1024

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a key that would not be used."""
        if self.key_file is not None and self.certificate_file is None:
            raise ValueError("key_file stands without certificate_file: nothing would be encrypted")


SETTINGS: Final = HttpSettings


class Row(Struct, forbid_unknown_fields=True):
    """One row, as it is pushed."""

    values: dict[str, Any] | list[Any]
    t: int | str | None = None


class Answer(Struct):
    """What became of a request."""

    accepted: int
    late: int


class Refused(Exception):  # noqa: N818 - it is an answer
    """A request that is not taken, with its HTTP status."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


_json: Final = msgspec.json.Decoder(list[Row] | Row)
_line: Final = msgspec.json.Decoder(Row)


def decoded(body: bytes | bytearray, content_type: bytes) -> Sequence[Row]:
    """Return the rows of a body; raises ``Refused``."""
    try:
        if content_type.split(b";")[0].strip().lower() in LINES:
            return _line.decode_lines(body)
        rows = _json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(400, f"{error}; a row is {{'t': ..., 'values': {{...}}}}") from error
    return rows if isinstance(rows, list) else [rows]


class Order:
    """Puts pushed rows into one stream: times that rise, and what is missing between them."""

    def __init__(
        self, names: tuple[str, ...], rate_hz: float | None, channels: tuple[Channel, ...] | None = None
    ) -> None:
        """``channels`` say which of the names are marks."""
        self._names, self._channels = names, channels or tuple(Channel(name) for name in names)
        self._period = None if rate_hz is None else 1e6 / rate_hz
        self._newest: int | None = None

    def sort(self, rows: Sequence[Row], now: int) -> tuple[list["Stretch"], int]:
        """Return the rows in stretches without a gap, and how many were late; raises ``Refused``."""
        stretches: list[Stretch] = []
        newest, late = self._newest, 0
        # No row was ever further ahead than this: the device's clock was set back since.
        set_back = newest is not None and newest - now > AHEAD_US
        if set_back:
            newest = None
        for number, row in enumerate(rows):
            values = self._values(row, number)
            t = _time(row.t, number, now)
            if t is None:
                t = now if newest is None else max(now, newest + 1)
            if newest is not None and t <= newest:
                late += 1
                continue
            lost = self._between(newest, t)
            if lost or not stretches:
                stretches.append(Stretch([], lost, gap=lost > 0 or (set_back and not stretches)))
            stretches[-1].rows.append((t, values))
            newest = t
        self._newest = newest
        return stretches, late

    def _between(self, newest: int | None, t: int) -> int:
        if newest is None or self._period is None:
            return 0
        return max(0, round((t - newest) / self._period) - 1)

    def _values(self, row: Row, number: int) -> list[float]:
        if isinstance(row.values, dict):
            found = [row.values.get(name) for name in self._names]
            if row.values and not any(name in row.values for name in self._names):
                raise Refused(400, f"row {number}: none of the channels {', '.join(self._names[:20])}")
        else:
            found = row.values
            if len(found) != len(self._names):
                raise Refused(400, f"row {number}: {len(found)} values for {len(self._names)} channels")
        return [_number(v, number, c) for v, c in zip(found, self._channels, strict=True)]


class Stretch(Struct):
    """Rows that follow on each other; ``lost`` samples lie before the first."""

    rows: list[tuple[int, list[float]]]
    lost: int
    gap: bool


def _number(value: object, number: int, channel: Channel) -> float:
    try:
        found = value_of(value, channel)
    except OverflowError:
        found = None  # an integer of more than 308 digits
    if found is None:
        shown = repr(value)[:40]
        raise Refused(400, f"row {number}: channel {channel.name!r}: {shown} is not a number")
    return found


def _time(t: int | str | None, number: int, now: int) -> int | None:
    if t is None:
        return None
    if isinstance(t, str):
        try:
            moment = datetime.fromisoformat(t)
        except ValueError:
            raise Refused(400, f"row {number}: t {t[:40]!r} is not RFC 3339") from None
        if moment.tzinfo is None:
            raise Refused(400, f"row {number}: t {t[:40]!r} has no time zone; end it with Z")
        us = (moment - EPOCH) // MICROSECOND
    else:
        us = min(t, LATEST_US)
    if us < EARLIEST_US:
        raise Refused(400, f"row {number}: t {t} is before 2000; count microseconds since 1970 UTC")
    if us - now > AHEAD_US:
        ahead = (us - now) / 1e6
        raise Refused(400, f"row {number}: t is {ahead:.0f} s ahead of this device's clock")
    return us


class HttpSource(LoopSource):
    """A listener of its own."""

    def __init__(
        self, given: HttpSettings, channels: tuple[Channel, ...], rate_hz: float | None, clock: Clock
    ) -> None:
        super().__init__(f"http {given.host}:{given.port}", len(channels))
        self._given, self._clock = given, clock
        self._order = Order(tuple(c.name for c in channels), rate_hz, channels)
        self._tokens = None if given.tokens_file is None else _tokens(given.tokens_file)
        self._tls = _tls(given)

    async def serve(self) -> None:
        """See ``LoopSource``."""
        given = self._given
        limits = Limits(
            connections=64,
            body_bytes=given.max_body_bytes,
            all_bodies_bytes=8 * given.max_body_bytes,
            body_s=30.0,
        )
        server = Server(self._handle, _refusal, limits)
        try:
            listener = await asyncio.get_running_loop().create_server(
                server.protocol, given.host, given.port, ssl=self._tls
            )
            async with listener:
                self.inbox.up()
                await listener.serve_forever()
        finally:
            await server.close(CLOSE_S)

    def _handle(self, request: Request, respond: Respond) -> None:
        try:
            answer = self._taken(request)
            respond(Response(202, msgspec.json.encode(answer)))
        except Refused as error:
            respond(_refusal(error.status, str(error)))
        except PitheadError as error:
            respond(_refusal(STATUS.get(error.code, 400), error.detail))

    def _taken(self, request: Request) -> Answer:
        if request.target.split(b"?")[0] != PATH:
            raise Refused(404, "there is /samples only")
        if self._tokens is not None:
            self._tokens.who(request.headers.get(b"authorization"))
        if request.method != b"POST":
            raise Refused(405, "rows are pushed by POST")
        if request.headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "send the body as it is, without a content encoding")
        rows = decoded(request.body, request.headers.get(b"content-type", b""))
        if len(rows) > MAX_WAITING:
            raise Refused(413, f"{len(rows)} rows; at most {MAX_WAITING} are taken at once")
        room = self.inbox.room
        if len(rows) > room:
            raise Refused(429, f"{len(rows)} rows, there is room for {room}; send them again later")
        stretches, late = self._order.sort(rows, self._clock.wall())
        for stretch in stretches:
            self.inbox.put(stretch.rows, lost=stretch.lost, gap=stretch.gap)
        if late:
            self.inbox.miss(late)
        return Answer(len(rows) - late, late)


def _refusal(status: int, why: str) -> Response:
    head = {
        401: b"www-authenticate: Bearer\r\n",
        405: b"allow: POST\r\n",
        429: b"retry-after: 1\r\n",
        503: b"retry-after: 1\r\n",
    }.get(status, b"")
    return Response(status, msgspec.json.encode({"error": why}), head=head)


def _tls(given: HttpSettings) -> ssl.SSLContext | None:
    if given.certificate_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(given.certificate_file, given.key_file)
    except (OSError, ssl.SSLError) as error:
        raise PitheadError("source.failed", f"lanes.source: certificate_file or key_file: {error}") from error
    return context


def _tokens(path: str) -> Tokens:
    try:
        return read(Path(path))
    except PitheadError as error:
        said = error.detail.replace("--token-file", "lanes.source.tokens_file")
        raise PitheadError("config.invalid", said, key="tokens_file") from error


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Begin to listen; whether that works shows in ``poll``."""
    given = settings(table, HttpSettings)
    if given.tokens_file is None and not _is_loopback(given.host):
        raise PitheadError(
            "config.invalid",
            f"lanes.source.tokens_file is missing: {given.host} can be reached from elsewhere",
            key="tokens_file",
        )
    rate = given.rate_hz or pipeline.sample_rate_hz
    source = HttpSource(given, pipeline.channels, rate, clock)
    source.start()
    return source
