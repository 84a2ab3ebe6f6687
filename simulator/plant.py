"""The server side of a site on this machine: keys, broker, control plane. Driven by its public commands."""

import secrets
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from contract.errors import PitheadError
from control_plane.cli.client import Client
from provisioning import broker
from simulator.processes import Child, free_ports, run

BIN: Final = Path(sys.executable).parent
HOST: Final = "127.0.0.1"
READY_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Ports:
    """Where the listeners are."""

    api: int
    device: int
    broker: int


class Plant:
    """One site in ``data_dir``. ``prepare`` once, then ``start``; ``stop`` ends what was started."""

    def __init__(self, data_dir: Path, settings: Mapping[str, object] | None = None) -> None:
        self.data_dir = data_dir
        self.logs = data_dir / "logs"
        self.ports = Ports(*free_ports(3))
        self._settings = {
            "host": HOST,
            "device_host": HOST,
            "api_port": self.ports.api,
            "device_port": self.ports.device,
            "broker_port": self.ports.broker,
            **(settings or {}),
        }
        # The releaser's secret: handed to the ceremony and to `pithead release`, never to the control plane.
        self._passphrase = secrets.token_urlsafe(24)
        self._environment = {"XDG_CONFIG_HOME": str(data_dir / "config"), "HOME": str(data_dir)}
        self._client: Client | None = None
        self._broker = Child(
            "mosquitto",
            [broker.executable(), "-c", self.config / "mosquitto.conf"],
            self.logs / "mosquitto.log",
        )
        self._control_plane = Child(
            "control plane",
            [BIN / "pithead", "serve", "--data-dir", data_dir],
            self.logs / "control-plane.log",
            self._environment,
        )

    @property
    def config(self) -> Path:
        """The broker's configuration directory."""
        return self.data_dir / "broker"

    @property
    def device_url(self) -> str:
        """Address of the devices' listener."""
        return f"https://{HOST}:{self.ports.device}"

    @property
    def api_url(self) -> str:
        """Address of the operators' API."""
        return f"http://{HOST}:{self.ports.api}"

    @property
    def token(self) -> str:
        """The first administrator's API token."""
        profile = self.data_dir / "config" / "pithead" / "cli.toml"
        return str(tomllib.loads(profile.read_text())["token"])

    @property
    def api(self) -> Client:
        """A client of the API with the administrator's token."""
        if self._client is None:
            self._client = Client(self.api_url, self.token)
        return self._client

    def prepare(self) -> str:
        """Hold the ceremony and make the site; return what the ceremony said."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        lines = [f"{key} = {_toml(value)}" for key, value in self._settings.items()]
        (self.data_dir / "pithead.toml").write_text("\n".join(lines) + "\n")
        self.pithead("init", "--data-dir", self.data_dir)
        return self.pithead("keys", "init", "--data-dir", self.data_dir, releaser=True)

    def start(self) -> None:
        """Start broker and control plane, and wait until the API answers."""
        self.start_broker()
        self.start_control_plane()

    def start_broker(self) -> None:
        """Start mosquitto; the agents and the control plane find it by themselves."""
        self._broker.start()

    def start_control_plane(self) -> None:
        """Start the control plane and wait until it answers."""
        self._control_plane.start()
        self._control_plane.wait_until(self._answers, "the API to answer", READY_TIMEOUT_S)

    def stop_broker(self) -> None:
        """End mosquitto."""
        self._broker.stop()

    def stop_control_plane(self) -> None:
        """End the control plane."""
        self._control_plane.stop()

    def stop(self) -> None:
        """End everything that was started."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._control_plane.stop()
        self._broker.stop()

    def join_token(self, uses: int, labels: Mapping[str, str] | None = None) -> str:
        """Return a join token for ``uses`` devices with these labels."""
        answer = self.api.post("/api/v1/join-tokens", {"max_uses": uses, "labels": dict(labels or {})})
        return str(answer["token"])

    def release(self, package: Path) -> None:
        """Sign and publish a package, in the role of the releaser."""
        key = self.data_dir / "offline" / "release-1.pem"
        self.pithead("release", package, "--key", key, releaser=True)

    def pithead(self, *arguments: str | Path, releaser: bool = False) -> str:
        """Run the command line; only the releaser's calls know the passphrase of the offline keys."""
        environment = {**self._environment, "PITHEAD_SERVER": self.api_url}
        if releaser:
            environment["PITHEAD_KEY_PASSPHRASE"] = self._passphrase
        return run([BIN / "pithead", *arguments], environment)

    def devices(self) -> list[dict[str, Any]]:
        """Return all devices as the API shows them."""
        return list(self.pages("/api/v1/devices"))

    def pages(self, path: str, params: Mapping[str, object] | None = None) -> Sequence[dict[str, Any]]:
        """Return all items of a listing, page by page."""
        items: list[dict[str, Any]] = []
        cursor: object = None
        while True:
            page = self.api.get(path, {**(params or {}), "limit": 1000, "cursor": cursor})
            items += page["items"]
            cursor = page.get("next_cursor")
            if not cursor:
                return items

    def _answers(self) -> bool:
        try:
            self.api.get("/api/v1/health")
        except PitheadError:
            return False
        return True


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'
