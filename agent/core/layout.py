"""Where everything of a device lies on its disk; the processes of the agent meet in these paths."""

from pathlib import Path

from msgspec import Struct

from contract.messages import Sha256


class Layout(Struct, frozen=True):
    """The paths of one device; ``root`` is ``/`` unless ``--root`` moves all of it."""

    root: Path

    @property
    def config(self) -> Path:
        """The device's configuration, written by people."""
        return self.root / "etc/pithead/agent.toml"

    @property
    def state_dir(self) -> Path:
        """Everything that must survive a power cut."""
        return self.root / "var/lib/pithead"

    @property
    def run_dir(self) -> Path:
        """Sockets and locks; may be lost at any reboot."""
        return self.root / "run/pithead"

    @property
    def identity(self) -> Path:
        """The device's key, certificates and anchors of trust. Appears whole, by one rename."""
        return self.state_dir / "identity"

    @property
    def pending(self) -> Path:
        """The key of an enrolment that has not succeeded yet; a second try must use the same."""
        return self.state_dir / "identity-pending"

    @property
    def identity_file(self) -> Path:
        """``identity.json``: the device's id and the addresses that it was enrolled with."""
        return self.identity / "identity.json"

    @property
    def key(self) -> Path:
        """Private key, PEM, mode 0600."""
        return self.identity / "device.key"

    @property
    def certificate(self) -> Path:
        """The device's certificate followed by the device CA's, PEM."""
        return self.identity / "device.pem"

    @property
    def server_ca(self) -> Path:
        """The CA of update server and broker, PEM."""
        return self.identity / "server-ca.pem"

    @property
    def image_root(self) -> Path:
        """First trusted TUF root of the image repository, as received at enrolment."""
        return self.identity / "image-root.json"

    @property
    def director_root(self) -> Path:
        """First trusted TUF root of the director."""
        return self.identity / "director-root.json"

    @property
    def tuf(self) -> Path:
        """Owned by the update process alone."""
        return self.state_dir / "tuf"

    @property
    def objects(self) -> Path:
        """Content-addressed files; a file under its own hash is complete, ``<hash>.part`` is not."""
        return self.state_dir / "objects"

    def object(self, sha256: Sha256) -> Path:
        """Path of the object with this hash."""
        return self.objects / sha256

    @property
    def slots(self) -> Path:
        """One small JSON file for each model."""
        return self.state_dir / "slots"

    def calibration(self, lane: str) -> Path:
        """When a person last asked for another calibration of a lane."""
        return self.state_dir / "calibrations" / lane

    @property
    def bypass(self) -> Path:
        """While it exists, no control of the plant is written by this device. Says who wanted it, and why."""
        return self.state_dir / "bypass"

    @property
    def outbox(self) -> Path:
        """Records that the control plane has not acknowledged yet."""
        return self.state_dir / "outbox.db"

    @property
    def state(self) -> Path:
        """Small facts of the supervisor."""
        return self.state_dir / "state.db"

    @property
    def engine_socket(self) -> Path:
        """Where the engine listens for the supervisor."""
        return self.run_dir / "engine.sock"

    @property
    def engine_log(self) -> Path:
        """What the engine writes to its standard streams."""
        return self.run_dir / "engine.log"

    @property
    def supervisor_lock(self) -> Path:
        """Locked by the supervisor as long as it lives."""
        return self.run_dir / "supervisor.lock"

    @property
    def update_lock(self) -> Path:
        """Locked as long as an update process lives, also one that outlived its supervisor."""
        return self.run_dir / "update.lock"

    @property
    def bundle(self) -> Path:
        """The newest metadata bundle as downloaded, not yet verified."""
        return self.run_dir / "bundle.msgpack"

    @property
    def status(self) -> Path:
        """What the running supervisor last saw, for ``pithead-agent status``."""
        return self.run_dir / "status.json"
