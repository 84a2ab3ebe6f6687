"""The routes of REST, and which HTTP status says what. Nothing below knows a status, nothing above a route.

Whoever asks for inference passes: authentication, a look into a table of
targets that were parsed before, the codec, the service. Every other route
may take a task.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Mapping
from typing import Final

import msgspec

from agent.engine.serve import codec, compression, tensors
from agent.engine.serve.http import BINARY, JSON, Request, Respond, Response, Server
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.routes import MAX_CONTROL, Call, Route, Routes
from agent.engine.serve.service import Service
from agent.engine.serve.tokens import ANYBODY, Principal, Tokens
from contract.errors import PitheadError

log = logging.getLogger(__name__)

STATUS: Final[Mapping[str, int]] = {
    "serve.bad_request": 400,
    "serve.unsupported": 400,
    "serve.unknown_model": 404,
    "serve.not_found": 404,
    "serve.conflict": 409,
    "serve.too_large": 413,
    "serve.unsupported_encoding": 415,
    "serve.rate_limited": 429,
    "serve.overloaded": 503,
    "serve.not_ready": 503,
    "serve.model_lost": 503,
    "inference.out_of_memory": 503,
    "serve.timeout": 504,
    "serve.repository_unreadable": 500,
    "serve.state_unwritable": 500,
    "inference.bad_input": 400,
    "inference.run_failed": 400,
    "auth.missing": 401,
    "auth.invalid": 401,
    "auth.forbidden": 403,
}
"""What a model cannot run on is the client's input more often than not: 400, as the field does."""
BIG: Final = 256 * 1024
"""Bodies from here on are compressed in a thread, and inflated if they become so large."""
LARGE_AT_ONCE: Final = 2
"""Bodies that are inflated and taken apart in threads: each may become as large as a body may be."""

_encode: Final = msgspec.json.Encoder().encode
_FROM_A_PAGE: Final = PitheadError("auth.forbidden", "web pages may not use a server that asks for no token")


