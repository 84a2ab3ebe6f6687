"""A connection to a broker over which requests come and answers go, each counted until it is dealt with.

Who may ask is the broker's matter; where answers may go is, too, but for the
fleet's own topics, and for what is not below ``answers`` where that is set: a
client that may not publish somewhere must not have the engine do it.

Messages come on the client's thread; answers may be given on any.
"""

import logging
import math
import time
from collections.abc import Callable
from threading import Lock
from typing import Any, Final, NamedTuple

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.core.settings import ServeMqtt
from agent.engine.clock import Clock
from agent.engine.sources.broker import Connection
from contract.errors import PitheadError
from contract.topics import ROOT

log = logging.getLogger(__name__)

LENGTH: Final = "Inference-Header-Content-Length"
CODE: Final = "error-code"
"""User property of an answer that is an error."""
MAX_PAYLOAD: Final = 8 * 1024 * 1024
"""Larger requests are answered with an error..."""
MAX_PACKET: Final = 16 * 1024 * 1024
"""...and the broker does not even send these."""
ENVELOPE: Final = 256
"""Bytes of an answer's packet beside body, topic and correlation data, at most."""
COMPLAIN_S: Final = 10.0
"""What is dropped is logged at most this often."""
MOST_REFUSALS: Final = 1000
"""Answers beyond those that are under way that may wait for the network: refusals. More are dropped."""


class Ask(NamedTuple):
    """A request, as it came."""

    topic: str
    payload: bytes
    qos: int
    response_topic: str
    correlation: bytes | None
    header: bytes | None
    ends: float | None
    """When it expires, by the monotonic clock."""
    connection: "Exchange"


