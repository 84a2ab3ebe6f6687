"""One real agent on this machine, with a root directory of its own."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from simulator.plant import BIN
from simulator.processes import Child, kill_all, run

SourceTable = Mapping[str, str | int | float | bool | Sequence[str]]


class LocalDevice:
    """A device below ``root``. Its processes are found by the root in their command line."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._supervisor = Child(
            f"agent {name}", [BIN / "pithead-agent", "run", "--root", root], root / "var/log/agent.log"
        )

    @property
    def device_id(self) -> str:
        """The id that the control plane gave it."""
        identity = json.loads((self.root / "var/lib/pithead/identity/identity.json").read_text())
        return str(identity["device"])

    def configure(self, lanes: Mapping[str, SourceTable], poll_s: float) -> None:
        """Write ``agent.toml``: lanes by the name of their model."""
        lines = ["[server]", f"poll_s = {poll_s}"]
        for model, source in lanes.items():
            lines += ["[[lanes]]", f'name = "{model}"', f'model = "{model}"', "[lanes.source]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in source.items()]
        path = self.root / "etc/pithead/agent.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    def enrol(self, url: str, token: str, hardware: str = "simulated") -> None:
        """Join the fleet."""
        run(
            [BIN / "pithead-agent", "enroll", "--server", url, "--token", token, "--root", self.root,
             "--name", self.name, "--hardware", hardware]
        )  # fmt: skip

    def start(self) -> None:
        """Start the supervisor, which starts the rest."""
        self._supervisor.start()

    @property
    def running(self) -> bool:
        """Whether the supervisor runs."""
        return self._supervisor.running

    def power_cut(self) -> int:
        """End every process of the device at once with SIGKILL; return how many there were."""
        processes = self.processes()
        kill_all(processes)
        self._supervisor.kill()
        return len(processes)

    def stop(self) -> None:
        """Ask the supervisor to end, then end what is left (the engine outlives its supervisor)."""
        self._supervisor.stop()
        kill_all(self.processes())

    def processes(self) -> list[psutil.Process]:
        """Return the device's processes: supervisor, engine and short-lived helpers."""
        here = str(self.root)
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(part == here or part.startswith(here + "/") for part in process.info["cmdline"] or ())
        ]

    def status(self) -> dict[str, Any]:
        """Return what ``pithead-agent status --json`` says."""
        answer: dict[str, Any] = json.loads(
            run([BIN / "pithead-agent", "status", "--json", "--root", self.root])
        )
        return answer

    def tail(self) -> str:
        """Return the end of the supervisor's log."""
        return self._supervisor.tail()
