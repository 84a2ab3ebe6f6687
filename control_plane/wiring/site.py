"""What ``pithead init`` makes: authorities, the broker's files, the database, the first administrator."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import select

from contract.errors import PitheadError
from control_plane.cli.client import profile_path
from control_plane.services.access import Access, IssuedToken
from control_plane.services.devices import Devices
from control_plane.settings import FILE_NAME, Settings, load
from control_plane.store.database import Database
from control_plane.store.tables.token import ApiToken
from control_plane.wiring.clock import now_micros
from control_plane.wiring.layout import Layout
from provisioning import broker, durable, pki


class Made(msgspec.Struct, frozen=True):
    """What ``init`` has done."""

    site: bool
    token: IssuedToken | None
    profile: Path | None


def init(layout: Layout, given: Mapping[str, object], environment: Mapping[str, str]) -> Made:
    """Make what is missing; what is there is left as it is.

    ``given`` becomes the settings file when all that can fail has been done,
    so that a failure can be mended by the same command with other values.
    Raises ``config.invalid`` for values that differ from the file's. The
    broker's configuration is written anew in any case, and the server's
    certificate when it lacks a name.
    """
    path = layout.data_dir / FILE_NAME
    if path.exists():
        _refuse_changes(path, given)
    settings = load(layout.data_dir, environment, given)
    layout.make()
    database = open_database(layout, settings)
    try:
        now = pki.moment(now_micros())
        names = layout.server_names(settings)
        fresh = not layout.site.exists
        if fresh:
            layout.site.create(names, now)
        else:
            layout.site.renew(names, now)
        write_broker(layout, settings, Devices(database, now_micros).revocations())
        if not path.exists():
            # it may hold the database's password
            durable.write(path, _toml(load(Path(os.devnull), {}, given)).encode(), durable.PRIVATE)
        token = _first_token(database)
    finally:
        database.close()
    profile = None if token is None else _write_profile(settings, token)
    return Made(fresh, token, profile)


def write_broker(layout: Layout, settings: Settings, revoked: Sequence[pki.Revocation]) -> None:
    """Write all that the broker reads."""
    files = layout.site.broker_files(revoked, pki.moment(now_micros()))
    broker.write(layout.broker, files, port=settings.broker_port)


def open_database(layout: Layout, settings: Settings) -> Database:
    """Return the database with its newest schema; nobody else may read the file.

    Raises ``config.invalid`` when it cannot be reached or is none of ours.
    """
    previous = os.umask(0o077)
    try:
        database = Database(layout.database_url(settings))
        database.migrate()
    except (SQLAlchemyError, CommandError) as error:
        reason = getattr(error, "orig", None) or error
        raise PitheadError("config.invalid", f"database_url: {reason}") from error
    finally:
        os.umask(previous)
    return database


def _refuse_changes(path: Path, given: Mapping[str, object]) -> None:
    stands = msgspec.to_builtins(load(path.parent, {}, {}))
    wanted = msgspec.to_builtins(load(Path(os.devnull), {}, given))
    differing = [
        f"{name} = {_value(stands[name])}, not {_value(wanted[name])}"
        for name, value in given.items()
        if value is not None and stands[name] != wanted[name]
    ]
    if differing:
        raise PitheadError(
            "config.invalid",
            f"this site is made already, nothing was changed: {path} says {'; '.join(differing)}. "
            "Change it there, run `pithead init` again without these options, and restart",
        )


def _first_token(database: Database) -> IssuedToken | None:
    with database.reading() as tx:
        if tx.exec(select(ApiToken.id).limit(1)).first() is not None:
            return None
    return Access(database, now_micros).create(actor="init", name="first-admin", roles=["admin"])


def _write_profile(settings: Settings, token: IssuedToken) -> Path | None:
    """Write the command line's profile, unless there is one of another site."""
    path = profile_path()
    if path.exists():
        return None
    try:
        durable.make_directory(path.parent, 0o700)
        text = f'server = "http://{settings.api_host}:{settings.api_port}"\ntoken = "{token.token}"\n'
        durable.write(path, text.encode(), durable.PRIVATE)
    except OSError as error:
        raise PitheadError("config.invalid", f"{path}: {error}") from error
    return path


def _toml(settings: Settings) -> str:
    changed = msgspec.structs.asdict(settings)
    default = msgspec.structs.asdict(Settings())
    lines = ["# Settings of the control plane; every one can be overridden by PITHEAD_<NAME>."]
    for name, value in changed.items():
        if value != default[name]:
            lines.append(f"{name} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    return msgspec.json.encode(value).decode()
