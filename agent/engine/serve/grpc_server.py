"""The Open Inference Protocol over gRPC, on the event loop that REST is on, over our own HTTP/2.

An ordinary ``ModelInfer`` passes: the head of its call, which is remembered with its header block; the
token; one message, taken apart by ``grpc_templates``; the service, by callback. No task is made for it.
Every other call may take one.

What a client may cost, ``http2`` says for streams and connections; here messages are bounded, one by one
and all together, and calls whose message does not arrive in time, or whose deadline is over, are ended.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from google.protobuf.message import DecodeError
from msgspec import Struct

from agent.engine.serve import grpc_codec, grpc_wire, http, http2, tensors
from agent.engine.serve.grpc_calls import Call, Calls, status_of, words_of
from agent.engine.serve.grpc_codec import Wish
from agent.engine.serve.grpc_stream import Streamed
from agent.engine.serve.grpc_templates import Templates
from agent.engine.serve.grpc_wire import Head
from agent.engine.serve.http2_bounds import NEVER
from agent.engine.serve.http2_connection import Connection
from agent.engine.serve.http2_stream import Stream
from agent.engine.serve.proto.messages import SERVICE
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.service import Service
from agent.engine.serve.tokens import ANYBODY, Principal, Tokens
from contract.errors import PitheadError

log = logging.getLogger(__name__)

BACKLOG: Final = 1024
LARGE: Final = 16 * 1024
"""Bytes; what is compressed and larger is inflated in a thread."""
LARGE_AT_ONCE: Final = 2
MOST_ELSE: Final = 256 * 1024
"""Bytes of a message of any other call than an inference; it is taken apart on the loop."""
_INFER: Final = f"/{SERVICE}/ModelInfer"
_STREAM: Final = f"/{SERVICE}/ModelStreamInfer"


class Listen(Struct, frozen=True):
    """Where to listen, and how."""

    host: str
    port: int
    """0 takes a free one."""
    limits: http.Limits
    tls: ssl.SSLContext | None = None
    """Without it nothing is encrypted."""


class Server:
    """The listener."""

    def __init__(self, service: Service, tokens: Tokens | None, listen: Listen) -> None:
        self._listen = listen
        self.handler = Handler(service, tokens, listen.limits)
        self.http2: http2.Server | None = None
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        """Listen; raises ``config.invalid``."""
        listen = self._listen
        if listen.tls is not None:
            listen.tls.set_alpn_protocols(["h2"])
        self.http2 = self.handler.server = http2.Server(self.handler, listen.limits)
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self.http2.protocol,
                listen.host,
                listen.port,
                backlog=BACKLOG,
                ssl=listen.tls,
                ssl_handshake_timeout=listen.limits.header_s if listen.tls else None,
            )
        except OSError as error:
            raise PitheadError(
                "config.invalid", f"gRPC cannot listen on {listen.host}:{listen.port}: {error}"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self, drain_s: float) -> None:
        """Take no more calls, answer those that are there, end."""
        if self._server is None or self.http2 is None:
            return
        self._server.close()
        self.handler.end()
        await self.http2.close(drain_s)


class Handler:
    """What HTTP/2 asks when a call begins."""

    head = grpc_wire.HEAD

    def __init__(self, service: Service, tokens: Tokens | None, limits: http.Limits) -> None:
        self.service, self.tokens, self.limits = service, tokens, limits
        self.server: http2.Server | None = None
        self.loop = asyncio.get_running_loop()
        self.longest_s = service.catalogue.limits.policy.timeout_s
        self.templates = Templates()
        self.large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._streams: set[Streamed] = set()
        self._known = 0
        """Which tokens the streams were checked by."""
        self._tasks: set[asyncio.Task[None]] = set()
        self.calls = Calls(service).by_path

    def meaning(self, fields: list[tuple[bytes, bytes]]) -> Head:
        """See ``http2.Handler``."""
        return grpc_wire.head_of(fields)

    def begin(self, stream: Stream, said: Head) -> None:
        """See ``http2.Handler``."""
        assert self.server is not None
        if not said.grpc:
            stream.finish(grpc_wire.WRONG_TYPE)
            return
        try:
            who = self.who(said)
            self._admit(self.server.calls - 1)
            if said.path == _STREAM:
                streamed = Streamed(self, stream, said, who.name)
                self._streams.add(streamed)
                stream.receiver = streamed
                return
            call = self.calls.get(said.path)
            if call is None and said.path != _INFER:
                self.end_with(stream, "UNIMPLEMENTED", f"there is no call {said.path[:200]}", None)
                return
            stream.receiver = Unary(self, stream, said, who, call)
        except PitheadError as error:
            self.refuse(stream, error)

    def sweep(self) -> None:
        """End the streams of whom the tokens know no more."""
        if self.tokens is not None and self.tokens.changes != self._known:
            self._known = self.tokens.changes
            for streamed in list(self._streams):
                streamed.check()

    def _admit(self, others: int) -> None:
        if others >= self.limits.connections:
            raise PitheadError("serve.overloaded", f"{others} calls are open", retry_after_s=1)

    def who(self, said: Head) -> Principal:
        """Return who asks; raises ``auth.missing``, ``auth.invalid``."""
        return ANYBODY if self.tokens is None else self.tokens.who(said.authorization)

    def hold(self, size: int, but: Connection) -> None:
        """Count bytes that are not answered; raises ``serve.overloaded``, and counts them even so."""
        server = self.server
        assert server is not None
        server.held += size
        if server.held > server.most_held and not server.make_room(0, but=but):
            raise PitheadError("serve.overloaded", "too many messages are not answered or read yet")

    def release(self, size: int) -> None:
        """Count them no more."""
        assert self.server is not None
        self.server.held -= size

    def hurry(self, request: InferRequest, until: float) -> None:
        """Do not begin to run what the client will not wait for."""
        if until == NEVER:
            return
        left = until - time.monotonic()
        if left < (request.timeout_us * 1e-6 or self.longest_s):
            request.timeout_us = max(1, int(left * 1e6))

    def later(self, work: Coroutine[Any, Any, None], failed: Callable[[PitheadError], None]) -> None:
        """Do what takes a task, and say how it failed."""

        async def run() -> None:
            try:
                await work
            except PitheadError as error:
                failed(error)
            except Exception as error:
                log.exception("grpc.failed")
                failed(internal(error))

        task = self.loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- how it ends

    def refuse(self, stream: Stream, error: PitheadError) -> None:
        """End a call as ``error`` says."""
        wait = error.facts.get("retry_after_s", 1) if error.retryable else None
        pushback = max(1, round(wait * 1000)) if isinstance(wait, int | float) else None
        self.end_with(stream, status_of(error), words_of(error), pushback)

    def end_with(self, stream: Stream, status: str, words: str, pushback_ms: int | None) -> None:
        """End a call that failed."""
        if stream.open:
            self.count(status)
            stream.refuse(grpc_wire.trailers(status, words, pushback_ms))

    def count(self, name: str) -> None:
        """Count an answer."""
        answers = self.service.grpc_answers
        answers[name] = answers.get(name, 0) + 1

    def forget(self, streamed: Streamed) -> None:
        """A stream has ended."""
        self._streams.discard(streamed)

    def end(self) -> None:
        """Let streams end after what they have read."""
        for streamed in list(self._streams):
            streamed.end()


class Unary:
    """A call of one message. See ``http2_stream.Receiver``."""

    __slots__ = ("_body", "_call", "_handler", "_held", "_ran", "_said", "_stream", "_until", "_who")

    def __init__(
        self, handler: Handler, stream: Stream, said: Head, who: Principal, call: Call | None
    ) -> None:
        self._handler, self._stream, self._said, self._who, self._call = handler, stream, said, who, call
        self._body: grpc_wire.Messages | None = None
        self._held = 0
        self._ran = False
        now = time.monotonic()
        self._until = NEVER if said.timeout_s is None else now + said.timeout_s
        stream.deadline = min(self._until, now + handler.limits.body_s)

    def data(self, payload: bytes, *, ended: bool) -> None:
        """Take a piece of the message; run when it is there."""
        handler = self._handler
        try:
            self._held += len(payload)
            handler.hold(len(payload), self._stream.connection)
            body = self._body
            if body is None:
                body = self._body = grpc_wire.Messages(handler.limits.body_bytes)
            body.feed(payload)
            _at_most_one(body)
            if ended:
                found = _only(body)
                self._stream.deadline = self._until
                self._ran = True
                self._take(*found)
        except PitheadError as error:
            self.refuse(error)
        except Exception as error:
            log.exception("grpc.failed")
            self.refuse(internal(error))

    def lost(self) -> None:
        """The client does not wait."""
        if not self._ran:
            self._free()

    def overdue(self) -> None:
        """The message has not come, or the client's deadline is over."""
        words = "the deadline is over" if self._ran else "the message did not arrive in time"
        self._handler.refuse(self._stream, PitheadError("serve.timeout", words))
        if not self._ran:
            self._free()

    def drained(self) -> None:
        """Nothing more is to be sent."""

    def refuse(self, error: PitheadError) -> None:
        """End the call."""
        self._free()
        self._handler.refuse(self._stream, error)

    def _free(self) -> None:
        self._handler.release(self._held)
        self._held = 0
        self._body = None

    def _take(self, compressed: bool, data: bytes) -> None:  # noqa: FBT001 - of a pair
        if not compressed:
            self._work(data)
        elif len(data) < 1024:  # noqa: PLR2004 - deflate makes at most 1032 bytes of one
            self._work(grpc_wire.inflated(data, self._said.encoding, self._handler.limits.body_bytes))
        else:
            self._handler.later(self._inflate(data), self.refuse)

    async def _inflate(self, data: bytes) -> None:
        handler = self._handler
        async with handler.large:
            whole = await handler.loop.run_in_executor(
                None, grpc_wire.inflated, data, self._said.encoding, handler.limits.body_bytes
            )
            self._held += len(whole)
            handler.hold(len(whole), self._stream.connection)
            self._work(whole)

    def _work(self, data: bytes) -> None:
        if self._call is None:
            try:
                self._submit(*self._handler.templates.decode(data))
            except tensors.TooMuchAtOnceError:
                self._handler.later(self._decode(data), self.refuse)
            return
        if len(data) > MOST_ELSE:
            raise PitheadError("serve.too_large", f"at most {MOST_ELSE} bytes are taken by this call")
        said = _parsed(self._call, data)
        if self._call.admin(said) and not self._who.admin:
            raise PitheadError("auth.forbidden", f"{self._who.name} may not change what is served")
        answer = self._call.act(said)
        if isinstance(answer, Awaitable):
            self._handler.later(self._act(answer), self.refuse)
        else:
            self._answer(self._call.response(**answer).SerializeToString())

    async def _act(self, answer: Awaitable[Any]) -> None:
        assert self._call is not None
        self._answer(self._call.response(**await answer).SerializeToString())

    async def _decode(self, data: bytes) -> None:
        self._submit(*await self._handler.loop.run_in_executor(None, grpc_codec.decode, data))

    def _submit(self, request: InferRequest, wish: Wish) -> None:
        handler = self._handler
        request.client = self._who.name
        handler.hurry(request, self._until)

        def done(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                self.refuse(answer)
                return
            try:
                self._answer(handler.templates.encode(answer, wish))
            except PitheadError as error:
                self.refuse(error)
            except Exception as error:
                log.exception("grpc.failed")
                self.refuse(internal(error))

        handler.service.submit(request, done)

    def _answer(self, data: bytes) -> None:
        self._free()
        if self._stream.open:
            self._handler.count("OK")
            self._stream.deadline = NEVER
            self._stream.send(grpc_wire.framed(data), grpc_wire.OK)


def internal(error: Exception) -> PitheadError:
    """Return what the client is told of an error of ours."""
    return PitheadError("internal.error", type(error).__name__)


def _at_most_one(body: grpc_wire.Messages) -> None:
    if body.surplus:
        raise PitheadError("serve.bad_request", "there is more than one message")


def _only(body: grpc_wire.Messages) -> tuple[bool, bytes]:
    found = body.next()
    if found is None:
        raise PitheadError("serve.bad_request", "there is no message")
    return found


def _parsed(call: Call, data: bytes) -> Any:
    try:
        return call.request.FromString(data)
    except DecodeError as error:
        name = call.request.DESCRIPTOR.name
        raise PitheadError("serve.bad_request", f"the message is no {name}: {error}") from error
