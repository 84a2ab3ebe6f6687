"""A user's name and password, in a file of their own: the configuration may be shown to anybody."""

import tomllib
from pathlib import Path

import msgspec
from msgspec import Struct

from contract.errors import PitheadError


class Credentials(Struct, frozen=True, forbid_unknown_fields=True):
    """What stands in ``credentials_file``."""

    username: str
    password: str


def credentials(path: str, table: str = "lanes.source", code: str = "source.failed") -> Credentials:
    """Return what the TOML file says; an error of ``code`` where it is not there, ``config.invalid`` else.

    ``table`` is where the configuration names the file.
    """
    try:
        return msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), Credentials)
    except OSError as error:
        raise PitheadError(code, f"{table}.credentials_file: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        # The words of a parser could show the password; its kind is enough.
        raise PitheadError(
            "config.invalid",
            f"{table}.credentials_file {path} is not TOML with username and password "
            f"({type(error).__name__})",
            key="credentials_file",
        ) from None
