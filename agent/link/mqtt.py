"""The MQTT 5 connection: one thread that connects, waits and connects again, and never blocks the supervisor.

A PUBACK frees a place in the window and says no more: records stay in the
outbox until the control plane's own ``Ack``.
"""

import contextlib
import logging
import ssl
import threading
from collections.abc import Callable
from typing import Any, Final

import paho.mqtt.client as mqtt
from msgspec import Struct
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.core import backoff
from agent.link.tls import outdated
from contract import codec, topics
from contract.errors import PitheadError
from contract.messages import PROTOCOL_VERSION, Ack, DesiredHint, Micros, Status

log = logging.getLogger(__name__)
WINDOW: Final = 8
"""Messages that may be under way to the broker at once."""
SESSION_EXPIRY_S: Final = 7 * 24 * 3600
MAX_DOWN: Final = 64 * 1024
STOP_S: Final = 2.0
LOOP_S: Final = 1.0
_new_properties: Callable[[int], Properties] = Properties


class Connected(Struct, frozen=True):
    """The broker has accepted the connection."""


class Disconnected(Struct, frozen=True):
    """The connection is gone, or could not be made."""

    detail: str


class Published(Struct, frozen=True):
    """The broker has taken a message; there is room for another."""


LinkEvent = Connected | Disconnected | Published | Ack | DesiredHint


class BrokerAddress(Struct, frozen=True):
    """Where the broker listens."""

    host: str
    port: int


