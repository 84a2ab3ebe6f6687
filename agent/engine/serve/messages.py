"""Requests as MQTT 5 messages: the body of REST, on a topic for each model, answered where the client says.

``<prefix>/<model>`` takes what ``POST /v2/models/<model>/infer`` takes, JSON or
binary; the length of the JSON part before binary tensors is a user property,
named as the header of REST. The answer goes to the request's response topic
with its correlation data and its quality of service, and lives as long as the
request would have. Who may ask is the broker's matter.

Messages come on the client's thread and are answered on the loop's.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from threading import Lock
from typing import Any, Final, Literal, NamedTuple

import msgspec
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.core.settings import ServeMqtt
from agent.engine.clock import Clock
from agent.engine.serve import codec
from agent.engine.serve.requests import InferResponse
from agent.engine.serve.service import Service
from agent.engine.serve.tokens import BY_BROKER
from agent.engine.sources.broker import Connection
from contract.errors import PitheadError

log = logging.getLogger(__name__)

LENGTH: Final = "Inference-Header-Content-Length"
CODE: Final = "error-code"
"""User property of an answer that is an error."""
MAX_PAYLOAD: Final = 8 * 1024 * 1024
"""Larger requests are answered with an error..."""
MAX_PACKET: Final = 16 * 1024 * 1024
"""...and the broker does not even send these."""
SHORTEST_S: Final = 1.0
LONGEST_S: Final = 30.0
"""Between two connections."""
STEADY_S: Final = 60.0
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
        self._early: set[int] = set()
        """Answers that had gone before they were noted."""
        # With this, `publish` of another thread leaves the writing to the client's own.
        self._client.on_socket_register_write = lambda *_: None
        self._client.on_publish = self._gone

    def answer(self, ask: Ask, body: bytes, properties: Properties, *, refusal: bool = False) -> None:
        """Send an answer, from any thread; its place is free again when it has gone."""
        # The client calls `_gone` with a lock of its own held, which `publish` takes: ours must be free here.
        info = self._client.publish(ask.response_topic, body, ask.qos, properties=properties)
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

    def _message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        ask = self._read(message)
        if not usable(ask.response_topic, self._given.prefix):
            why = "no response topic" if not ask.response_topic else "the response topic cannot be used"
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


class Responder:
    """Keeps a connection to the broker, and answers what comes by it. On the loop's thread."""

    def __init__(self, given: ServeMqtt, service: Service, clock: Clock) -> None:
        self._given, self._service, self._clock = given, service, clock
        self._loop = asyncio.get_running_loop()
        self._headers = codec.Headers()
        self._connection: Exchange | None = None
        self._since = self._again = 0.0
        self._pause = SHORTEST_S
        self._problem = ""
        self._up = False
        self.counts = Counts()

    @property
    def state(self) -> Literal["connecting", "connected", "failed"]:
        """Whether requests can come."""
        if self._problem:
            return "failed"
        return "connected" if self._up else "connecting"

    @property
    def detail(self) -> str:
        """What is wrong, and what was not answered."""
        dropped = f"{self.counts.dropped} requests dropped" if self.counts.dropped else ""
        expired = f"{self.counts.expired} expired" if self.counts.expired else ""
        return "; ".join(part for part in (self._problem[:1000], dropped, expired) if part)

    def tick(self, now: float) -> None:
        """Look after the connection; call it every second."""
        if self._connection is None:
            if now >= self._again:
                self._connect(now)
            return
        try:
            self._up = self._connection.check(alive=self._connection.alive)
        except PitheadError as error:
            self._lose(error, now)
            return
        if self._up:
            if self._problem:
                log.info("serving.mqtt_recovered")
            self._problem = ""
            if now - self._since > STEADY_S:
                self._pause = SHORTEST_S

    async def close(self) -> None:
        """Take no more. What is being answered has no way out any more."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._loop.run_in_executor(None, connection.close)

    def _connect(self, now: float) -> None:
        self._since = now
        try:
            self._connection = Exchange(self._given, self._take, self.counts, self._clock)
        except PitheadError as error:
            self._lose(error, now)
        else:
            self._connection.start()

    def _lose(self, error: PitheadError, now: float) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            self._loop.run_in_executor(None, connection.close)
        if self._problem != error.detail:
            facts = {"code": error.code, "detail": error.detail}
            log.warning("serving.mqtt_failed", extra={"facts": facts})
        self._up, self._problem = False, error.detail
        self._again, self._pause = now + self._pause, min(2 * self._pause, LONGEST_S)

    # ---- requests

    def _take(self, ask: Ask) -> None:
        """On the client's thread."""
        try:
            self._loop.call_soon_threadsafe(self._infer, ask)
        except RuntimeError:  # the loop has ended; nobody answers
            ask.connection.forgo()

    def _infer(self, ask: Ask) -> None:
        left = _left(ask)
        if left is not None and left <= 0:
            self._expire(ask)
            return
        try:
            model = ask.topic[len(self._given.prefix) + 1 :]
            request, wish = codec.decode(model, "", ask.payload, ask.header)
            request.client = BY_BROKER.name
        except PitheadError as error:
            self._send(ask, *failure(ask, error))
            return
        if left is not None:
            most = max(1, round(left * 1e6))
            request.timeout_us = min(request.timeout_us or most, most)

        def done(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                self._send(ask, *failure(ask, answer))
                return
            try:
                body, header = self._headers.encode(answer, wish)
            except Exception:
                log.exception("serving.answer_failed")
                error = PitheadError("internal.error", "the answer cannot be encoded")
                self._send(ask, *failure(ask, error))
                return
            self._send(ask, body, _properties(ask, header))

        self._service.submit(request, done)

    def _send(self, ask: Ask, body: bytes, properties: Properties) -> None:
        left = _left(ask)
        if left is not None and left <= 0:
            self._expire(ask)
        else:
            ask.connection.answer(ask, body, properties)

    def _expire(self, ask: Ask) -> None:
        """Nobody waits for it any more."""
        self.counts.expired += 1
        ask.connection.forgo()


def usable(topic: str, prefix: str) -> bool:
    """Whether an answer may go there: no wildcard, nothing of the broker's own, no request to ourselves."""
    if not topic or len(topic) > 1024 or topic.startswith(("$", f"{prefix}/")):  # noqa: PLR2004
        return False
    return not any(c in topic for c in "+#\0")


def failure(ask: Ask, error: PitheadError) -> tuple[bytes, Properties]:
    """Return an answer of the protocol's form for errors."""
    properties = _properties(ask, 0)
    properties.UserProperty = (CODE, error.code)
    said = f"{error.code}: {error.detail or error.spec.summary}"
    return msgspec.json.encode({"error": said}), properties


def _properties(ask: Ask, header: int) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = "application/octet-stream" if header else "application/json"
    if header:
        properties.UserProperty = (LENGTH, str(header))
    if ask.correlation is not None:
        properties.CorrelationData = ask.correlation
    left = _left(ask)
    if left is not None:
        properties.MessageExpiryInterval = max(1, math.ceil(left))
    return properties


def _left(ask: Ask) -> float | None:
    return None if ask.ends is None else ask.ends - time.monotonic()
