"""The device's configuration as types; an unknown key is an error that names it."""

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from contract.errors import PitheadError
from contract.messages import Name

SourceTable = dict[str, str | int | float | bool | list[str] | None]


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


class Lane(Struct, frozen=True, forbid_unknown_fields=True):
    """One lane: a sensor source and the model that watches it."""

    name: Name
    model: Name
    source: SourceTable


class AgentSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """All of ``agent.toml``."""

    server: Server = Server()
    broker: Broker = Broker()
    storage: Storage = Storage()
    lanes: tuple[Lane, ...] = ()
    hardware: str | None = None
    """Kind of device; defaults to what was said at enrolment."""


def parse(table: object) -> AgentSettings:
    """Return the settings of a decoded TOML table; ``config.invalid`` names the wrong key."""
    try:
        settings = msgspec.convert(table, AgentSettings)
    except msgspec.ValidationError as error:
        raise PitheadError("config.invalid", f"agent.toml: {error}") from error
    names = [lane.name for lane in settings.lanes]
    for name in names:
        if names.count(name) > 1:
            raise PitheadError("config.invalid", f"agent.toml: two lanes are named {name!r}", key="lanes")
    for lane in settings.lanes:
        if not isinstance(lane.source.get("kind"), str):
            raise PitheadError(
                "config.invalid", f"agent.toml: lane {lane.name!r} has no source.kind", key="source.kind"
            )
    return settings