class MqttLink:
    """The device's connection. ``on_event`` is called in the link's thread."""

    def __init__(
        self,
        address: BrokerAddress,
        *,
        device: str,
        boot_id: str,
        tls: ssl.SSLContext | None,
        on_event: Callable[[LinkEvent], None],
        now: Callable[[], Micros],
        fraction: Callable[[], float],
        keepalive_s: int = 30,
        retry_cap_s: float = 60.0,
    ) -> None:
        self.address = address
        self.device = device
        self.boot_id = boot_id
        self._on_event = on_event
        self._now = now
        self._fraction = fraction
        self._keepalive_s = keepalive_s
        self._retry_cap_s = retry_cap_s
        self._online = threading.Event()
        self._stopping = threading.Event()
        self._failures = 0
        self._reason = ""
        self._under_way: list[mqtt.MQTTMessageInfo] = []
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=device,
            protocol=mqtt.MQTTv5,
            reconnect_on_failure=False,
        )
        self._client.max_inflight_messages_set(WINDOW)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message
        self._client.on_publish = self._published
        # With this paho leaves all writing to the link's thread. Otherwise `publish` would write in its
        # caller's thread while this one reads, and OpenSSL corrupts its memory when both use one connection.
        self._client.on_socket_register_write = _leave_it_to_the_loop
        self._tls = tls
        if tls is not None:
            self._client.tls_set_context(tls)
        self._thread = threading.Thread(target=self._run, name="mqtt", daemon=True)

    @property
    def online(self) -> bool:
        """Whether the broker can be reached now."""
        return self._online.is_set()

    @property
    def room(self) -> int:
        """How many messages may be published now. For one thread, the one that publishes."""
        self._under_way = [info for info in self._under_way if not info.is_published()]
        return max(0, WINDOW - len(self._under_way)) if self.online else 0

    def start(self) -> None:
        """Begin to connect, and return at once."""
        self._thread.start()

    def stop(self) -> None:
        """Say goodbye, if there is a connection, and end the thread."""
        self._stopping.set()
        if self.online:
            with contextlib.suppress(ValueError, RuntimeError):
                self._publish_status(online=False).wait_for_publish(STOP_S)
        self._client.disconnect()
        if self._thread.is_alive():
            self._thread.join(STOP_S)
        # A client that nothing ties into a circle closes all of its sockets as soon as it is let go.
        self._client.on_connect = self._client.on_disconnect = None
        self._client.on_message = self._client.on_publish = None

    def publish(self, topic: str, payload: bytes, content_type: str) -> bool:
        """Hand a message over at QoS 1; False when there is no connection or no room in the window."""
        if self.room == 0:
            return False
        properties = _new_properties(PacketTypes.PUBLISH)
        properties.ContentType = content_type
        info = self._client.publish(topic, payload, qos=1, properties=properties)
        if info.rc != mqtt.MQTT_ERR_SUCCESS:
            return False
        self._under_way.append(info)
        return True

    def _run(self) -> None:
        properties = _new_properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = SESSION_EXPIRY_S
        properties.MaximumPacketSize = MAX_DOWN
        self._client.connect_async(
            self.address.host,
            self.address.port,
            keepalive=self._keepalive_s,
            clean_start=False,
            properties=properties,
        )
        while not self._stopping.is_set():
            self._reason = "closed"
            try:
                self._set_will()
                self._client.reconnect()
                while self._client.loop(LOOP_S) == mqtt.MQTT_ERR_SUCCESS and not outdated(self._tls):
                    pass
                detail = self._reason
            except OSError as error:
                detail = str(error) or type(error).__name__
            except Exception as error:  # nothing in a packet may end this thread
                log.exception("mqtt.failed")
                detail = f"{type(error).__name__}: {error}"
            if self._stopping.is_set():
                break
            self._lost(detail)
            self._failures += 1
            self._stopping.wait(backoff.delay(self._failures, self._fraction(), cap_s=self._retry_cap_s))

    def _set_will(self) -> None:
        self._client.will_set(topics.status(self.device), self._status(online=False), qos=1, retain=True)

    def _status(self, *, online: bool) -> bytes:
        return codec.encode(
            Status(
                v=PROTOCOL_VERSION,
                device=self.device,
                online=online,
                boot_id=self.boot_id,
                t_wall=self._now(),
            )
        )

    def _publish_status(self, *, online: bool) -> mqtt.MQTTMessageInfo:
        properties = _new_properties(PacketTypes.PUBLISH)
        properties.ContentType = codec.JSON
        return self._client.publish(
            topics.status(self.device), self._status(online=online), qos=1, retain=True, properties=properties
        )

    def _lost(self, detail: str) -> None:
        if self._online.is_set():
            self._online.clear()
            log.warning("mqtt.lost", extra={"facts": {"detail": detail}})
        elif self._failures == 0:
            log.warning(
                "mqtt.unreachable",
                extra={"facts": {"host": self.address.host, "port": self.address.port, "detail": detail}},
            )
        self._on_event(Disconnected(detail))

    # --- called by paho in the link's thread

    def _connected(
        self, client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        if reason.is_failure:
            client.disconnect()
            self._reason = f"refused: {reason}"
            return
        self._failures = 0
        client.subscribe(
            [
                (topics.ack(self.device), SubscribeOptions(qos=1)),
                (topics.desired(self.device), SubscribeOptions(qos=1)),
            ]
        )
        self._publish_status(online=True)
        self._online.set()
        log.info("mqtt.connected", extra={"facts": {"host": self.address.host, "port": self.address.port}})
        self._on_event(Connected())

    def _disconnected(
        self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        self._reason = str(reason)

    def _published(
        self, _client: mqtt.Client, _data: Any, _mid: int, reason: ReasonCode, _properties: Any
    ) -> None:
        self._on_event(Published())
        if reason.is_failure:
            log.warning("mqtt.publish_refused", extra={"facts": {"reason": str(reason)}})

    def _message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        try:
            event: Ack | DesiredHint
            if message.topic == topics.ack(self.device):
                event = codec.decode(bytes(message.payload), Ack)
            elif message.topic == topics.desired(self.device):
                event = codec.decode(bytes(message.payload), DesiredHint)
            else:
                return
        except PitheadError as error:
            log.warning("mqtt.malformed", extra={"facts": {"topic": message.topic, "detail": error.detail}})
            return
        self._on_event(event)


def _leave_it_to_the_loop(_client: mqtt.Client, _data: Any, _socket: Any) -> None:
    """Do nothing: the loop is woken and writes."""
