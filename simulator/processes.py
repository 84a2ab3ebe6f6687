"""Child processes that can be waited for, killed and looked into."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

T = TypeVar("T")
LOG_TAIL = 2000
STOP_TIMEOUT_S = 15.0


class SimulatorError(Exception):
    """Something on this machine did not do what it should; the text says what and shows its log."""


class Child:
    """One program with its log file, in a session of its own so that Ctrl-C reaches only the simulator."""

    def __init__(
        self, name: str, argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.argv = [str(a) for a in argv]
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the program; it must not be running."""
        if self.running:
            raise SimulatorError(f"{self.name} is running already")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End the program and all that it started at once, as a power cut would."""
        if self._process is None or not self.running:
            return
        family = [psutil.Process(self._process.pid)]
        family += family[0].children(recursive=True)
        kill_all(family)
        self._process.wait()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Ask it to end, and kill it when it does not."""
        if self._process is None or not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def tail(self) -> str:
        """Return the end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text[-LOG_TAIL:]

    def wait_until(
        self, ready: Callable[[], T | None], what: str, timeout_s: float = 30.0, poll_s: float = 0.1
    ) -> T:
        """Wait as ``wait_until`` does, and give up at once when the program ends."""

        def check() -> T | None:
            if not self.running:
                raise SimulatorError(f"{self.name} ended while waiting for {what}:\n{self.tail()}")
            return ready()

        return wait_until(check, f"{self.name}: {what}", timeout_s, poll_s)


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """Send SIGKILL to each process that still runs."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)


def wait_until(ready: Callable[[], T | None], what: str, timeout_s: float = 30.0, poll_s: float = 0.1) -> T:
    """Return the first value of ``ready`` that is neither None nor False.

    Raises ``SimulatorError`` naming ``what`` after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = ready()
        if value is not None and value is not False:
            return value
        if time.monotonic() > deadline:
            raise SimulatorError(f"waited {timeout_s:.0f} s in vain for {what}")
        time.sleep(poll_s)


def run(argv: Sequence[str | Path], env: Mapping[str, str] | None = None, timeout_s: float = 120.0) -> str:
    """Run a program to its end and return what it printed; its error output is in the ``SimulatorError``."""
    done = subprocess.run(
        [str(a) for a in argv],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        command = " ".join(Path(a).name if i == 0 else str(a) for i, a in enumerate(argv))
        raise SimulatorError(f"`{command}` failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def free_ports(n: int) -> list[int]:
    """Return ``n`` different TCP ports that are free on the loopback address now."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]
    finally:
        for s in sockets:
            s.close()
