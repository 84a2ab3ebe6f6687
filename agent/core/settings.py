"""The device's configuration as types; an unknown key is an error that names it."""

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from agent.core import claims
from agent.core.machine import Machine
from agent.core.serve_models import Client, PipelineSpec, ServedModel
from contract.errors import PitheadError
from contract.messages import Name
from inference.accelerators import Custom, Resources

SOURCE_KINDS: Final = ("http", "images", "modbus", "mqtt", "opcua", "replay", "sparkplug", "system")
"""Sensor sources of the house; each is a module in ``agent.engine.sources``."""
SINK_KINDS: Final = ("file", "http", "modbus", "mqtt", "opcua")
"""Ways out of a lane that the house has; each is a module in ``agent.engine.sinks``."""
SourceTable = dict[str, str | int | float | bool | list[Any] | dict[str, Any] | None]


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """The update server. ``url`` defaults to the one that the device was enrolled with."""

    url: Annotated[str, Meta(pattern=r"^https://")] | None = None
    poll_s: Annotated[float, Meta(ge=0.2, le=86400)] = 30.0


class Broker(Struct, frozen=True, forbid_unknown_fields=True):
    """The MQTT broker. Both default to what the device was enrolled with."""

    host: str | None = None
    port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    keepalive_s: Annotated[int, Meta(ge=2, le=3600)] = 30


