"""Samples from a broker on the plant's network: plain or TLS, with a password or a certificate.

With ``topic`` one message is one row: a JSON object by channel name, a JSON
list in the order of the channels, or a bare number where there is one
channel. With ``topics`` each channel has a topic of its own with a bare
number; a row is complete when every channel has a new value, and a second
value of a channel before that replaces the first: the slowest channel sets the
pace. A message that cannot be used counts as a missing sample.
"""

import logging
import ssl
import threading
from collections import deque
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from msgspec import Meta, Struct
from paho.mqtt.client import Client, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.engine.clock import Clock
from agent.engine.sources.base import TICK_S, Batch, Source, Table, settings
from agent.engine.sources.credentials import credentials
from contract.errors import PitheadError
from contract.manifest import Pipeline

log = logging.getLogger(__name__)

MAX_WAITING: Final = 20_000
"""Rows that wait to be taken; older ones are lost, and counted."""
MAX_PAYLOAD: Final = 256 * 1024
CONNECT_S: Final = 10.0
LOOP_S: Final = 0.5
"""How long the client's thread waits for the network at once."""

Topic = Annotated[str, Meta(min_length=1, max_length=1024)]
_row = msgspec.json.Decoder(dict[str, Any] | list[Any] | int | float | bool | str | None)


class MqttSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The lane's ``source`` table."""

    kind: Literal["mqtt"]
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    """Default 1883, with TLS 8883."""
    topic: Topic | None = None
    topics: tuple[Topic, ...] | None = None
    """One for each channel, in the order of the model's channels."""
    columns: tuple[str, ...] | None = None
    """Keys of the JSON object, in the order of the model's channels; default: the channels' names."""
    qos: Literal[0, 1] = 1
    client_id: str = ""
    tls: bool = False
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    credentials_file: str | None = None
    """TOML with ``username`` and ``password``."""


SETTINGS: Final = MqttSettings


class Rows:
    """Turns messages into rows. Messages come on the client's thread, rows go on the lane's."""

    def __init__(self, columns: tuple[str, ...], topics: tuple[str, ...] | None, clock: Clock) -> None:
        self._columns, self._clock = columns, clock
        self._place = None if topics is None else {topic: i for i, topic in enumerate(topics)}
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, list[float]]] = deque()
        self._partial: dict[int, float] = {}
        self._lost = 0
        self._gap = False
        self._complained = False

    def take(self, limit: int) -> tuple[list[tuple[int, list[float]]], int, bool]:
        """Return ``([(time, row), ...], lost, gap)`` since the call before.

        ``gap`` says that rows which were complete are missing before these. A
        message that could not be read is none: nobody knows whether it was a sample.
        """
        with self._lock:
            rows = [self._waiting.popleft() for _ in range(min(limit, len(self._waiting)))]
            lost, self._lost = self._lost, 0
            gap, self._gap = self._gap, False
        return rows, lost, gap

    def __len__(self) -> int:
        return len(self._waiting)

    def message(self, topic: str, payload: bytes) -> None:
        """Take one message; one that cannot be used counts as a lost sample."""
        now = self._clock.wall()
        try:
            value = _decoded(payload)
            row = self._row(value) if self._place is None else self._part(topic, value)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            with self._lock:
                self._lost += 1
            if not self._complained:
                self._complained = True
                log.warning("source.bad_message", extra={"facts": {"topic": topic, "detail": str(error)}})
            return
        if row is None:
            return
        with self._lock:
            self._waiting.append((now, row))
            if len(self._waiting) > MAX_WAITING:
                self._waiting.popleft()
                self._lost += 1
                self._gap = True

    def _row(self, value: object) -> list[float]:
        if isinstance(value, dict):
            return [_number(value.get(name)) for name in self._columns]
        values = value if isinstance(value, list) else [value]
        if len(values) != len(self._columns):
            raise ValueError(f"{len(values)} values for {len(self._columns)} channels")
        return [_number(v) for v in values]

    def _part(self, topic: str, payload: object) -> list[float] | None:
        assert self._place is not None
        place = self._place.get(topic)
        if place is None:
            return None
        self._partial[place] = _number(payload)
        if len(self._partial) < len(self._columns):
            return None
        row = [self._partial[i] for i in range(len(self._columns))]
        self._partial.clear()
        return row


def _decoded(payload: bytes) -> object:
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes, limit {MAX_PAYLOAD}")
    value: object = _row.decode(payload)
    return value


def _number(value: object) -> float:
    """Return a number; null and absent are a missing sample."""
    if value is None:
        return float("nan")
    if isinstance(value, bool | int | float):
        return float(value)
    raise ValueError(f"{value!r} is not a number")


