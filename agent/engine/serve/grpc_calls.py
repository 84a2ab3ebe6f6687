"""What each call of the protocol does, but for inference: a message in, a message out.

Nothing here knows gRPC; ``STATUS`` alone says which of its status codes an error is.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

from agent.engine.serve.proto import messages
from agent.engine.serve.proto.messages import CALLS, CLASSES
from agent.engine.serve.service import Service
from contract.errors import PitheadError

Wire: TypeAlias = Any
"""A message of ``proto``."""
Answer: TypeAlias = Mapping[str, Any]
"""The fields of the message that answers."""
Act: TypeAlias = Callable[[Wire], Answer | Awaitable[Answer]]

STATUS: Final[Mapping[str, str]] = {
    "serve.bad_request": "INVALID_ARGUMENT",
    "inference.bad_input": "INVALID_ARGUMENT",
    "inference.run_failed": "INVALID_ARGUMENT",
    "serve.unsupported": "UNIMPLEMENTED",
    "serve.unknown_model": "NOT_FOUND",
    "serve.not_found": "NOT_FOUND",
    "serve.conflict": "ALREADY_EXISTS",
    "serve.too_large": "RESOURCE_EXHAUSTED",
    "inference.out_of_memory": "RESOURCE_EXHAUSTED",
    "serve.rate_limited": "RESOURCE_EXHAUSTED",
    "serve.overloaded": "UNAVAILABLE",
    "serve.not_ready": "UNAVAILABLE",
    "serve.model_lost": "UNAVAILABLE",
    "serve.timeout": "DEADLINE_EXCEEDED",
    "serve.repository_unreadable": "FAILED_PRECONDITION",
    "auth.missing": "UNAUTHENTICATED",
    "auth.invalid": "UNAUTHENTICATED",
    "auth.forbidden": "PERMISSION_DENIED",
}
"""Names of gRPC's status codes; any other error is INTERNAL. What a model cannot run on is the client's
input more often than not, as it is for REST."""

_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3


class Call(NamedTuple):
    """One call."""

    path: str
    request: Any
    response: Any
    act: Act
    admin: Callable[[Wire], bool]
    """Whether only an admin may."""


class Calls:
    """All of them, by path."""

    def __init__(self, service: Service) -> None:
        self._service = service
        acts: dict[str, Act] = {
            "ServerLive": lambda _: {"live": True},
            "ServerReady": lambda _: {"ready": service.ready},
            "ModelReady": self._model_ready,
            "ServerMetadata": lambda _: _fields(service.server_metadata()),
            "ModelMetadata": self._metadata,
            "ModelConfig": self._config,
            "ModelStatistics": lambda said: {"model_stats": service.statistics(said.name, said.version)},
            "RepositoryIndex": self._index,
            "RepositoryModelLoad": self._load,
            "RepositoryModelUnload": self._unload,
            "SystemSharedMemoryStatus": self._memory_status,
            "SystemSharedMemoryRegister": self._register,
            "SystemSharedMemoryUnregister": self._unregister,
            "CudaSharedMemoryStatus": _no_cuda,
            "CudaSharedMemoryRegister": _no_cuda,
            "CudaSharedMemoryUnregister": _no_cuda,
            "TraceSetting": self._trace,
            "LogSettings": self._logging,
        }
        self.by_path = {
            f"/{messages.SERVICE}/{name}": Call(
                f"/{messages.SERVICE}/{name}",
                CLASSES[f"{name}Request"],
                CLASSES[f"{name}Response"],
                acts[name],
                _ADMIN.get(name, _never),
            )
            for name in CALLS
            if name in acts
        }
        health = messages.health()
        self.by_path[health.path] = Call(*health, self._health, _never)

    def _model_ready(self, said: Wire) -> Answer:
        try:
            return {"ready": self._service.model_ready(said.name, said.version)}
        except PitheadError as error:
            if error.code != "serve.unknown_model":
                raise
            return {"ready": False}

    async def _metadata(self, said: Wire) -> Answer:
        found = _fields(await self._service.metadata(said.name, said.version))
        return {**found, "inputs": map(_fields, found["inputs"]), "outputs": map(_fields, found["outputs"])}

    async def _config(self, said: Wire) -> Answer:
        return {"config": await self._service.config(said.name, said.version)}

    async def _index(self, said: Wire) -> Answer:
        return {"models": map(_fields, await self._service.index(ready_only=said.ready))}

    async def _load(self, said: Wire) -> Answer:
        name, config = _model_of(said), None
        for key, value in said.parameters.items():
            if key != "config":
                raise PitheadError(
                    "serve.bad_request",
                    f"parameters.{key[:100]}: only config is taken; models come from the directory",
                )
            if value.WhichOneof("parameter_choice") != "string_param":
                raise PitheadError("serve.bad_request", "parameters.config: must be JSON in a text")
            config = value.string_param
        await self._service.load(name, config)
        return {"model_name": name, "isLoaded": True}

    def _unload(self, said: Wire) -> Answer:
        name = _model_of(said)
        self._service.unload(name)
        return {"model_name": name, "isUnloaded": True}

    def _memory_status(self, said: Wire) -> Answer:
        return {"regions": {r.name: _fields(r) for r in self._service.shared_memory.status(said.name)}}

    def _register(self, said: Wire) -> Answer:
        if not said.name:
            raise PitheadError("serve.bad_request", "name: is missing")
        self._service.shared_memory.register(said.name, said.key, said.offset, said.byte_size)
        return {}

    def _unregister(self, said: Wire) -> Answer:
        self._service.shared_memory.unregister(said.name)
        return {}

    def _trace(self, said: Wire) -> Answer:
        changes: dict[str, object] = {}
        for key, held in said.settings.items():
            values = list(held.value)
            changes[key] = None if not values else values if len(values) > 1 else values[0]
        if changes:
            found = self._service.change_trace(changes, said.model_name)
        else:
            found = self._service.trace(said.model_name)
        return {
            "settings": {k: {"value": list(v) if isinstance(v, list) else [str(v)]} for k, v in found.items()}
        }

    def _logging(self, said: Wire) -> Answer:
        settings = self._service.settings
        changes = {
            key: getattr(value, which)
            for key, value in said.settings.items()
            if (which := value.WhichOneof("parameter_choice")) is not None
        }
        found = settings.change_logging(changes) if changes else settings.logging()
        return {"settings": {key: {_KIND[type(value)]: value} for key, value in found.items()}}

    def _health(self, said: Wire) -> Answer:
        """Answer for the server, or for a model where its name is asked for."""
        if said.service in {"", messages.SERVICE}:
            return {"status": _SERVING if self._service.ready else _NOT_SERVING}
        try:
            ready = self._service.model_ready(said.service)
        except PitheadError:
            return {"status": _SERVICE_UNKNOWN}
        return {"status": _SERVING if ready else _NOT_SERVING}


_KIND: Final = {bool: "bool_param", int: "uint32_param", str: "string_param"}


def _never(_said: Wire) -> bool:
    return False


def _always(_said: Wire) -> bool:
    return True


def _changes(said: Wire) -> bool:
    return bool(said.settings)


_ADMIN: Final[Mapping[str, Callable[[Wire], bool]]] = {
    "RepositoryModelLoad": _always,
    "RepositoryModelUnload": _always,
    "SystemSharedMemoryRegister": _always,
    "SystemSharedMemoryUnregister": _always,
    "TraceSetting": _changes,
    "LogSettings": _changes,
}


def _fields(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


def _model_of(said: Wire) -> str:
    """Return the model's name: KServe's clients put it where Triton's put the repository's."""
    name: str = said.model_name or said.repository_name
    if not name:
        raise PitheadError("serve.bad_request", "model_name: is missing")
    return name


def _no_cuda(_said: Wire) -> Answer:
    raise PitheadError("serve.unsupported", "there is no CUDA shared memory here")


def status_of(error: PitheadError) -> str:
    """Return the name of the status code."""
    return STATUS.get(error.code, "INTERNAL")


def words_of(error: PitheadError) -> str:
    """Return what the client is told; it travels in a header, so it is short."""
    return f"{error.code}: {error.detail or error.spec.summary}"[:MAX_WORDS]


MAX_WORDS: Final = 500
"""Characters; clients take 8 KiB of headers, where one of them may be 12 bytes long."""
