"""Files that the configuration names and are not there, and secrets that others could read."""

import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from msgspec import structs

from agent.core.settings import AgentSettings

FILES: Final = ("credentials_file", "token_file", "key_file", "tls_key_file")
LOGINS: Final = ("credentials_file", "token_file")
BROKER: Final = ("mqtt", "sparkplug")


def exposed(settings: AgentSettings) -> Iterator[tuple[str, str]]:
    """Yield what can be read by whom it should not be, and what to do."""
    for where, table in _tables(settings):
        for key in FILES:
            path = table.get(key)
            if isinstance(path, str) and _everybody_reads(Path(path)):
                yield f"{where}: {key} {path} can be read by everybody on this device", f"chmod o-rwx {path}"
        if any(table.get(key) for key in LOGINS) and (host := _clear(table)) is not None:
            remedy = "use https://" if table.get("kind") == "http" else "set tls = true"
            yield f"{where}: the password goes unencrypted to {host}", f"{remedy}, with the server's ca_file"


def missing(settings: AgentSettings) -> Iterator[str]:
    """Yield each file that a lane, or serving by a broker, needs and that is not there."""
    for where, table in _tables(settings):
        for key, path in table.items():
            if key.endswith("_file") and isinstance(path, str) and _is_missing(Path(path)):
                yield f"{where}: there is no {key} {path}"


def _tables(settings: AgentSettings) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for lane in settings.lanes:
        yield f"{lane.name}: source", lane.source
        if lane.machine is not None and lane.machine.source is not None:
            yield f"{lane.name}: machine.source", lane.machine.source
        for place, sink in enumerate(lane.sinks):
            yield f"{lane.name}: sinks[{place}]", sink
    serve = structs.asdict(settings.serve)
    yield "serve", {"tls_key_file": serve["tls_key_file"]}
    if settings.serve.mqtt is not None:
        yield "serve.mqtt", structs.asdict(settings.serve.mqtt) | {"kind": "mqtt"}


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # who runs this may not look there
    return False


def _everybody_reads(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False  # that it is not there is said elsewhere


def _clear(table: Mapping[str, Any]) -> str | None:
    """Return the host that is spoken to without encryption; None where there is none but this one."""
    host = None
    if table.get("kind") in BROKER and not table.get("tls"):
        host = str(table.get("host", "127.0.0.1"))
    elif table.get("kind") == "http" and str(table.get("url", "")).startswith("http://"):
        with suppress(ValueError):  # what is no address is said elsewhere
            host = urlsplit(str(table["url"])).hostname
    return None if host is None or _is_loopback(host) else host


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
