"""A cap on the size of request bodies, counted and not believed."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from control_plane.api.problems import problem


class BodyLimit:
    """ASGI middleware: reads a body before the app does, and answers 413 to one that is too large.

    Paths below ``uncapped`` stream their body and count for themselves; the
    paths in ``larger`` have a limit of their own.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        uncapped: Sequence[str] = (),
        larger: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._app = app
        self._limit = limit
        self._uncapped = tuple(uncapped)
        self._larger = larger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or str(scope["path"]).startswith(self._uncapped):
            await self._app(scope, receive, send)
            return
        limit = self._larger.get(str(scope["path"]), self._limit)
        body = bytearray()
        more = scope["method"] not in {"GET", "HEAD"}
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client left
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                answer = problem("request.too_large", f"the body is above {limit} bytes")
                answer.headers["Connection"] = "close"
                await answer(scope, receive, send)
                return
        await self._app(scope, _once(bytes(body), receive), send)


class StorableAddress:
    """ASGI middleware: answers 422 to a NUL in the path or in a parameter, which no database takes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        place = _nul(scope) if scope["type"] == "http" else None
        if place is None:
            await self._app(scope, receive, send)
        else:
            await problem("request.invalid", f"{place}: holds a NUL")(scope, receive, send)


def _nul(scope: Scope) -> str | None:
    if "\0" in str(scope["path"]):
        return "path"
    for name, value in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if "\0" in name + value:
            return f"query.{name}".replace("\0", "\\0")
    return None


def _once(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
