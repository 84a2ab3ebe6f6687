"""Settings of tracing and logging that clients may read and change, as the protocol's extensions name them.

Paths are not taken from clients: where a log goes is the operator's word.
"""

import logging
from collections.abc import Mapping
from typing import Final

from contract.errors import PitheadError

Value = bool | int | str | list[str]

TRACE: Final[Mapping[str, Value]] = {
    "trace_level": ["OFF"],
    "trace_rate": "1000",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "triton",
}
LOGGING: Final[Mapping[str, Value]] = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
_LEVELS: Final = frozenset(("OFF", "TIMESTAMPS", "TENSORS"))
_PATHS: Final = frozenset(("log_file", "trace_file"))
_COUNTS: Final = frozenset(("trace_rate", "trace_count", "log_frequency"))


class Settings:
    """What holds now, for all and by model."""

    def __init__(self) -> None:
        self._trace: dict[str, Value] = dict(TRACE)
        self._by_model: dict[str, dict[str, Value]] = {}
        self._logging: dict[str, Value] = dict(LOGGING)

    def trace(self, model: str = "") -> dict[str, Value]:
        """Return the settings of tracing."""
        return self._trace | self._by_model.get(model, {})

    def change_trace(self, changes: Mapping[str, object], model: str = "") -> dict[str, Value]:
        """Change and return the settings; None takes a value back. Raises ``serve.bad_request``."""
        checked = {key: _trace_value(key, value) for key, value in changes.items()}
        held = self._by_model.setdefault(model, {}) if model else self._trace
        for key, value in checked.items():
            if value is None:
                held.pop(key, None)
                if not model:
                    held[key] = TRACE[key]
            else:
                held[key] = value
        return self.trace(model)

    def logging(self) -> dict[str, Value]:
        """Return the settings of logging."""
        return dict(self._logging)

    def change_logging(self, changes: Mapping[str, object]) -> dict[str, Value]:
        """Change the settings, and with them what is logged; raises ``serve.bad_request``."""
        checked: dict[str, Value] = {}
        for key, value in changes.items():
            known = LOGGING.get(key)
            if known is None:
                raise _refuse(key, "is no setting of logging")
            if key in _PATHS and value != "":
                raise _refuse(key, "a path is not taken from a client")
            if type(value) is not type(known) or (isinstance(value, str) and value not in {"", "default"}):
                raise _refuse(key, f"{value!r:.100} does not fit")
            checked[key] = value
        self._logging |= checked
        logging.getLogger("agent.engine.serve").setLevel(self._level())
        return self.logging()

    def _level(self) -> int:
        verbose = self._logging["log_verbose_level"]
        if isinstance(verbose, int) and verbose > 0:
            return logging.DEBUG
        for key, level in (
            ("log_info", logging.INFO),
            ("log_warning", logging.WARNING),
            ("log_error", logging.ERROR),
        ):
            if self._logging[key]:
                return level
        return logging.CRITICAL


def _trace_value(key: str, value: object) -> Value | None:
    if key not in TRACE:
        raise _refuse(key, "is no setting of tracing")
    if value is None:
        return None
    if key == "trace_level":
        levels = [value] if isinstance(value, str) else value
        if not isinstance(levels, list) or not all(isinstance(v, str) and v in _LEVELS for v in levels):
            raise _refuse(key, f"{value!r:.100} is none of {sorted(_LEVELS)}")
        return list(levels)
    if key in _PATHS and value != "":
        raise _refuse(key, "a path is not taken from a client")
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or len(text) > 20:  # noqa: PLR2004
        raise _refuse(key, f"{value!r:.100} does not fit")
    if key in _COUNTS and not text.removeprefix("-").isdigit():
        raise _refuse(key, f"{value!r:.100} is no number")
    return text


def _refuse(field: str, why: str) -> PitheadError:
    return PitheadError("serve.bad_request", f"{field[:100]}: {why}", field=field[:100])
