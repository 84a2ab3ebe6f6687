"""The Open Inference Protocol over gRPC, on the event loop that REST is on; imported only when asked for.

The transport is ``grpc.aio``. Handlers are generic and take bytes, so that malformed messages become
INVALID_ARGUMENT instead of an error of the library, and raw tensors stay bytes. An empty handler costs
some 240 us of CPU a call on uvloop, on asyncio's own loop 275, from a thread pool 215 to 430; two fifths
of it are switches between the library's threads and the loop's. Tokens, decoding, checking, running and
encoding a small model add some 35 when they are called in a row and about twice that in between. That
gives about what a script with the same library does, and 0.7 of Triton, whose transport is C++.

What more would take: HTTP/2 on the loop itself, without the completion queue between threads and the
tasks of each call. REST's parser answers a request in a tenth of the time; frames, HPACK and flow control
in Python may double that, and requests that come in one read would be batched. The price is a protocol
full of traps (rapid reset, floods of CONTINUATION and SETTINGS) that the library's authors look after
here. ``ModelStreamInfer`` opens a call once and saves a part; REST in binary is the way to more today.

What a client may cost: messages, calls, connections, metadata and handshakes are bounded; calls whose
message does not arrive in time, and streams that are not read, are let go; dead peers are found by
pings. An answer that a living client does not read waits in the library until its connection ends, which
grpc.aio gives no means to hasten: it costs its bytes, and no place among the calls that may be open.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError
from msgspec import Struct

from agent.engine.serve import grpc_codec, http, tensors
from agent.engine.serve.grpc_calls import Call, Calls, status_of, words_of
from agent.engine.serve.grpc_stream import Stream
from agent.engine.serve.grpc_templates import Templates
from agent.engine.serve.proto.messages import SERVICE
from agent.engine.serve.requests import InferRequest
from agent.engine.serve.service import Service
from agent.engine.serve.tokens import ANYBODY, Principal, Tokens
from contract.errors import PitheadError

log = logging.getLogger(__name__)

SWEEP_S: Final = 0.5
STREAMS_PER_CONNECTION: Final = 256
"""Calls at once; clients keep more waiting."""
IDLE_S: Final = 600
"""A connection without a call is let go, which clients do not notice."""
PING_S: Final = 30
PING_TIMEOUT_S: Final = 20
MIN_PING_S: Final = 5
"""Clients may ping so often; the library's default of 300 would cut off many a client's default."""
LARGE: Final = 16 * 1024
"""Bytes; smaller messages are bounded by their number."""
_INFER: Final = f"/{SERVICE}/ModelInfer"
_STREAM: Final = f"/{SERVICE}/ModelStreamInfer"
_STRICT: Final = ("triton_grpc_error", "true")
_CODES: Final = {code.name: code for code in grpc.StatusCode}


class Listen(Struct, frozen=True):
    """Where to listen, and how."""

    host: str
    port: int
    """0 takes a free one."""
    limits: http.Limits
    certificate: bytes | None = None
    """PEM; without it nothing is encrypted."""
    key: bytes | None = None


class Server:
    """The listener."""

    def __init__(self, service: Service, tokens: Tokens | None, listen: Listen) -> None:
        self._service, self._listen = service, listen
        self._handlers = _Handlers(service, tokens, listen.limits)
        self._server = grpc.aio.server(options=_options(listen.limits))
        self._server.add_generic_rpc_handlers((self._handlers,))
        self.port = 0

    async def start(self) -> None:
        """Listen; raises ``config.invalid``."""
        listen = self._listen
        address = f"[{listen.host}]:{listen.port}" if ":" in listen.host else f"{listen.host}:{listen.port}"
        try:
            if listen.certificate is None:
                self.port = self._server.add_insecure_port(address)
            else:
                pair = (listen.key or listen.certificate, listen.certificate)
                self.port = self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise PitheadError("config.invalid", f"gRPC cannot listen on {address}: {error}") from error
        await self._server.start()
        self._handlers.sweep()

    async def stop(self, drain_s: float) -> None:
        """Take no more calls, answer those that are there, end."""
        self._handlers.end()
        await self._server.stop(drain_s)
        self._handlers.close()


class _Handlers:
    """What the library asks for the handler of each call that begins."""

    def __init__(self, service: Service, tokens: Tokens | None, limits: http.Limits) -> None:
        self._service, self._tokens, self._limits = service, tokens, limits
        self._loop = asyncio.get_running_loop()
        self._longest_s = service.catalogue.limits.policy.timeout_s
        self._open: dict[asyncio.Task[Any] | None, float] = {}
        """The tasks of calls that are not answered, and when their message has to be there."""
        self._overdue: set[asyncio.Task[Any] | None] = set()
        self._streams: set[Stream] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._ending = False
        self._templates = Templates()
        self._held = 0
        """Bytes of messages, and of their answers, whose calls have not ended."""
        self._most_held = max(limits.all_bodies_bytes, limits.body_bytes)
        self._calls = {path: self._unary(self._acts(call)) for path, call in Calls(service).by_path.items()}
        self._calls[_INFER] = self._unary(self._infer)
        self._calls[_STREAM] = grpc.stream_stream_rpc_method_handler(self._stream)

    def service(self, handler_call_details: Any) -> Any:
        """Return the handler of a call, before its message is read; None for one that is not known."""
        handler = self._calls.get(handler_call_details.method)
        if handler is None:
            return None
        limits = self._limits
        if len(self._open) >= limits.connections:
            error = PitheadError("serve.overloaded", f"{len(self._open)} calls are open", retry_after_s=1)
            return self._refusing(error)
        if self._tokens is not None:
            try:
                self._who(handler_call_details.invocation_metadata)
            except PitheadError as error:
                return self._refusing(error)
        self._open[asyncio.current_task(self._loop)] = time.monotonic() + limits.body_s
        return handler

    # ---- calls

    def _unary(self, work: Callable[[bytes, Any], Awaitable[bytes]]) -> Any:
        """Return a handler that reads one message itself: the library's own would wait for it for ever."""

        async def handle(_messages: Any, context: Any) -> bytes:
            task = asyncio.current_task(self._loop)
            try:
                data = await self._message(context, task)
                self._hold(context, len(data))
                answer = await work(data, context)
                self._hold(context, len(answer))
            except PitheadError as error:
                refused = error
            except Exception as error:
                log.exception("grpc.failed")
                refused = _internal(error)
            else:
                self._count("OK")
                return answer
            finally:
                self._open.pop(task, None)
            return await self._refuse(context, refused)

        return grpc.stream_unary_rpc_method_handler(handle)

    async def _message(self, context: Any, task: "asyncio.Task[Any] | None") -> bytes:
        try:
            data: bytes = await context.read()
        except asyncio.CancelledError:
            if task is None or task not in self._overdue:
                raise
            task.uncancel()
            raise PitheadError("serve.timeout", "the message did not arrive in time") from None
        finally:
            self._overdue.discard(task)
            self._open[task] = float("inf")
        if data is grpc.aio.EOF:
            raise PitheadError("serve.bad_request", "there is no message")
        return data

    def _hold(self, context: Any, size: int) -> None:
        """Count large bytes until the call has ended, when its answer has been read or given up."""
        if size < LARGE:
            return
        if self._held + size > self._most_held:
            raise PitheadError("serve.overloaded", "too many messages are not answered or read yet")
        self._held += size

        def ended(_context: Any) -> None:
            self._held -= size

        context.add_done_callback(ended)

    async def _infer(self, data: bytes, context: Any) -> bytes:
        try:
            request, wish = self._templates.decode(data)
        except tensors.TooMuchAtOnceError:
            request, wish = await self._loop.run_in_executor(None, grpc_codec.decode, data)
        if self._service.rates is not None:
            request.client = self._who(context.invocation_metadata()).name
        self._hurry(request, context)
        return self._templates.encode(await self._service.infer(request), wish)

    def _acts(self, call: Call) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def act(data: bytes, context: Any) -> bytes:
            said = _parsed(call, data)
            if self._tokens is not None and call.admin(said):
                _must_be_admin(self._who(context.invocation_metadata()))
            answer = call.act(said)
            fields = await answer if isinstance(answer, Awaitable) else answer
            made: bytes = call.response(**fields).SerializeToString()
            return made

        return act

    async def _stream(self, _messages: Any, context: Any) -> None:
        task = asyncio.current_task(self._loop)
        self._open[task] = float("inf")
        metadata = tuple(context.invocation_metadata() or ())
        strict = any((key, value) == _STRICT for key, value in metadata)
        try:
            client = self._who(metadata).name
        except PitheadError as error:  # the tokens have changed since the call began
            self._open.pop(task, None)
            await self._refuse(context, error)
        stream = Stream(self._service, context, self._limits.read_s, client, strict=strict)
        self._streams.add(stream)
        if self._ending:
            stream.end()
        try:
            await stream.run()
        except Exception as error:
            log.exception("grpc.failed")
            stream.failed = _internal(error)
        finally:
            self._streams.discard(stream)
            self._open.pop(task, None)
        if stream.failed is not None:
            await self._refuse(context, stream.failed)
        self._count("OK")

    def _hurry(self, request: InferRequest, context: Any) -> None:
        """Do not begin to run what the client will not wait for."""
        left = context.time_remaining()
        if left is not None and left < (request.timeout_us * 1e-6 or self._longest_s):
            request.timeout_us = max(1, int(left * 1e6))

    # ---- who may

    def _who(self, metadata: Sequence[tuple[str, str | bytes]] | None) -> Principal:
        if self._tokens is None:
            return ANYBODY
        for key, value in metadata or ():
            if key == "authorization":
                return self._tokens.who(value.encode() if isinstance(value, str) else value)
        return self._tokens.who(None)

    def _refusing(self, error: PitheadError) -> Any:
        """Return a handler that refuses without reading: one for streams does for all calls."""

        async def refuse(_messages: Any, context: Any) -> None:
            await self._refuse(context, error)

        return grpc.stream_stream_rpc_method_handler(refuse)

    # ---- how it ends

    async def _refuse(self, context: Any, error: PitheadError) -> NoReturn:
        name = status_of(error)
        self._count(name)
        wait = error.facts.get("retry_after_s", 1) if error.retryable else None
        metadata: tuple[tuple[str, str], ...] = ()
        if isinstance(wait, int | float):
            metadata = (("grpc-retry-pushback-ms", str(max(1, round(wait * 1000)))),)
        await context.abort(_CODES[name], words_of(error), metadata)
        raise AssertionError  # abort raises

    def _count(self, name: str) -> None:
        answers = self._service.grpc_answers
        answers[name] = answers.get(name, 0) + 1

    # ---- housekeeping

    def sweep(self) -> None:
        """Wake the calls whose message does not come, twice a second."""
        now = time.monotonic()
        for task, deadline in self._open.items():
            if task is not None and deadline < now and task not in self._overdue:
                self._overdue.add(task)
                task.cancel()
        self._sweeper = self._loop.call_later(SWEEP_S, self.sweep)

    def end(self) -> None:
        """Let streams end after what they have read."""
        self._ending = True
        for stream in self._streams:
            stream.end()

    def close(self) -> None:
        """Sweep no more."""
        if self._sweeper is not None:
            self._sweeper.cancel()


def _must_be_admin(who: Principal) -> None:
    if not who.admin:
        raise PitheadError("auth.forbidden", f"{who.name} may not change what is served")


def _internal(error: Exception) -> PitheadError:
    return PitheadError("internal.error", type(error).__name__)


def _parsed(call: Call, data: bytes) -> Any:
    try:
        return call.request.FromString(data)
    except DecodeError as error:
        name = call.request.DESCRIPTOR.name
        raise PitheadError("serve.bad_request", f"the message is no {name}: {error}") from error


def _options(limits: http.Limits) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.header_bytes // 2),
        ("grpc.absolute_max_metadata_size", limits.header_bytes),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.server_handshake_timeout_ms", round(limits.header_s * 1000)),
        ("grpc.max_connection_idle_ms", IDLE_S * 1000),
        ("grpc.keepalive_time_ms", PING_S * 1000),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_S * 1000),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_S * 1000),
    ]
