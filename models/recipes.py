"""Named sets of build settings, and single settings changed from the command line."""

from collections.abc import Mapping

from msgspec import Struct

from contract.errors import PitheadError

Value = str | int | float


class Recipe(Struct, frozen=True):
    """How one version of a shipped model is made."""

    version: str
    release_counter: int
    why: str
    settings: Mapping[str, Value]


def with_settings(
    defaults: Mapping[str, Value],
    changes: Mapping[str, str],
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Value]:
    """Return ``defaults`` with ``changes``, each read as its default's type.

    Raises ``config.invalid``, naming the setting, for one that is unknown or not readable.
    """
    values = dict(defaults)
    for name, text in changes.items():
        if name not in values:
            raise PitheadError("config.invalid", f"{name!r} is no setting; there are {', '.join(defaults)}")
        kind = type(defaults[name])
        try:
            values[name] = kind(text)
        except ValueError as error:
            raise PitheadError("config.invalid", f"{name}={text!r} is not {kind.__name__}") from error
        allowed = (choices or {}).get(name)
        if allowed is not None and text not in allowed:
            raise PitheadError("config.invalid", f"{name}={text!r} is not one of {', '.join(allowed)}")
    return values