class MqttSource:
    """One connection. When it ends, ``poll`` raises, and the lane opens another after a while."""

    def __init__(self, given: MqttSettings, columns: tuple[str, ...], clock: Clock) -> None:
        self._given, self._clock = given, clock
        self._rows = Rows(columns, given.topics, clock)
        self._width = len(columns)
        self._port = given.port or (8883 if given.tls else 1883)
        self._problem: str | None = None
        self._subscribed = False
        self._closing = False
        self._opened = clock.mono()
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=given.client_id, protocol=MQTTProtocolVersion.MQTTv5
        )
        self._client.on_connect = self._connected
        self._client.connect_timeout = CONNECT_S / 2
        self._client.on_subscribe = self._granted
        self._client.on_message = self._message
        if given.tls:
            self._client.tls_set_context(_tls(given))
        if given.credentials_file is not None:
            login = credentials(given.credentials_file)
            self._client.username_pw_set(login.username, login.password)
        self._thread = threading.Thread(target=self._serve, name="mqtt-source", daemon=True)
        self._thread.start()

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        alive = self._thread.is_alive()
        rows, lost, gap = self._rows.take(limit)
        if rows or lost:
            return Batch(
                values=np.array([row for _, row in rows], np.float64).reshape(-1, self._width),
                t=np.array([t for t, _ in rows], np.int64),
                lost=lost,
                continues=not gap,
            )
        if self._problem is not None:
            raise self._failure(self._problem)
        if not alive:
            raise self._failure("the client has ended")
        if not self._subscribed and self._clock.mono() - self._opened > CONNECT_S * 1e6:
            raise self._failure(f"no answer in {CONNECT_S:.0f} s")
        return Batch(np.empty((0, self._width)), np.empty(0, np.int64)) if self._subscribed else None

    def wait_s(self) -> float:
        """See ``Source``."""
        return TICK_S

    def backlog(self) -> int:
        """See ``Source``."""
        return len(self._rows)

    def close(self) -> None:
        """See ``Source``."""
        self._closing = True
        self._thread.join(2 * LOOP_S)
        # A client that nothing ties into a circle closes all of its sockets as soon as it is let go.
        self._client.on_connect = self._client.on_subscribe = self._client.on_message = None

    def _failure(self, problem: str) -> PitheadError:
        return PitheadError("source.failed", f"mqtt {self._given.host}:{self._port}: {problem}")

    # ---- on the client's thread

    def _serve(self) -> None:
        """Connect once and receive until the connection ends; the lane decides about another."""
        try:
            self._client.connect(self._given.host, self._port, keepalive=30)
            while not self._closing:
                result = self._client.loop(LOOP_S)
                if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    self._problem = self._problem or f"connection lost: {error_string(result)}"
                    return
            self._client.disconnect()
        except Exception as error:
            # Whatever ends this thread ends the connection: said here, since nobody else sees it.
            if not isinstance(error, OSError | ValueError):
                log.exception("source.broke", extra={"facts": {"source": "mqtt"}})
            self._problem = str(error) or type(error).__name__

    def _connected(self, client: Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._problem = f"refused: {reason}"
            return
        topics = self._given.topics or (self._given.topic or "",)
        options = SubscribeOptions(qos=self._given.qos)
        client.subscribe([(topic, options) for topic in topics])

    def _granted(
        self, _client: Client, _userdata: Any, _mid: int, reasons: list[Any], _properties: Any
    ) -> None:
        refused = [str(r) for r in reasons if r.is_failure]
        if refused:
            self._problem = f"subscription refused: {', '.join(refused)}"
        else:
            self._subscribed = True

    def _message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._rows.message(message.topic, bytes(message.payload))


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Begin to connect; whether that works shows in ``poll``."""
    given = settings(table, MqttSettings)
    channels = len(pipeline.channels)
    columns = given.columns or tuple(c.name for c in pipeline.channels)
    if (given.topic is None) == (given.topics is None):
        raise PitheadError("config.invalid", "lanes.source needs one of topic and topics", key="topic")
    for name, names in (("topics", given.topics), ("columns", columns)):
        if names is not None and len(names) != channels:
            raise PitheadError(
                "config.invalid",
                f"lanes.source.{name} names {len(names)}, the model has {channels} channels",
                key=name,
            )
    return MqttSource(given, columns, clock)


def _tls(given: MqttSettings) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=given.ca_file)
        if given.certificate_file is not None:
            context.load_cert_chain(given.certificate_file, given.key_file)
    except (OSError, ssl.SSLError) as error:
        raise PitheadError(
            "source.failed", f"lanes.source: ca_file, certificate_file or key_file: {error}"
        ) from error
    return context
