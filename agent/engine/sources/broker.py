"""One connection to a broker of the plant, for sources that speak MQTT and for requests that come by it."""

import logging
import ssl
import threading
from collections.abc import Callable, Collection
from typing import Annotated, Any, Final

from msgspec import Meta
from paho.mqtt.client import Client, MQTTMessage, error_string
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.core.settings import LocalBroker, PlantBroker
from agent.engine.clock import Clock
from agent.engine.sources.credentials import credentials
from contract.errors import PitheadError

log = logging.getLogger(__name__)

MAX_PAYLOAD: Final = 256 * 1024
MAX_PACKET: Final = 4 * MAX_PAYLOAD
"""Larger ones are not even sent by the broker."""
CONNECT_S: Final = 10.0
LOOP_S: Final = 0.5
"""How long the client's thread waits for the network at once."""

Topic = Annotated[str, Meta(min_length=1, max_length=1024)]


class Connection:
    """Subscribes once and hands on what comes, on a thread of its own.

    When the connection ends it stays ended: ``check`` says why, and its owner
    opens another one after a while. ``received`` and ``subscribed`` are
    called on the client's thread; what they raise ends the connection.
    """

    def __init__(
        self,
        broker: LocalBroker,
        topics: tuple[str, ...],
        received: Callable[[str, bytes], None],
        clock: Clock,
        *,
        qos: int = 1,
        subscribed: Callable[[], None] = lambda: None,
        table: str = "lanes.source",
        code: str = "source.failed",
        properties: Properties | None = None,
        kept: Collection[str] | None = None,
    ) -> None:
        """``table`` of the configuration and ``code`` are for errors, ``properties`` for CONNECT.

        Of ``kept`` topics alone the broker sends what it has kept; None: of all.
        """
        self._table, self._code = table, code
        self._properties: Properties | None = properties or _small_packets()
        self._kept, self._drops_kept = (topics if kept is None else kept), kept is not None
        self._broker, self._topics, self._qos, self._clock = broker, topics, qos, clock
        self._received, self._say_subscribed = received, subscribed
        self._port = broker.port or (8883 if broker.tls else 1883)
        self._problem: str | None = None
        self._subscribed = False
        self._closing = False
        self._opened = clock.mono()
        protocol = version(broker)
        self._old = protocol is not MQTTProtocolVersion.MQTTv5
        if self._old:
            self._properties = None  # which are of MQTT 5
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=broker.client_id, protocol=protocol)
        self._client.on_connect = self._connected
        self._client.connect_timeout = CONNECT_S / 2
        self._client.on_subscribe = self._granted
        self._client.on_message = self._message
        if broker.tls:
            self._client.tls_set_context(tls_context(broker, table, code))
        if broker.credentials_file is not None:
            login = credentials(broker.credentials_file, table, code)
            self._client.username_pw_set(login.username, login.password)
        self._thread = threading.Thread(target=self._serve, name="mqtt", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether more may come; to be asked before what has come is taken."""
        return self._thread.is_alive()

    def check(self, *, alive: bool) -> bool:
        """Return whether the subscription stands; raises ``failure`` when it will not any more."""
        if self._problem is not None:
            raise self.failure(self._problem)
        if not alive:
            raise self.failure("the client has ended")
        if not self._subscribed and self._clock.mono() - self._opened > CONNECT_S * 1e6:
            raise self.failure(f"no answer in {CONNECT_S:.0f} s")
        return self._subscribed

    def failure(self, problem: str) -> PitheadError:
        """Return an error that names the broker."""
        return PitheadError(self._code, f"mqtt {self._broker.host}:{self._port}: {problem}")

    def close(self) -> None:
        """End the connection; more than once is harmless."""
        self._closing = True
        if self._thread.ident is not None:
            self._thread.join(2 * LOOP_S)
        # A client that nothing ties into a circle closes all of its sockets as soon as it is let go.
        self._client.on_connect = self._client.on_subscribe = self._client.on_message = None

    # ---- on the client's thread

    def publish(self, topic: str, payload: bytes) -> None:
        """Send a message, once at most. Only from ``received`` and ``subscribed``."""
        self._client.publish(topic, payload, qos=0)

    def _serve(self) -> None:
        """Connect once and receive until the connection ends; the lane decides about another."""
        try:
            self._client.connect(self._broker.host, self._port, keepalive=30, properties=self._properties)
            while not self._closing:
                result = self._client.loop(LOOP_S)
                if result != MQTTErrorCode.MQTT_ERR_SUCCESS:
                    self._problem = self._problem or f"connection lost: {error_string(result)}"
                    return
            self._client.disconnect()
        except PitheadError as error:
            self._problem = error.detail
        except Exception as error:
            # Whatever ends this thread ends the connection: said here, since nobody else sees it.
            if not isinstance(error, OSError | ValueError):
                log.exception("mqtt.broke", extra={"facts": {"for": self._table}})
            self._problem = str(error) or type(error).__name__

    def _connected(self, client: Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._problem = f"refused: {reason}"
            return
        if self._old:  # what the broker has kept comes, and is left out on arrival
            client.subscribe([(t, self._qos) for t in self._topics])
            return
        send, do_not = SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE, SubscribeOptions.RETAIN_DO_NOT_SEND
        client.subscribe(
            [
                (t, SubscribeOptions(qos=self._qos, retainHandling=send if t in self._kept else do_not))
                for t in self._topics
            ]
        )

    def _granted(
        self, _client: Client, _userdata: Any, _mid: int, reasons: list[Any], _properties: Any
    ) -> None:
        refused = [str(r) for r in reasons if r.is_failure]
        if refused:
            self._problem = f"subscription refused: {', '.join(refused)}"
        else:
            self._subscribed = True
            self._say_subscribed()

    def _message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        if self._old and message.retain and message.topic not in self._kept and self._drops_kept:
            return
        self._received(message.topic, bytes(message.payload))


def version(broker: LocalBroker) -> MQTTProtocolVersion:
    """Return the protocol that a broker speaks, as the configuration has it."""
    if isinstance(broker, PlantBroker) and broker.protocol == "3.1.1":
        return MQTTProtocolVersion.MQTTv311
    return MQTTProtocolVersion.MQTTv5


def _small_packets() -> Properties:
    """Return a wish to the broker: nothing so large that reading it would take the device's memory."""
    wish = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    wish.MaximumPacketSize = MAX_PACKET
    return wish


def tls_context(broker: LocalBroker, table: str, code: str) -> ssl.SSLContext:
    """Return TLS as ``broker`` says; an error of ``code`` names the ``table`` whose files are wrong."""
    try:
        context = ssl.create_default_context(cafile=broker.ca_file)
        if broker.certificate_file is not None:
            context.load_cert_chain(broker.certificate_file, broker.key_file)
    except (OSError, ssl.SSLError) as error:
        raise PitheadError(code, f"{table}: ca_file, certificate_file or key_file: {error}") from error
    return context