class Storage(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits on the disk."""

    outbox_bytes: Annotated[int, Meta(ge=64 * 1024)] = 64 * 1024 * 1024
    """Records above this are given up, the least important first."""


class Probe(Struct, frozen=True, forbid_unknown_fields=True):
    """How a new model is opened for the first time."""

    require: Literal["detect", "full"] = "detect"
    """``full`` refuses every new model where the kernel offers less than the whole sandbox."""
    compare: Literal["variants", "first"] = "variants"
    """``first`` takes the first variant that passes, and downloads no other to compare it with."""


class Memory(Struct, frozen=True, forbid_unknown_fields=True):
    """What the agent's processes may take of the machine's memory."""

    engine_mb: Annotated[int, Meta(ge=0, le=16_777_216)] | None = None
    """Of the engine with all of its models. None: three quarters of the machine's; 0: no limit."""


class LocalBroker(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a broker of the plant is, and who asks."""

    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] | None = None
    """Default 1883, with TLS 8883."""
    client_id: str = ""
    tls: bool = False
    ca_file: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    credentials_file: str | None = None
    """TOML with ``username`` and ``password``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for files of TLS that would not be used."""
        for key in ("ca_file", "certificate_file", "key_file"):
            if getattr(self, key) is not None and not self.tls:
                raise ValueError(f"{key} stands without tls = true: nothing would be encrypted")
        if self.key_file is not None and self.certificate_file is None:
            raise ValueError("key_file stands without certificate_file")


class PlantBroker(LocalBroker, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A broker that may be older than MQTT 5."""

    protocol: Literal["5", "3.1.1"] = "5"


class ServeMqtt(LocalBroker, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Requests as messages on a broker of the plant: ``<prefix>/<model>``."""

    prefix: Annotated[str, Meta(max_length=512, pattern=r"^[^/$+#\x00][^+#\x00]*[^/+#\x00]$")] = (
        "pithead/infer"
    )
    answers: Annotated[str, Meta(max_length=512, pattern=r"^([^/$+#\x00][^+#\x00]*[^/+#\x00])?$")] = ""
    """Response topics must be below it; empty: anywhere that the broker lets this client publish."""
    qos: Literal[0, 1, 2] = 1
    """Of the subscription; an answer goes out with its request's."""
    concurrency: Annotated[int, Meta(ge=1, le=4096)] = 32
    """Requests that may be under way, their answers included; more are refused at once."""


class Serve(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Serving the models in the slots to applications on this device, or near it."""

    enabled: bool = False
    host: Annotated[str, Meta(min_length=1)] = "127.0.0.1"
    http_port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    """0 takes a free one."""
    grpc_port: Annotated[int, Meta(ge=0, le=65535)] | None = None
    """Without it there is no gRPC, and nothing of it in memory."""
    token_file: str | None = None
    """Bearer tokens, made by ``pithead-agent serve --new-token``; needed beyond loopback."""
    tls_certificate_file: str | None = None
    tls_key_file: str | None = None
    memory_budget_mb: Annotated[int, Meta(ge=0, le=1_048_576)] = 0
    """For all served models together: the idle ones leave first. 0: no limit."""
    models: dict[Name, ServedModel] = {}
    clients: dict[str, Client] = {}
    """By the name of their token; ``*`` for each without a table, ``mqtt`` for all that ask by a broker."""
    pipelines: dict[Name, PipelineSpec] = {}
    """Graphs of the models that the fleet has put on the device."""
    mqtt: ServeMqtt | None = None


class Lane(Struct, frozen=True, forbid_unknown_fields=True):
    """One lane: a sensor source and the model that watches it."""

    name: Name
    model: Name
    source: SourceTable
    sinks: tuple[dict[str, Any], ...] = ()
    """Where results go beside the control plane (docs/sinks.md)."""
    machine: Machine | None = None
    """The state of the machine, which mutes the lane (docs/lanes.md)."""


class AgentSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """All of ``agent.toml``."""

    server: Server = Server()
    broker: Broker = Broker()
    storage: Storage = Storage()
    probe: Probe = Probe()
    serve: Serve = Serve()
    engine: Resources = Resources()
    """What the device lends to its models."""
    memory: Memory = Memory()
    accelerators: dict[Name, Custom] = {}
    """Of this device's own, or other options for one that is known (docs/accelerators.md)."""
    lanes: tuple[Lane, ...] = ()
    hardware: str | None = None
    """Kind of device; defaults to what was said at enrolment."""


SECTIONS: Final[dict[str, type[Struct]]] = {
    "server": Server,
    "broker": Broker,
    "storage": Storage,
    "probe": Probe,
    "serve": Serve,
    "engine": Resources,
    "memory": Memory,
}
PREFIX: Final = "PITHEAD_AGENT_"


def overridden(table: Mapping[str, object], environment: Mapping[str, str]) -> dict[str, object]:
    """Return a decoded TOML table with ``PITHEAD_AGENT_<SECTION>_<KEY>`` of the environment put in.

    Raises ``config.invalid`` naming the variable that means nothing.
    """
    result: dict[str, object] = dict(table)
    for variable, text in sorted(environment.items()):
        if not variable.startswith(PREFIX):
            continue
        section, _, key = variable.removeprefix(PREFIX).lower().partition("_")
        kind = SECTIONS.get(section)
        field = next((f for f in msgspec.structs.fields(kind) if f.name == key), None) if kind else None
        if field is None:
            raise PitheadError("config.invalid", f"{variable} is not a setting", key=variable)
        try:
            value = msgspec.convert(text, field.type, strict=False)
        except msgspec.ValidationError as error:
            raise PitheadError("config.invalid", f"{variable}: {error}", key=variable) from error
        before = result.get(section)
        result[section] = {**before, key: value} if isinstance(before, dict) else {key: value}
    return result


def parse(
    table: object,
    more_kinds: Callable[[], Collection[str]] = tuple,
    more_sinks: Callable[[], Collection[str]] = tuple,
) -> AgentSettings:
    """Return the settings of a decoded TOML table; ``config.invalid`` names the wrong key.

    ``more_kinds`` and ``more_sinks`` name the sources and sinks of third parties; they are asked only for
    a kind that the house has not.
    """
    _check_versions(table)
    try:
        settings = msgspec.convert(table, AgentSettings)
    except msgspec.ValidationError as error:
        raise PitheadError("config.invalid", f"agent.toml: {error}") from error
    _check_serve(settings.serve)
    names = [lane.name for lane in settings.lanes]
    for name in names:
        if names.count(name) > 1:
            raise PitheadError("config.invalid", f"agent.toml: two lanes are named {name!r}", key="lanes")
    for lane in settings.lanes:
        _check_kind(lane.name, "source", lane.source, more_kinds)
        if lane.machine is not None and lane.machine.source is not None:
            _check_kind(lane.name, "machine.source", lane.machine.source, more_kinds)
        _check_sinks(lane, more_sinks)
    _check_claims(settings.lanes)
    return settings


def _check_kind(lane: str, place: str, table: SourceTable, more_kinds: Callable[[], Collection[str]]) -> None:
    """Raise ``config.invalid`` for a source that nobody has."""
    kind = table.get("kind")
    if kind not in SOURCE_KINDS and kind not in (more := tuple(more_kinds())):
        said = f"no {place}.kind" if kind is None else f"the {place}.kind {kind!r}"
        raise PitheadError(
            "config.invalid",
            f"agent.toml: lane {lane!r} has {said}; there are {', '.join((*SOURCE_KINDS, *more))}",
            key=f"{place}.kind",
        )


def _check_sinks(lane: Lane, more_sinks: Callable[[], Collection[str]]) -> None:
    """Raise ``config.invalid`` for a kind that nobody has."""
    for place, sink in enumerate(lane.sinks):
        kind = sink.get("kind")
        if kind not in SINK_KINDS and kind not in (more := tuple(more_sinks())):
            raise PitheadError(
                "config.invalid",
                f"agent.toml: lane {lane.name!r}: sinks[{place}].kind is {kind!r}; "
                f"there are {', '.join((*SINK_KINDS, *more))}",
                key="sinks.kind",
            )


def _check_claims(lanes: tuple[Lane, ...]) -> None:
    """Raise ``config.invalid`` for what two have that only one can have."""
    taken: dict[str, str] = {}
    for lane in lanes:
        asides = () if lane.machine is None or lane.machine.source is None else (lane.machine.source,)
        read = [claim for table in (lane.source, *asides) for claim in claims.of_client(table)]
        for claim in [*read, *(claim for sink in lane.sinks for claim in claims.of_sink(sink))]:
            if claim in taken:
                raise PitheadError(
                    "config.invalid",
                    f"agent.toml: lane {lane.name!r} has {claim}, and so has lane {taken[claim]!r}",
                    key="lanes",
                )
            taken[claim] = lane.name


def _check_serve(serve: Serve) -> None:
    """Raise ``config.invalid`` for what would serve everybody, or not at all."""
    loopback = serve.host in {"localhost", "::1"} or serve.host.startswith("127.")
    if not loopback and serve.token_file is None:
        raise _refuse(
            "token_file", f"{serve.host} is not loopback: name tokens, so that not everybody may ask"
        )
    if (serve.tls_certificate_file is None) != (serve.tls_key_file is None):
        missing = "tls_key_file" if serve.tls_key_file is None else "tls_certificate_file"
        raise _refuse(missing, "a certificate needs its key, and a key its certificate")
    if serve.grpc_port == serve.http_port != 0:
        raise _refuse("grpc_port", f"{serve.grpc_port} is the http_port too")
    for name, pipeline in serve.pipelines.items():
        for place, step in enumerate(pipeline.steps):
            key = f"pipelines.{name}.steps[{place}]"
            if step.version:
                raise _refuse(f"{key}.version", "versions are the fleet's to choose")
            if step.model in serve.pipelines:
                raise _refuse(f"{key}.model", f"{step.model!r} is a pipeline itself; steps are models")


STEERS: Final = ("split", "shadow", "bandit", "versions")
"""What ``serve.toml`` of a server without a fleet may say of a model, and a device may not."""


def _check_versions(table: object) -> None:
    """Raise ``config.invalid`` for what would choose between versions of a model on a device."""
    models = _below(_below(table, "serve"), "models")
    for name in models:
        if found := next((key for key in STEERS if key in _below(models, name)), None):
            raise _refuse(
                f"models.{name}.{found}",
                "a device serves one version of each model, the one that its fleet has activated, so there "
                "is nothing to choose or to compare here. Rollouts compare versions over devices "
                "(docs/rollouts.md); a server without a fleet has this in serve.toml",
            )


def _below(table: object, key: str) -> Mapping[str, object]:
    """Return a table of a table, empty where there is none: what is no table is refused later."""
    found = table.get(key) if isinstance(table, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _refuse(key: str, why: str) -> PitheadError:
    return PitheadError("config.invalid", f"agent.toml: serve.{key}: {why}", key=f"serve.{key}")