class Rest:
    """The handler of the HTTP server."""

    def __init__(self, service: Service, tokens: Tokens | None, body_limit: int) -> None:
        self._service, self._tokens, self._body_limit = service, tokens, body_limit
        self._routes = Routes(service)
        self._headers = codec.Headers()
        self._tasks: set[asyncio.Task[None]] = set()
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)

    def shows(self, server: Server) -> None:
        """Let ``/metrics`` show this server's figures."""
        self._routes.server = server

    def handle(self, request: Request, respond: Respond) -> None:
        """See ``http.Handler``."""
        try:
            headers = request.headers
            route = self._routes.find(request.target)
            if self._tokens is None:
                who = ANYBODY
                if b"origin" in headers:
                    respond(refused(_FROM_A_PAGE))
                    return
            else:
                who = self._tokens.who(headers.get(b"authorization"))
            if route is None:
                respond(failure(404, f"there is nothing at {request.target[:200].decode('latin-1')!r}"))
            elif route.infer and request.method == b"POST":
                self._infer(request, route, who, respond)
            else:
                self._act(request, route, who, respond)
        except PitheadError as error:
            respond(refused(error))
        except Exception as error:
            log.exception("rest.failed")
            respond(failure(500, f"{type(error).__name__}"))

    # ---- inference

    def _infer(self, request: Request, route: Route, who: Principal, respond: Respond) -> None:
        headers = request.headers
        encoding = headers.get(b"content-encoding")
        if encoding is not None:
            try:
                request.body = compression.inflate(request.body, encoding, min(BIG, self._body_limit))
            except PitheadError as error:
                if error.code != "serve.too_large":
                    raise
                self._later(request, self._infer_large(request, route, encoding, who, respond), respond)
                return
        header = headers.get(b"inference-header-content-length")
        try:
            asked, wish = codec.decode(route.model, route.version, request.body, header, at_once=True)
        except tensors.TooMuchAtOnceError:
            self._later(request, self._infer_large(request, route, b"", who, respond), respond)
            return
        self._submit(request, asked, wish, who, respond)

    async def _infer_large(
        self, request: Request, route: Route, encoding: bytes, who: Principal, respond: Respond
    ) -> None:
        """Inflate and take apart in a thread; few at once, since all of them hold what came out."""
        header = request.headers.get(b"inference-header-content-length")

        def work() -> tuple[InferRequest, codec.Wish]:
            body = compression.inflate(request.body, encoding, self._body_limit)
            return codec.decode(route.model, route.version, body, header)

        async with self._large:
            asked, wish = await asyncio.get_running_loop().run_in_executor(None, work)
            self._submit(request, asked, wish, who, respond)

    def _submit(
        self, request: Request, asked: InferRequest, wish: codec.Wish, who: Principal, respond: Respond
    ) -> None:
        asked.client = who.name
        accept = request.headers.get(b"accept-encoding")

        def done(answer: InferResponse | PitheadError) -> None:
            if isinstance(answer, PitheadError):
                respond(refused(answer))
                return
            try:
                if codec.takes_long(answer, wish):
                    self._later(request, self._encode_large(answer, wish, accept, respond), respond)
                    return
                body, header_length = self._headers.encode(answer, wish)
                self._give(body, header_length, accept, respond)
            except PitheadError as error:
                respond(refused(error))
            except Exception:
                log.exception("rest.failed")
                respond(failure(500, "the answer cannot be encoded"))

        self._service.submit(asked, done)

    async def _encode_large(
        self, answer: InferResponse, wish: codec.Wish, accept: bytes | None, respond: Respond
    ) -> None:
        loop = asyncio.get_running_loop()
        self._give(*await loop.run_in_executor(None, codec.encode, answer, wish), accept, respond)

    def _give(self, body: bytes, header_length: int, accept: bytes | None, respond: Respond) -> None:
        if header_length:
            response = Response(200, body, BINARY, b"inference-header-content-length: %d\r\n" % header_length)
        else:
            response = Response(200, body)
        if accept is not None and len(body) >= compression.SMALLEST:
            self._compressed(response, accept, respond)
        else:
            respond(response)

    def _compressed(self, response: Response, accept: bytes, respond: Respond) -> None:
        encoding = compression.accepted(accept)
        if encoding is None:
            respond(response)
            return
        response.head += b"content-encoding: %b\r\n" % encoding

        def finish(body: bytes) -> None:
            response.body = body
            respond(response)

        if len(response.body) < BIG:
            finish(compression.compress(response.body, encoding))
            return
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(None, compression.compress, response.body, encoding)
        work.add_done_callback(lambda future: finish(future.result()))

    # ---- all else

    def _act(self, request: Request, route: Route, who: Principal, respond: Respond) -> None:
        found = route.acts.get(request.method)
        if found is None:
            allowed = b", ".join(sorted(route.acts)) or b"POST"
            response = failure(405, f"{request.method[:20].decode('latin-1')} is not for this target")
            response.head += b"allow: %b\r\n" % allowed
            respond(response)
            return
        act, admin = found
        if admin and not who.admin:
            raise PitheadError("auth.forbidden", f"{who.name} may not change what is served")
        encoding = request.headers.get(b"content-encoding")
        body = request.body
        if encoding is not None:
            body = compression.inflate(body, encoding, MAX_CONTROL)
        answer = act(Call(route.model, route.version, route.name, body))
        if isinstance(answer, Response):
            respond(answer)
        else:
            self._later(request, _send(answer, respond), respond)

    def _later(self, request: Request, work: "Awaitable[None]", respond: Respond) -> None:
        async def run() -> None:
            try:
                await work
            except PitheadError as error:
                respond(refused(error))
            except Exception as error:
                log.exception(
                    "rest.failed", extra={"facts": {"target": request.target[:200].decode("latin-1")}}
                )
                respond(failure(500, type(error).__name__))

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _send(answer: Awaitable[Response], respond: Respond) -> None:
    respond(await answer)


def failure(status: int, why: str) -> Response:
    """Return an answer of the protocol's form for errors."""
    return Response(status, _encode({"error": why}), JSON)


def refused(error: PitheadError) -> Response:
    """Return the answer to a request that failed as ``error`` says."""
    response = failure(STATUS.get(error.code, 500), f"{error.code}: {error.detail or error.spec.summary}")
    if error.retryable:
        wait = error.facts.get("retry_after_s", 1)
        seconds = wait if isinstance(wait, int | float) else 1
        response.head = b"retry-after: %d\r\n" % max(1, math.ceil(seconds))
    elif response.status == 401:  # noqa: PLR2004
        response.head = b'www-authenticate: Bearer realm="pithead"\r\n'
    return response
