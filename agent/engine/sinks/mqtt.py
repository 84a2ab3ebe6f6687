"""Messages on a broker of the plant, JSON, at QoS 1 unless it is said otherwise."""

import ssl
import threading
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from agent.core.settings import PlantBroker
from agent.engine.sinks.base import WHERE, Message, Table, failed, settings
from agent.engine.sources.broker import tls_context, version
from agent.engine.sources.credentials import credentials
from contract.errors import PitheadError

KEEPALIVE_S: Final = 30


class MqttSettings(PlantBroker, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The sink's own keys."""

    kind: Literal["mqtt"]
    topic: Annotated[str, Meta(pattern=r"^[^+#$\x00][^+#\x00]*$", max_length=1024)] = "pithead/{lane}"
    """``{lane}`` and ``{model}`` stand for their names."""
    qos: Literal[0, 1, 2] = 1
    retain: bool = False
    timeout_s: Annotated[float, Meta(ge=0.1, le=60)] = 5.0
    """For the connection, and for the broker's acknowledgement of what is sent at once."""


SETTINGS: Final = MqttSettings


class MqttSink:
    """One connection, made once; when it ends another sink is opened."""

    def __init__(self, given: MqttSettings) -> None:
        self._given = given
        self._port = given.port or (8883 if given.tls else 1883)
        self._name = f"mqtt {given.host}:{self._port}"
        self._answered = threading.Event()
        self._problem: str | None = None
        self._refusals: list[str] = []
        """What the broker said of messages that it did not take."""
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=given.client_id,
            protocol=version(given),
            reconnect_on_failure=False,
        )
        self._client.on_connect = self._connected
        self._client.on_publish = self._acknowledged
        self._client.on_disconnect = self._disconnected
        self._client.connect_timeout = given.timeout_s
        if given.tls:
            self._client.tls_set_context(tls_context(given, WHERE, "sink.failed"))
        if given.credentials_file is not None:
            login = credentials(given.credentials_file, WHERE, "sink.failed")
            self._client.username_pw_set(login.username, login.password)
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def send(self, messages: Sequence[Message]) -> int:
        """See ``MessageSink``."""
        if not self._client.is_connected():
            raise self._failure("connection lost")
        given = self._given
        try:
            sent = [
                self._client.publish(self._topic(m), msgspec.json.encode(m), given.qos, given.retain)
                for m in messages
            ]
            for one in sent:
                one.wait_for_publish(given.timeout_s)
                if not one.is_published():
                    raise self._failure(f"no acknowledgement in {given.timeout_s:g} s")
            if self._refusals:
                topic = self._topic(messages[0])
                raise self._failure(f"the broker refuses messages to {topic}: {self._refusals[0]}")
        except (ValueError, RuntimeError) as error:
            raise self._failure(str(error)) from error
        return 0

    def close(self) -> None:
        """See ``MessageSink``."""
        self._client.disconnect()
        self._client.loop_stop()
        self._client.on_connect = self._client.on_publish = self._client.on_disconnect = None

    def _connect(self) -> None:
        given = self._given
        try:
            self._client.connect(given.host, self._port, keepalive=KEEPALIVE_S)
        except (OSError, ValueError, ssl.SSLError) as error:
            raise self._failure(str(error) or type(error).__name__) from error
        self._client.loop_start()
        if not self._answered.wait(given.timeout_s):
            raise self._failure(f"no answer in {given.timeout_s:g} s")
        if self._problem is not None:
            raise self._failure(self._problem)

    def _connected(self, _client: Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._problem = f"refused: {reason}" if reason.is_failure else None
        self._answered.set()

    def _disconnected(
        self, _client: Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any
    ) -> None:
        """Hear of an end before the answer: a broker that refuses a certificate says so by leaving."""
        if not self._answered.is_set():
            self._problem = f"the broker ended the connection: {reason}"
            self._answered.set()

    def _acknowledged(
        self, _client: Client, _userdata: Any, _mid: int, reason: Any, _properties: Any
    ) -> None:
        if reason.is_failure:
            self._refusals.append(str(reason))

    def _topic(self, message: Message) -> str:
        return self._given.topic.replace("{lane}", message.lane).replace("{model}", message.model)

    def _failure(self, problem: str) -> PitheadError:
        return failed(self._name, problem)


def open_sink(table: Table) -> MqttSink:
    """Connect; raises ``sink.failed`` when the broker does not answer or refuses."""
    return MqttSink(settings(table, MqttSettings))
