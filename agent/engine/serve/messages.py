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
from collections.abc import Awaitable
from typing import Final, Literal

from paho.mqtt.properties import Properties

from agent.core.settings import ServeMqtt
from agent.engine.clock import Clock
from agent.engine.serve import codec, tensors
from agent.engine.serve.exchange import Ask, Counts, Exchange, failure, left_of, properties_of
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.service import Service
from agent.engine.serve.tokens import BY_BROKER
from contract.errors import PitheadError

log = logging.getLogger(__name__)

SHORTEST_S: Final = 1.0
LONGEST_S: Final = 30.0
"""Between two connections."""
STEADY_S: Final = 60.0
LARGE_AT_ONCE: Final = 2
"""Requests and answers that are taken apart or put together in threads."""


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
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
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
        left = left_of(ask)
        if left is not None and left <= 0:
            self._expire(ask)
            return
        try:
            asked = codec.decode(self._model(ask), "", ask.payload, ask.header, at_once=True)
        except tensors.TooMuchAtOnceError:
            self._later(ask, self._infer_large(ask))
        except PitheadError as error:
            self._send(ask, *failure(ask, error))
        except Exception:
            log.exception("serving.answer_failed")
            self._broke(ask)
        else:
            self._submit(ask, *asked)

    def _model(self, ask: Ask) -> str:
        return ask.topic[len(self._given.prefix) + 1 :]

    async def _infer_large(self, ask: Ask) -> None:
        async with self._large:
            work = self._loop.run_in_executor(
                None, codec.decode, self._model(ask), "", ask.payload, ask.header
            )
            asked = await work
        self._submit(ask, *asked)

    def _submit(self, ask: Ask, request: InferRequest, wish: codec.Wish) -> None:
        request.client = BY_BROKER.name
        left = left_of(ask)
        if left is not None:
            most = max(1, round(left * 1e6))
            request.timeout_us = min(request.timeout_us or most, most)

        def done(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                self._send(ask, *failure(ask, answer))
                return
            try:
                if codec.takes_long(answer, wish):
                    self._later(ask, self._encode_large(ask, answer, wish))
                    return
                body, header = self._headers.encode(answer, wish)
            except PitheadError as error:
                self._send(ask, *failure(ask, error))
            except Exception:
                log.exception("serving.answer_failed")
                self._broke(ask)
            else:
                self._send(ask, body, properties_of(ask, header))

        self._service.submit(request, done)

    async def _encode_large(self, ask: Ask, answer: InferResponse, wish: codec.Wish) -> None:
        async with self._large:
            body, header = await self._loop.run_in_executor(None, codec.encode, answer, wish)
        self._send(ask, body, properties_of(ask, header))

    def _later(self, ask: Ask, work: Awaitable[None]) -> None:
        """See that a request is dealt with, whatever becomes of it: its place must be free again."""

        async def run() -> None:
            try:
                await work
            except PitheadError as error:
                self._send(ask, *failure(ask, error))
            except Exception:
                log.exception("serving.answer_failed")
                self._broke(ask)

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _broke(self, ask: Ask) -> None:
        self._send(ask, *failure(ask, PitheadError("internal.error", "the request cannot be answered")))

    def _send(self, ask: Ask, body: bytes, properties: Properties) -> None:
        left = left_of(ask)
        if left is not None and left <= 0:
            self._expire(ask)
        else:
            ask.connection.answer(ask, body, properties)

    def _expire(self, ask: Ask) -> None:
        """Nobody waits for it any more."""
        self.counts.expired += 1
        ask.connection.forgo()
