"""The demo's site: one plant and its devices, each with a place in the replayed recording of its own."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from contract import codec
from contract.manifest import MANIFEST_NAME, Manifest
from models.shuttle import dataset
from simulator.device import LocalDevice
from simulator.plant import Plant

ROWS_PER_S: Final = 50.0
POLL_S: Final = 5.0
LINES: Final = 2
AT_ONCE: Final = 4
"""Devices that are enrolled or started at the same time."""


class Fleet:
    """The plant, ``n`` devices, and the recording that they replay."""

    def __init__(self, data_dir: Path, n: int, speed: float) -> None:
        self.plant = Plant(data_dir / "control-plane")
        self.devices = [
            LocalDevice(f"press-{i + 1:02d}", data_dir / "devices" / f"press-{i + 1:02d}") for i in range(n)
        ]
        self.recording = data_dir / "shuttle.csv"
        self.packages = data_dir / "packages"
        self.speed = speed
        self.offsets: dict[str, int] = {}

    def write_recording(self) -> int:
        """Write the rows that no model has seen; return how many."""
        return dataset.write_replay(self.recording)

    def configure(self, rows: int) -> None:
        """Give each device its place in the recording."""
        self.offsets = {d.name: i * rows // len(self.devices) for i, d in enumerate(self.devices)}
        for device in self.devices:
            source: dict[str, str | int | float | bool | Sequence[str]] = {
                "kind": "replay",
                "path": str(self.recording),
                "rate_hz": ROWS_PER_S,
                "speed": self.speed,
                "offset": self.offsets[device.name],
                "loop": True,
            }
            device.configure({"shuttle": source}, POLL_S)

    def enrol(self, devices: Sequence[LocalDevice], token: str) -> None:
        """Enrol some devices, a few at a time."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(lambda device: device.enrol(self.plant.device_url, token), devices):
                pass

    def by_line(self) -> dict[str, list[LocalDevice]]:
        """Return the devices by the line that they stand on."""
        lines: dict[str, list[LocalDevice]] = {}
        for i, device in enumerate(self.devices):
            lines.setdefault("ab"[i % LINES], []).append(device)
        return lines

    def start(self) -> None:
        """Start all agents."""
        for device in self.devices:
            device.start()

    def stop(self) -> None:
        """End everything."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for _ in pool.map(LocalDevice.stop, self.devices):
                pass
        self.plant.stop()

    def by_id(self) -> dict[str, LocalDevice]:
        """Return the devices by the ids that they were given."""
        return {device.device_id: device for device in self.devices}

    def reported(self, model: str) -> dict[str, dict[str, Any]]:
        """Return what each device reports of ``model``, by device id; devices without it are left out."""
        found = {}
        for device in self.plant.devices():
            for entry in (device.get("reported") or {}).get("models", ()):
                if entry["model_name"] == model:
                    found[device["id"]] = entry
        return found

    def serving(self, model: str) -> dict[str, str]:
        """Return the active version of ``model`` by device id, once it is confirmed."""
        return {
            device: entry["active"]["version"]
            for device, entry in self.reported(model).items()
            if entry.get("active") and not entry.get("trial")
        }

    def flip_bit_in_storage(self, package: Path) -> int:
        """Flip one bit of each of the package's model files where the control plane stores them."""
        manifest = codec.decode((package / MANIFEST_NAME).read_bytes(), Manifest)
        hashes = {variant.file.sha256 for variant in manifest.variants}
        for sha256 in hashes:
            stored = next((self.plant.data_dir / "objects").rglob(sha256))
            content = bytearray(stored.read_bytes())
            content[len(content) // 2] ^= 1
            stored.chmod(0o600)
            stored.write_bytes(content)
        return len(hashes)
