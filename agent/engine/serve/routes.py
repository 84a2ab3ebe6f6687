"""What there is below ``/v2`` and beside it, but for inference itself: a table of targets and what they do.

Targets are parsed once; what was found is remembered by the target's bytes.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, TypeAlias
from urllib.parse import unquote

import msgspec

from agent.engine.serve import metrics
from agent.engine.serve.http import TEXT, Response, Server
from agent.engine.serve.service import Service
from contract.errors import PitheadError

MAX_ROUTES: Final = 2048
MAX_REMEMBERED: Final = 300
"""Bytes of a target that is remembered: anybody can think of 2048 long ones."""
MAX_CONTROL: Final = 4 * 1024 * 1024

_encode: Final = msgspec.json.Encoder().encode
_body: Final = msgspec.json.Decoder(dict[str, Any])


class Call:
    """A request and what its path says."""

    __slots__ = ("body", "model", "name", "version")

    def __init__(self, model: str, version: str, name: str, body: bytes | bytearray) -> None:
        self.model, self.version, self.name, self.body = model, version, name, body

    def document(self) -> dict[str, Any]:
        """Return the body, an object or nothing; raises ``serve.bad_request``."""
        if len(self.body) > MAX_CONTROL:
            raise PitheadError("serve.too_large", f"at most {MAX_CONTROL} bytes are taken here")
        if not self.body.strip():
            return {}
        try:
            return _body.decode(self.body)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise PitheadError("serve.bad_request", f"the body is no JSON object: {error}") from error


Answer: TypeAlias = Response | Awaitable[Response]
Act: TypeAlias = Callable[[Call], Answer]
Acts: TypeAlias = Mapping[bytes, tuple[Act, bool]]
"""By method: what to do, and whether only an admin may."""


class Route:
    """What a target leads to."""

    __slots__ = ("acts", "infer", "model", "name", "version")

    def __init__(
        self, acts: "Mapping[bytes, tuple[Act, bool]]", model: str = "", version: str = "", name: str = ""
    ) -> None:
        self.acts = acts
        """By method: what to do, and whether only an admin may."""
        self.model, self.version, self.name = model, version, name
        self.infer = False


class Routes:
    """All targets."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.server: Server | None = None
        """Whose figures ``/metrics`` shows."""
        self._known: dict[bytes, Route] = {}
        self._fixed: Mapping[str, Acts] = {
            "metrics": _get(self._metrics),
            "v2": _get(self._server_metadata),
            "v2/health/live": _get(self._live),
            "v2/health/ready": _get(self._ready),
            "v2/models/stats": _get(self._stats),
            "v2/repository/index": _post(self._index, admin=False) | _get(self._index),
            "v2/trace/setting": _get(self._trace) | _post(self._change_trace),
            "v2/logging": _get(self._logging) | _post(self._change_logging),
            "v2/systemsharedmemory/status": _get(self._memory_status),
            "v2/systemsharedmemory/unregister": _post(self._unregister),
        }
        self._of_model: Mapping[str, Acts] = {
            "": _get(self._model_metadata),
            "ready": _get(self._model_ready),
            "config": _get(self._config),
            "stats": _get(self._stats),
            "trace/setting": _get(self._trace) | _post(self._change_trace),
            "steering": _get(self._steering),
            "reward": _post(self._reward, admin=False),
            "infer": {},
        }
        self._of_repository: Mapping[str, Acts] = {"load": _post(self._load), "unload": _post(self._unload)}
        self._of_region: Mapping[str, Acts] = {
            "status": _get(self._memory_status),
            "register": _post(self._register),
            "unregister": _post(self._unregister),
        }

    def find(self, target: bytes) -> Route | None:
        """Return where ``target``, as it stands in the request, leads."""
        route = self._known.get(target)
        if route is None:
            route = self._parse(target)
            if route is not None and len(target) <= MAX_REMEMBERED:
                if len(self._known) >= MAX_ROUTES:
                    self._known.clear()
                self._known[target] = route
        return route

    def _parse(self, target: bytes) -> Route | None:
        try:
            path = target.partition(b"?")[0].decode("ascii").strip("/")
            acts = self._fixed.get(path)
            parts = [unquote(part, errors="strict") for part in path.split("/")]
        except UnicodeDecodeError:
            return None
        return self._match(parts) if acts is None else Route(acts)

    def _match(self, parts: list[str]) -> Route | None:
        match parts:
            case ["v2", "models", model, "versions", version, *rest] if model and version:
                return _route(self._of_model, rest, model, version)
            case ["v2", "models", model, *rest] if model:
                return _route(self._of_model, rest, model)
            case ["v2", "repository", "models", model, *rest]:
                return _route(self._of_repository, rest, model)
            case ["v2", "systemsharedmemory", "region", name, *rest]:
                return _route(self._of_region, rest, name=name)
            case ["v2", "cudasharedmemory", *_]:
                return Route(_get(_no_cuda) | _post(_no_cuda))
        return None

    def _metrics(self, _call: Call) -> Answer:
        assert self.server is not None
        return Response(200, metrics.render(self._service, self.server), TEXT)

    def _server_metadata(self, _call: Call) -> Answer:
        return _json(self._service.server_metadata())

    def _live(self, _call: Call) -> Answer:
        return _json({"live": True})

    def _ready(self, _call: Call) -> Answer:
        ready = self._service.ready
        return _json({"ready": ready}, 200 if ready else 503)

    def _model_ready(self, call: Call) -> Answer:
        ready = self._service.model_ready(call.model, call.version)
        return _json({"name": call.model, "ready": ready}, 200 if ready else 503)

    async def _model_metadata(self, call: Call) -> Response:
        return _json(await self._service.metadata(call.model, call.version))

    async def _config(self, call: Call) -> Response:
        return _json(await self._service.config(call.model, call.version))

    def _stats(self, call: Call) -> Answer:
        return _json({"model_stats": self._service.statistics(call.model, call.version)})

    async def _index(self, call: Call) -> Response:
        return _json(await self._service.index(ready_only=call.document().get("ready") is True))

    async def _load(self, call: Call) -> Response:
        parameters = call.document().get("parameters") or {}
        config = parameters.get("config") if isinstance(parameters, dict) else None
        if not isinstance(parameters, dict) or any(key != "config" for key in parameters):
            raise PitheadError(
                "serve.bad_request", "parameters: only config is taken; models come from the directory"
            )
        if config is not None and not isinstance(config, str):
            raise PitheadError("serve.bad_request", "parameters.config: must be JSON in a text")
        await self._service.load(call.model, config)
        return _json({})

    def _unload(self, call: Call) -> Answer:
        call.document()
        self._service.unload(call.model)
        return _json({})

    def _trace(self, call: Call) -> Answer:
        return _json(self._service.trace(call.model))

    def _change_trace(self, call: Call) -> Answer:
        return _json(self._service.change_trace(call.document(), call.model))

    def _steering(self, call: Call) -> Answer:
        return _json(self._service.steering.find(call.model).document())

    async def _reward(self, call: Call) -> Response:
        try:
            said = msgspec.convert(call.document(), _Reward)
        except msgspec.ValidationError as error:
            raise PitheadError("serve.bad_request", str(error)) from error
        await self._service.steering.reward(call.model, said.id, said.reward)
        return _json({})

    def _logging(self, _call: Call) -> Answer:
        return _json(self._service.settings.logging())

    def _change_logging(self, call: Call) -> Answer:
        return _json(self._service.settings.change_logging(call.document()))

    def _memory_status(self, call: Call) -> Answer:
        return _json(self._service.shared_memory.status(call.name))

    def _register(self, call: Call) -> Answer:
        try:
            said = msgspec.convert(call.document(), _Registration)
        except msgspec.ValidationError as error:
            raise PitheadError("serve.bad_request", str(error)) from error
        self._service.shared_memory.register(call.name, said.key, said.offset, said.byte_size)
        return _json({})

    def _unregister(self, call: Call) -> Answer:
        self._service.shared_memory.unregister(call.name)
        return _json({})


class _Reward(msgspec.Struct):
    id: Annotated[str, msgspec.Meta(min_length=1)]
    reward: Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Registration(msgspec.Struct):
    key: str
    byte_size: int
    offset: int = 0


def _route(
    table: Mapping[str, Acts], rest: list[str], model: str = "", version: str = "", name: str = ""
) -> Route | None:
    key = "/".join(rest)
    acts = table.get(key)
    if acts is None:
        return None
    route = Route(acts, model, version, name)
    route.infer = key == "infer"
    return route


def _get(act: Act) -> dict[bytes, tuple[Act, bool]]:
    return {b"GET": (act, False)}


def _post(act: Act, *, admin: bool = True) -> dict[bytes, tuple[Act, bool]]:
    return {b"POST": (act, admin)}


def _no_cuda(_call: Call) -> Answer:
    raise PitheadError("serve.unsupported", "there is no CUDA shared memory here")


def _json(document: Any, status: int = 200) -> Response:
    return Response(status, _encode(document))
