"""A real supervisor and its real engine, against a real control plane and broker on this machine."""

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from contract.messages import ModelAssignment, Reporting, Role
from control_plane.services import desired
from control_plane.services.releases import assignment
from control_plane.store.database import Database
from simulator.plant import BIN, Plant
from tests.engine.conftest import free_port

pytestmark = pytest.mark.xdist_group("supervisor")
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "build/packages/shuttle/1.0.0"
FAST = Reporting(bucket_s=0.5, health_s=0.5, trial_s=1.0)
FORBIDDEN = ("numpy", "onnxruntime", "ai_edge_litert", "cryptography", "tuf", "psutil")
Wait = Callable[..., None]


@dataclass
class Site:
    """The plant and its database."""

    plant: Plant
    database: Database

    def publish(self, directory: Path, version: str, counter: int, **edit: Any) -> Path:
        """Release the shipped model under another version; return its directory."""
        package = directory / version
        package.mkdir(parents=True)
        for path in SHIPPED.iterdir():
            os.link(path, package / path.name)
        manifest = json.loads((SHIPPED / "manifest.json").read_bytes())
        manifest |= {"version": version, "release_counter": counter, **edit}
        (package / "manifest.json").unlink()
        (package / "manifest.json").write_text(json.dumps(manifest))
        key = self.plant.data_dir / "offline" / "release-1.pem"
        self.plant.pithead("release", "--key", key, package, releaser=True)
        return package

    def order(self, device: str, *wanted: tuple[str, dict[str, Any]], reporting: Reporting = FAST) -> None:
        """Want versions of the model on a device."""
        with self.database.transaction() as tx:
            models: Sequence[ModelAssignment] = [
                replace(assignment(tx, "shuttle", version), **more) for version, more in wanted
            ]
            desired.change(tx, device, lambda d: replace(d, models=tuple(models), reporting=reporting))

    def health(self, device: str) -> dict[str, Any]:
        """Return a device's newest health as operators get it."""
        found: dict[str, Any] = self.plant.api.get(f"/api/v1/devices/{device}")["health"]
        return found

    def receipts(self, device: str) -> list[tuple[str, str, str | None]]:
        """Return (version, state, code) of a device's receipts as the control plane stored them."""
        with contextlib.closing(sqlite3.connect(self.plant.data_dir / "pithead.db")) as db:
            return db.execute(
                "SELECT version, state, code FROM receipt WHERE device_id = ? ORDER BY epoch, seq", (device,)
            ).fetchall()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not SHIPPED.is_dir():
        pytest.skip(f"{SHIPPED} is missing: make setup")
    directory = tmp_path_factory.mktemp("site")
    plant = Plant(directory / "plant")
    plant.prepare()
    plant.start()
    database = Database(f"sqlite:///{plant.data_dir / 'pithead.db'}")
    found = Site(plant, database)
    try:
        found.publish(directory, "1.0.0", 1)
        found.publish(directory, "2.0.0", 2)
        pipeline = json.loads((SHIPPED / "manifest.json").read_bytes())["pipeline"]
        # Nine values as before, of which only three come at once: not what the lanes' sources are set up for.
        three = {name: pipeline[name][:3] for name in ("channels", "mean", "scale")} | {"window": 3}
        found.publish(directory, "3.0.0", 3, reference=None, pipeline=pipeline | three)
        yield found
    finally:
        database.close()
        plant.stop()


