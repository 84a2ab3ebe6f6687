"""Settings: ``pithead.toml`` in the data directory, then ``PITHEAD_*``, then the command line.

Each overrides the one before it. A key that is not known is an error that
names it, since a misspelt setting that does nothing is worse than none.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from contract.errors import PitheadError

PREFIX: Final = "PITHEAD_"
FILE_NAME: Final = "pithead.toml"
CLIENT_VARIABLES: Final = frozenset(
    {"PITHEAD_SERVER", "PITHEAD_TOKEN", "PITHEAD_KEY_PASSPHRASE", "PITHEAD_SHARED_DATA", "PITHEAD_DATA_DIR"}
)
"""``PITHEAD_*`` variables that are no settings of the server."""

Port = Annotated[int, Meta(ge=1, le=65535)]


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that a person may set; ports and hosts are where this process listens."""

    host: str = "127.0.0.1"
    """Name or address under which devices reach this machine; stands in the server's certificate."""
    names: tuple[str, ...] = ()
    """More names or addresses for the server's certificate."""
    api_host: str = "127.0.0.1"
    api_port: Port = 8480
    device_host: str = ""
    """All addresses when empty: devices come from other machines."""
    device_port: Port = 8443
    broker_host: str = ""
    """Where this process and the devices find the broker; ``host`` when empty."""
    broker_port: Port = 8883
    database_url: str = ""
    """SQLite in the data directory when empty."""
    certificate_days: Annotated[int, Meta(ge=1, le=825)] = 30
    ingest_batch: Annotated[int, Meta(ge=1, le=10_000)] = 500
    ingest_linger_ms: Annotated[int, Meta(ge=0, le=5_000)] = 50
    max_body_bytes: Annotated[int, Meta(ge=1024)] = 1024 * 1024
    """Of any request but an upload, which has a limit of its own."""
    quota_bytes: Annotated[int, Meta(ge=1024)] = 4 * 1024**3
    """Of all uploads that no release has taken yet."""
    require_sandbox: bool = False
    """Admit no model where the kernel or libseccomp cannot confine the process that opens it."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @property
    def broker(self) -> str:
        """The broker's host."""
        return self.broker_host or self.host


def load(data_dir: Path, environment: Mapping[str, str], overrides: Mapping[str, object]) -> Settings:
    """Return the settings that hold for ``data_dir``; ``None`` among ``overrides`` overrides nothing.

    Raises ``config.invalid`` naming the key and where it stands.
    """
    values: dict[str, object] = {}
    path = data_dir / FILE_NAME
    if path.exists():
        try:
            values |= tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PitheadError("config.invalid", f"{path}: {error}") from error
        _check_keys(values, str(path))
    variables = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in CLIENT_VARIABLES and value
    }
    _check_keys(variables, "the environment", PREFIX)
    values |= {name: value.split(",") if name == "names" else value for name, value in variables.items()}
    values |= {name: value for name, value in overrides.items() if value is not None}
    if isinstance(values.get("log_level"), str):
        values["log_level"] = str(values["log_level"]).upper()
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise PitheadError("config.invalid", str(error)) from error


def _check_keys(values: Mapping[str, object], where: str, prefix: str = "") -> None:
    known = Settings.__struct_fields__
    for name in values:
        if name not in known:
            shown = (prefix + name).upper() if prefix else name
            raise PitheadError(
                "config.invalid",
                f"{where} has the unknown setting {shown!r}; known are {', '.join(sorted(known))}",
                setting=name,
            )
