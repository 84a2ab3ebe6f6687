"""The command line's way to the API, and where it finds server and token.

Flags come first, then ``PITHEAD_SERVER`` and ``PITHEAD_TOKEN``, then the
profile that ``pithead init`` has written.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Self

import httpx
import typer

from contract.errors import ERRORS, PitheadError

DEFAULT_SERVER: Final = "http://127.0.0.1:8480"
TIMEOUT_S: Final = 60.0

ServerOption = Annotated[
    str | None,
    typer.Option("--server", envvar="PITHEAD_SERVER", help="Address of the API.", show_default=False),
]
TokenOption = Annotated[
    str | None, typer.Option("--token", envvar="PITHEAD_TOKEN", help="API token.", show_default=False)
]


class Client:
    """A connection to the API; every refusal is raised as a ``PitheadError`` with the server's code."""

    def __init__(self, server: str, token: str | None) -> None:
        headers = {"Accept": "application/json"}
        if token:
            if not token.isascii() or not token.isprintable():
                raise PitheadError("auth.invalid", "the API token holds letters that no token has")
            headers["Authorization"] = f"Bearer {token}"
        self.server = server.rstrip("/")
        try:
            self._http = httpx.Client(
                base_url=self.server, headers=headers, timeout=TIMEOUT_S, follow_redirects=False
            )
        except httpx.InvalidURL as error:
            raise PitheadError("server.unreachable", f"{server!r} is no address: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def get(self, path: str, params: Mapping[str, object] | None = None) -> Any:
        """Return the JSON at ``path`` (from ``/api/v1/...``); parameters that are None are left out."""
        return self._json(self.request("GET", path, params=params))

    def get_bytes(self, path: str) -> bytes:
        """Return the body at ``path``."""
        return self.request("GET", path).content

    def post(self, path: str, json: object = None) -> Any:
        """Send ``json`` and return the answer's JSON, or None when it has no body."""
        return self._json(self.request("POST", path, json=json))

    def patch(self, path: str, json: object) -> Any:
        """Send ``json`` and return the answer's JSON, or None when it has no body."""
        return self._json(self.request("PATCH", path, json=json))

    def put(self, path: str, json: object = None, *, content: bytes | Iterable[bytes] | None = None) -> Any:
        """Send ``json``, or ``content`` as it is, and return the answer's JSON, or None."""
        return self._json(self.request("PUT", path, json=json, content=content))

    def delete(self, path: str) -> None:
        """Delete what is at ``path``."""
        self.request("DELETE", path)

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, object] | None = None,
        json: object = None,
        content: bytes | Iterable[bytes] | None = None,
    ) -> httpx.Response:
        """Return the answer to one request, or raise what the server's problem document says."""
        chosen: list[tuple[str, Any]] = []
        for name, value in (params or {}).items():
            if isinstance(value, list | tuple):
                chosen.extend((name, item) for item in value)
            elif value is not None:
                chosen.append((name, value))
        try:
            answer = self._http.request(
                method, path, params=httpx.QueryParams(chosen), json=json, content=content
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PitheadError(
                "server.unreachable", f"cannot reach the API at {self.server}: {error}"
            ) from error
        if answer.is_success:
            return answer
        raise _problem(answer)

    def _json(self, answer: httpx.Response) -> Any:
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError as error:
            kind = answer.headers.get("Content-Type", "unknown")
            raise PitheadError(
                "server.unreachable", f"{self.server} is no control plane: it answers with {kind}"
            ) from error


def connect(server: str | None = None, token: str | None = None) -> Client:
    """Return a client for ``server`` and ``token``, each from the profile where it is not given."""
    profile = read_profile()
    return Client(server or profile.get("server") or DEFAULT_SERVER, token or profile.get("token"))


def profile_path() -> Path:
    """Return where the profile is: ``~/.config/pithead/cli.toml``, or below ``XDG_CONFIG_HOME``."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "pithead" / "cli.toml"


def read_profile() -> dict[str, str]:
    """Return ``server`` and ``token`` of the profile, as far as it has them."""
    path = profile_path()
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PitheadError("config.invalid", f"{path}: {error}") from error
    return {name: str(value) for name, value in values.items() if name in {"server", "token"}}


def _problem(answer: httpx.Response) -> PitheadError:
    try:
        body = answer.json()
    except ValueError:
        body = {}
    if not isinstance(body, dict):
        body = {}
    code = str(body.get("type", ""))
    detail = str(body.get("detail") or answer.text[:500])
    facts = body.get("facts")
    kept = {k: v for k, v in facts.items() if k not in {"code", "detail"}} if isinstance(facts, dict) else {}
    if code not in ERRORS:
        return PitheadError("internal.error", f"HTTP {answer.status_code} {code}: {detail}")
    return PitheadError(code, detail, **kept)