class Device:
    """An agent of our own below ``root``."""

    def __init__(self, site: Site, root: Path, recording: Path) -> None:
        self.site, self.root = site, root
        self.process: subprocess.Popen[bytes] | None = None
        token = site.plant.join_token(1)
        self.agent("enroll", "--server", site.plant.device_url, "--token", token)
        identity = json.loads((root / "var/lib/pithead/identity/identity.json").read_text())
        self.id: str = identity["device"]
        config = root / "etc/pithead/agent.toml"
        config.parent.mkdir(parents=True)
        config.write_text(
            '[server]\npoll_s = 0.5\n[[lanes]]\nname = "line"\nmodel = "shuttle"\n'
            f'[lanes.source]\nkind = "replay"\npath = "{recording}"\nrate_hz = 100.0\n'
            f"columns = {[f'f{i}' for i in range(1, 10)]}\n"
        )

    def agent(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "pithead-agent", *arguments, "--root", str(self.root)],
            capture_output=True, text=True, check=check, timeout=60,
        )  # fmt: skip

    def start(self) -> None:
        with (self.root / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [BIN / "pithead-agent", "run", "--root", str(self.root)], stdout=log, stderr=log
            )

    def engine(self) -> psutil.Process | None:
        socket = str(self.root / "run/pithead/engine.sock")
        found = [
            p for p in psutil.process_iter(["cmdline"])
            if socket in (p.info["cmdline"] or ()) and p.status() != psutil.STATUS_ZOMBIE
        ]  # fmt: skip
        return found[0] if found else None

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGTERM)
        engine = self.engine()
        if engine is not None:
            engine.kill()

    def power_cut(self) -> None:
        """End the supervisor and its engine at one stroke."""
        engine = self.engine()
        if engine is not None:
            engine.kill()
        self.signal(signal.SIGKILL)

    def slots(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.root / "var/lib/pithead/slots/shuttle.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def serves(self, version: str, activation: int = 0) -> bool:
        """Whether a version is confirmed."""
        found = self.slots()
        active = found.get("active") or {}
        return (
            found.get("trial") is None
            and active.get("installed", {}).get("version") == version
            and active.get("activation", 0) == activation
        )

    def live(self) -> dict[str, Any]:
        """Return the newest snapshot of the running supervisor."""
        try:
            found: dict[str, Any] = json.loads((self.root / "run/pithead/status.json").read_text())
        except FileNotFoundError:
            return {}
        return found

    def windows(self) -> int:
        return sum(lane.get("windows", 0) for lane in self.live().get("lanes", []))

    def log(self) -> str:
        return (self.root / "agent.log").read_text()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    rows = ["43,0,82,0,42,0,39,41,2", "45,1,83,0,40,2,38,42,4"] * 50
    path.write_text("\n".join([",".join(f"f{i}" for i in range(1, 10)), *rows]) + "\n")
    return path


@pytest.fixture
def device(site: Site, tmp_path: Path, recording: Path) -> Iterator[Device]:
    found = Device(site, tmp_path, recording)
    yield found
    found.stop()
    assert "Traceback" not in found.log()


@pytest.fixture
def serving(site: Site, device: Device, wait_until: Wait) -> Device:
    """A device on which version 1 is confirmed."""
    device.start()
    site.order(device.id, ("1.0.0", {}))
    wait_until(lambda: device.serves("1.0.0"), "version 1 to be confirmed", 40)
    return device


def test_a_version_comes_to_service_and_the_engine_outlives_its_supervisor(
    site: Site, serving: Device, wait_until: Wait
):
    device = serving
    wait_until(lambda: ("1.0.0", "confirmed", None) in site.receipts(device.id), "the receipts")
    states = [state for _, state, _ in site.receipts(device.id)]
    assert states[0] == "acknowledged"
    for state in ("fetching", "verified", "probed", "ready", "soaking"):
        assert state in states, states

    assert device.process is not None
    maps = Path(f"/proc/{device.process.pid}/maps").read_text()
    assert not [name for name in FORBIDDEN if f"/{name}/" in maps]

    engine = device.engine()
    assert engine is not None
    before = device.windows()
    device.signal(signal.SIGKILL)
    assert "supervisor  not running" in device.agent("status").stdout
    with (device.root / "etc/pithead/agent.toml").open("a") as config:
        config.write(
            f'[[lanes.sinks]]\nkind = "http"\nwhen = "every window"\nurl = "http://127.0.0.1:{free_port()}/"\n'
        )
    device.start()
    wait_until(lambda: device.windows() > before, "the same engine to be heard again")
    assert device.engine() == engine
    device.signal(signal.SIGHUP)
    assert device.engine() == engine
    device.start()
    wait_until(lambda: device.windows() > before, "the same engine to be heard again")

    # A sham restart: the same version goes through a trial once more.
    site.order(device.id, ("1.0.0", {"activation": 5, "rollout": "r-sham"}))
    wait_until(lambda: device.serves("1.0.0", 5), "the sham restart")
    assert device.engine() == engine
    status = json.loads(device.agent("status", "--json").stdout)
    assert status["supervisor_running"]
    assert status["models"][0]["serving"]["version"] == "1.0.0"
    assert status["models"][0]["wanted"][0]["state"] == "confirmed"
    assert device.agent("doctor").returncode == 0

    # What stops its sinks is seen from afar.
    device.agent("bypass", "on", "--why", "valve is out")
    wait_until(
        lambda: {"bypass", "ailing"} <= site.health(device.id).keys(), "the control plane to know of both"
    )
    told = site.health(device.id)
    assert told["bypass"]["why"] == "valve is out"
    (hook,) = told["ailing"]
    assert (hook["lane"], hook["what"], hook["sink"], hook["code"]) == ("line", "sink", "http", "sink.failed")
    shown = site.plant.pithead("devices", "show", device.id)
    assert ": valve is out" in shown
    assert "lane line: sink http failed" in shown
    device.agent("bypass", "off")
    wait_until(lambda: "bypass" not in site.health(device.id), "and of its end")

    device.stop()
    assert device.engine() is None


def test_killed_at_every_step_of_an_install_it_comes_back_and_converges(
    site: Site, serving: Device, wait_until: Wait
):
    device = serving
    states = ("acknowledged", "fetching", "verified", "ready", "activating", "soaking")
    before = device.log()
    site.order(device.id, ("2.0.0", {}))
    for i, state in enumerate(states):
        # An update process outlives the cut, so that a step may be over before it could be told.
        event = re.compile(rf'"event": "receipt".*"state": "({"|".join(states[i:])})"')
        old = len(event.findall(before))
        wait_until(lambda e=event, old=old: len(e.findall(device.log())) > old, state, 40)
        device.power_cut()
        assert device.slots()["active"]["installed"]["version"] in {"1.0.0", "2.0.0"}
        device.start()
    wait_until(lambda: device.serves("2.0.0"), "version 2 to be confirmed", 60)
    wait_until(lambda: ("2.0.0", "confirmed", None) in site.receipts(device.id), "its receipt")
    assert device.slots()["last_good"]["version"] == "1.0.0"
    assert not device.slots().get("rejected")


def test_an_engine_that_dies_during_a_trial_brings_the_last_good_back(
    site: Site, serving: Device, wait_until: Wait
):
    device = serving
    site.order(device.id, ("2.0.0", {"attempt": 1}), reporting=replace(FAST, trial_s=15.0))
    wait_until(lambda: device.slots().get("trial"), "the trial")
    digest = device.slots()["trial"]["installed"]["digest"]
    wait_until(
        lambda: digest in {lane.get("digest") for lane in device.live().get("lanes", [])}, "its session"
    )
    engine = device.engine()
    assert engine is not None
    engine.kill()
    wait_until(lambda: ("2.0.0", "rolled_back", "trial.crashed") in site.receipts(device.id), "the receipt")
    assert device.serves("1.0.0")
    wait_until(lambda: device.windows() > 0, "version 1 to go on in a new engine")
    site.order(device.id, ("2.0.0", {"attempt": 2}))
    wait_until(lambda: device.serves("2.0.0"), "the second attempt", 40)


@pytest.mark.timeout(300)
def test_a_version_that_fails_its_trial_and_one_that_was_tampered_with(
    site: Site, serving: Device, wait_until: Wait
):
    device = serving
    site.order(device.id, ("3.0.0", {}))
    wait_until(
        lambda: ("3.0.0", "rolled_back", "trial.unhealthy") in site.receipts(device.id), "rollback", 40
    )
    assert device.serves("1.0.0")
    status = device.agent("status").stdout
    assert "rolled_back: trial.unhealthy" in status

    manifest = json.loads((SHIPPED / "manifest.json").read_bytes(), object_hook=dict)
    best = max(manifest["variants"], key=lambda v: v["preference"])["file"]
    stored = site.plant.data_dir / "objects" / best["sha256"]
    honest = stored.read_bytes()
    other = Device(site, device.root / "other", ROOT / "none.csv")
    try:
        stored.write_bytes(bytes([honest[0] ^ 1]) + honest[1:])
        other.start()
        site.order(other.id, ("1.0.0", {}))
        wait_until(
            lambda: ("1.0.0", "refused", "update.hash_mismatch") in site.receipts(other.id), "refusal", 90
        )
        stored.write_bytes(honest)
        site.order(other.id, ("1.0.0", {"attempt": 1, "role": Role.STAGED}))
        wait_until(lambda: other.slots().get("standby"), "the second attempt to be staged", 40)
        wait_until(lambda: ("1.0.0", "ready", None) in site.receipts(other.id), "its receipt")
    finally:
        stored.write_bytes(honest)
        other.stop()


def test_updates_come_without_the_broker_and_service_goes_on_without_the_server(
    site: Site, serving: Device, wait_until: Wait
):
    device, plant = serving, site.plant
    plant.stop_broker()
    try:
        site.order(device.id, ("2.0.0", {}))
        wait_until(lambda: device.serves("2.0.0"), "an update by polling alone", 40)
    finally:
        plant.start_broker()
    wait_until(lambda: ("2.0.0", "confirmed", None) in site.receipts(device.id), "the receipts to follow", 60)
    plant.stop_control_plane()
    try:
        before = device.windows()
        site.order(device.id, ("1.0.0", {"activation": 1}))
        wait_until(lambda: device.windows() > before + 100, "the device to go on serving")
        wait_until(lambda: "update.unreachable" in device.live()["server"], "the status to say so")
        wait_until(lambda: device.live()["outbox"]["records"] > 3, "records to be kept")
    finally:
        plant.start_control_plane()
    wait_until(lambda: device.serves("1.0.0", 1), "what was wanted meanwhile", 60)
    wait_until(lambda: device.live()["outbox"]["records"] <= 5, "the outbox to empty", 150)


def test_only_one_supervisor_runs(serving: Device):
    second = serving.agent("run", check=False)
    assert second.returncode == 2
    assert "config.invalid" in second.stderr
    assert "another supervisor runs" in second.stderr


# --- enrolment


def enrol(root: Path, server: str, token: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "pithead-agent", "enroll", "--server", server, "--token", token, "--root", str(root)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def files(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def test_enrolling_twice_changes_nothing_and_a_token_serves_once(site: Site, tmp_path: Path):
    token = site.plant.join_token(1)
    first = enrol(tmp_path / "a", site.plant.device_url, token)
    assert first.returncode == 0, first.stderr
    identity = tmp_path / "a/var/lib/pithead/identity"
    assert (identity / "device.key").stat().st_mode & 0o777 == 0o600
    before = {p.name: p.read_bytes() for p in identity.iterdir()}
    again = enrol(tmp_path / "a", site.plant.device_url, token)
    assert again.returncode == 0
    assert "already enrolled" in again.stdout
    assert {p.name: p.read_bytes() for p in identity.iterdir()} == before
    moved = enrol(tmp_path / "a", "https://elsewhere.example", token)
    assert moved.returncode == 2
    assert "request.conflict" in moved.stderr
    (tmp_path / "b").mkdir()
    second = enrol(tmp_path / "b", site.plant.device_url, token)
    assert second.returncode == 2
    assert "enrol.token_used" in second.stderr
    assert files(tmp_path / "b") == []


def test_a_server_that_the_token_does_not_name_is_refused(site: Site, tmp_path: Path):
    token = site.plant.join_token(1)
    forged = token[:-1] + ("0" if token[-1] != "0" else "1")
    refused = enrol(tmp_path, site.plant.device_url, forged)
    assert refused.returncode == 2
    assert "enrol.server_not_trusted" in refused.stderr
    assert files(tmp_path) == []
    assert enrol(tmp_path, site.plant.device_url, token).returncode == 0


@pytest.mark.parametrize(
    ("server", "token", "code"),
    [
        ("https://127.0.0.1:1", "pj1." + "A" * 43 + "." + "0" * 64, "update.unreachable"),
        ("https://127.0.0.1:1", "pj1.short", "enrol.token_invalid"),
        ("http://127.0.0.1:1", "pj1." + "A" * 43 + "." + "0" * 64, "config.invalid"),
    ],
)
def test_enrolment_fails_clearly(tmp_path: Path, server: str, token: str, code: str):
    failed = enrol(tmp_path, server, token)
    assert failed.returncode == 2
    assert code in failed.stderr
    assert files(tmp_path) == []


def test_without_enrolment_it_says_what_to_do(tmp_path: Path):
    for command in ("run", "doctor"):
        done = subprocess.run(
            [BIN / "pithead-agent", command, "--root", str(tmp_path)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode in {1, 2}
        assert "pithead-agent enroll" in done.stdout + done.stderr


def test_the_supervisor_s_imports_are_light():
    script = "import agent.__main__, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(FORBIDDEN) & set(done.stdout.split())
