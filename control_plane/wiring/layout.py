"""Where things lie in the data directory."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from contract.errors import PitheadError
from control_plane.settings import Settings
from provisioning import durable
from provisioning.site import Site

SOCKET_PATH_LIMIT: Final = 100
"""Unix sockets have short names: 108 bytes on Linux."""


class Layout:
    """The data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.absolute()
        self.site = Site(self.data_dir / "pki")
        self.broker = self.data_dir / "broker"
        self.broker_config = self.broker / "mosquitto.conf"
        self.tuf = self.data_dir / "tuf"
        self.signer_keys = self.data_dir / "signer"
        self.objects = self.data_dir / "objects"
        self.staging = self.data_dir / "staging"

    def make(self) -> None:
        """Make the directory itself. What is secret has a mode of its own further down."""
        if not self.data_dir.exists():
            durable.make_directory(self.data_dir, 0o755)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second control plane out of this directory; ``config.invalid`` when there is one."""
        descriptor = os.open(self.data_dir / "serve.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise PitheadError(
                "config.invalid", f"another `pithead serve` runs in {self.data_dir}; stop it first"
            ) from error
        finally:
            os.close(descriptor)

    def signer_socket(self) -> Path:
        """Return where the signer listens; elsewhere when the data directory's name is too long."""
        path = self.signer_keys / "signer.sock"
        if len(os.fsencode(path)) <= SOCKET_PATH_LIMIT:
            return path
        return Path(tempfile.mkdtemp(prefix="pithead-")) / "signer.sock"

    def database_url(self, settings: Settings) -> str:
        """Return the database's address."""
        return settings.database_url or f"sqlite:///{self.data_dir / 'pithead.db'}"

    def server_names(self, settings: Settings) -> list[str]:
        """Return the names for the server's certificate."""
        names = [settings.host, *settings.names, settings.broker, "localhost", "127.0.0.1"]
        return list(dict.fromkeys(names))