class Exchange(Connection):
    """A connection that answers. Many requests may be under way, but no more than ``concurrency``."""

    def __init__(
        self, given: ServeMqtt, asked: Callable[[Ask], None], counts: "Counts", clock: Clock
    ) -> None:
        limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        limits.MaximumPacketSize = MAX_PACKET
        super().__init__(
            given,
            (f"{given.prefix}/+",),
            lambda _topic, _payload: None,
            clock,
            qos=given.qos,
            table="serve.mqtt",
            code="serve.broker_failed",
            properties=limits,
        )
        self._given, self._asked, self._counts = given, asked, counts
        self._lock = Lock()
        self._under_way = self._refusals = 0
        self._mine: dict[int, bool] = {}
        """Answers that are on their way out by their number: whether they are refusals."""
        self._largest = math.inf
        """Bytes of a packet that the broker takes: it ends the connection for a larger one."""
        self._early: set[int] = set()
        """Answers that had gone before they were noted."""
        # With this, `publish` of another thread leaves the writing to the client's own.
        self._client.on_socket_register_write = lambda *_: None
        self._client.on_publish = self._gone

    def answer(self, ask: Ask, body: bytes, properties: Properties, *, refusal: bool = False) -> None:
        """Send an answer, from any thread; its place is free again when it has gone."""
        size = len(body) + len(ask.response_topic.encode()) + len(ask.correlation or b"") + ENVELOPE
        if size > self._largest:
            body, properties = failure(
                ask,
                PitheadError("serve.too_large", f"the answer has {len(body)} bytes, too many for the broker"),
            )
        # The client calls `_gone` with a lock of its own held, which `publish` takes: ours must be free here.
        try:
            info = self._client.publish(ask.response_topic, body, ask.qos, properties=properties)
        except ValueError:  # what MQTT itself cannot carry
            self._counts.drop("the answer cannot be sent", ask.topic)
            self.forgo(refusal=refusal)
            return
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self._counts.drop("the connection is lost", ask.topic)
            self.forgo(refusal=refusal)
            return
        with self._lock:
            gone = info.mid in self._early
            if gone:
                self._early.remove(info.mid)
            else:
                self._mine[info.mid] = refusal
        if gone:
            self.forgo(refusal=refusal)

    def forgo(self, *, refusal: bool = False) -> None:
        """A request is dealt with, and nothing is sent."""
        with self._lock:
            if refusal:
                self._refusals -= 1
            else:
                self._under_way -= 1

    def close(self) -> None:
        """See ``Connection``."""
        super().close()
        self._client.on_publish = self._client.on_socket_register_write = None

    # ---- on the client's thread

    def _gone(self, _client: Client, _userdata: Any, mid: int, _reason: Any, _properties: Any) -> None:
        with self._lock:
            refusal = self._mine.pop(mid, None)
            if refusal is None:
                self._early.add(mid)
        if refusal is not None:
            self.forgo(refusal=refusal)

    def _connected(self, client: Client, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        self._largest = getattr(properties, "MaximumPacketSize", None) or math.inf
        super()._connected(client, userdata, flags, reason, properties)

    def _message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        ask = self._read(message)
        why = ""
        if message.retain:
            why = "it was retained: nobody waits for it"
        elif not ask.response_topic:
            why = "no response topic"
        elif not usable(ask.response_topic, self._given.prefix, self._given.answers):
            why = "the response topic cannot be used"
        if why:
            self._counts.drop(why, ask.topic)
            return
        if len(ask.payload) > MAX_PAYLOAD:
            self._refuse(
                ask,
                PitheadError("serve.too_large", f"{len(ask.payload)} bytes, at most {MAX_PAYLOAD} are taken"),
            )
            return
        with self._lock:
            free = self._under_way < self._given.concurrency
            self._under_way += free
        if free:
            self._asked(ask)
        else:
            self._refuse(
                ask, PitheadError("serve.overloaded", f"{self._given.concurrency} requests are under way")
            )

    def _refuse(self, ask: Ask, error: PitheadError) -> None:
        with self._lock:
            room = self._refusals < MOST_REFUSALS
            self._refusals += room
        if room:
            self.answer(ask, *failure(ask, error), refusal=True)
        else:
            self._counts.drop("too many refusals wait", ask.topic)

    def _read(self, message: MQTTMessage) -> Ask:
        said = message.properties
        expiry = getattr(said, "MessageExpiryInterval", None)
        pairs = dict(getattr(said, "UserProperty", None) or ())
        header = next((v for k, v in pairs.items() if k.lower() == LENGTH.lower()), None)
        return Ask(
            topic=message.topic,
            payload=bytes(message.payload),
            qos=message.qos,
            response_topic=getattr(said, "ResponseTopic", None) or "",
            correlation=getattr(said, "CorrelationData", None),
            header=None if header is None else header.encode(),
            ends=None if expiry is None else time.monotonic() + expiry,
            connection=self,
        )


class Counts:
    """What was not answered; shared by both threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.dropped = self.expired = 0
        self._said_at = -math.inf
        self._unsaid = 0

    def drop(self, why: str, topic: str) -> None:
        """Count a request that gets no answer, and say so now and then."""
        with self._lock:
            self.dropped += 1
            self._unsaid += 1
            if time.monotonic() - self._said_at < COMPLAIN_S:
                return
            self._said_at, unsaid, self._unsaid = time.monotonic(), self._unsaid, 0
        facts = {"why": why, "topic": topic[:200], "dropped": unsaid, "total": self.dropped}
        log.warning("serving.message_dropped", extra={"facts": facts})


def usable(topic: str, prefix: str, answers: str = "") -> bool:
    """Whether an answer may go there.

    No wildcard, nothing of the broker's or of the fleet's, no request to ourselves, and nothing beside
    ``answers`` where that is given.
    """
    if not topic or len(topic) > 1024 or topic.startswith(("$", f"{prefix}/", f"{ROOT}/")):  # noqa: PLR2004
        return False
    if answers and not topic.startswith(f"{answers}/"):
        return False
    return not any(c in topic for c in "+#\0")


def failure(ask: Ask, error: PitheadError) -> tuple[bytes, Properties]:
    """Return an answer of the protocol's form for errors."""
    properties = properties_of(ask, 0)
    properties.UserProperty = (CODE, error.code)
    said = f"{error.code}: {error.detail or error.spec.summary}"
    return msgspec.json.encode({"error": said}), properties


def properties_of(ask: Ask, header: int) -> Properties:
    """Return the properties of an answer whose JSON part has ``header`` bytes; 0: all of it is JSON."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = "application/octet-stream" if header else "application/json"
    if header:
        properties.UserProperty = (LENGTH, str(header))
    if ask.correlation is not None:
        properties.CorrelationData = ask.correlation
    left = left_of(ask)
    if left is not None:
        properties.MessageExpiryInterval = max(1, math.ceil(left))
    return properties


def left_of(ask: Ask) -> float | None:
    """Return the seconds until it expires, None where it does not."""
    return None if ask.ends is None else ask.ends - time.monotonic()
