"""`pithead serve` and `init` as an operator meets them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from contract.errors import PitheadError
from control_plane.cli.client import Client
from provisioning import pki
from simulator.plant import BIN, Plant
from tests.services import wait_for


def pithead(home: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "pithead", *map(str, arguments)],
        env={"PATH": os.environ["PATH"], "HOME": str(home), "COLUMNS": "200", **environment},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def own_plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    """Keys and settings of a site of this module's own; nothing runs."""
    plant = Plant(tmp_path_factory.mktemp("own"))
    plant.prepare()
    return plant


def start(plant: Plant) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "control_plane", "serve", "--data-dir", plant.data_dir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def health(plant: Plant) -> dict[str, object] | None:
    try:
        with Client(plant.api_url, None) as client:
            found: dict[str, object] = client.get("/api/v1/health")
            return found
    except PitheadError:
        return None


def signers(plant: Plant) -> list[int]:
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if b"control_plane.signing.signer" in (line := _read(path)) and str(plant.data_dir).encode() in line
    ]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_broker_that_is_down_at_start_and_a_signer_that_dies(own_plant: Plant) -> None:
    process = start(own_plant)
    try:
        found = wait_for(lambda: health(own_plant), "the API", 30)
        assert (found["status"], found["parts"]) == (
            "degraded",
            {"database": True, "broker": False, "revocations": False, "signer": True},
        )
        assert own_plant.api.get("/api/v1/devices") == {"items": [], "next_cursor": None}
        own_plant.start_broker()
        wait_for(lambda: (health(own_plant) or {}).get("status") == "ok", "the broker to be found", 40)
        (first,) = signers(own_plant)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: signers(own_plant) not in ([], [first]), "another signer")
        wait_for(lambda: (health(own_plant) or {}).get("status") == "ok", "all parts")
        process.send_signal(signal.SIGTERM)
        before = time.monotonic()
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert time.monotonic() - before < 10
        assert out.startswith("Pithead ")
        assert own_plant.api_url in out
        assert own_plant.device_url in out
        assert out.endswith("Stopped.\n")
        assert signers(own_plant) == []
        for line in err.splitlines():
            assert {"t", "level", "logger", "event"} <= json.loads(line).keys()
        assert "Traceback" not in err
    finally:
        process.kill()
        own_plant.stop()


def test_a_taken_directory_and_a_taken_port_are_told(own_plant: Plant) -> None:
    process = start(own_plant)
    try:
        wait_for(lambda: health(own_plant), "the API", 30)
        second = start(own_plant)
        _out, err = second.communicate(timeout=30)
        assert second.returncode == 1
        assert f"another `pithead serve` runs in {own_plant.data_dir}" in " ".join(err.split())
        assert "Traceback" not in err
        (own_plant.data_dir / "serve.lock").unlink()
        third = start(own_plant)
        _out, err = third.communicate(timeout=30)
        assert third.returncode == 1
        assert "config.invalid" in err
        assert "api_port" in err
        assert "Traceback" not in err
        assert (health(own_plant) or {})["parts"]["signer"]  # type: ignore[index]
    finally:
        process.send_signal(signal.SIGINT)
        _out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err


def test_what_is_missing_is_named_with_its_command(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = pithead(tmp_path, "serve", "--data-dir", site)
    assert done.returncode == 1
    assert "pithead init" in done.stderr
    assert pithead(tmp_path, "init", "--data-dir", site).returncode == 0
    done = pithead(tmp_path, "serve", "--data-dir", site)
    assert done.returncode == 1
    assert "pithead keys init" in done.stderr


def test_init_can_be_repeated_and_keeps_what_is_there(tmp_path: Path) -> None:
    site = tmp_path / "site"
    first = pithead(tmp_path, "init", "--data-dir", site, "--host", "plant.example", "--broker-port", "1884")
    assert "pt1." in first.stdout
    profile = tmp_path / ".config" / "pithead" / "cli.toml"
    assert profile.stat().st_mode & 0o777 == 0o600
    kept = {path: path.read_bytes() for path in (profile, site / "pki" / "server-ca" / "ca.key")}
    assert "1884" in (site / "broker" / "mosquitto.conf").read_text()
    second = pithead(tmp_path, "init", "--data-dir", site)
    assert second.returncode == 0, second.stderr
    assert "pt1." not in second.stdout
    assert {path: path.read_bytes() for path in kept} == kept
    assert "1884" in (site / "broker" / "mosquitto.conf").read_text()
    settings = site / "pithead.toml"
    assert settings.stat().st_mode & 0o777 == 0o600
    before = settings.read_bytes()
    other = pithead(tmp_path, "init", "--data-dir", site, "--host", "other.example", "--broker-port", "1884")
    assert other.returncode == 1
    assert 'host = "plant.example", not "other.example"' in other.stderr.replace("\n", " ")
    assert "broker_port" not in other.stderr
    assert settings.read_bytes() == before
    assert "1884" in (site / "broker" / "mosquitto.conf").read_text()


def test_a_name_that_is_changed_by_hand_comes_into_the_certificate(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert pithead(tmp_path, "init", "--data-dir", site).returncode == 0
    refused = pithead(tmp_path, "init", "--data-dir", site, "--host", "plant.example")
    assert "config.invalid" in refused.stderr
    (site / "pithead.toml").write_text('host = "plant.example"\n')
    assert pithead(tmp_path, "init", "--data-dir", site).returncode == 0
    assert pki.has_names((site / "pki" / "server.pem").read_bytes(), ["plant.example", "127.0.0.1"])
    assert (site / "broker" / "server.pem").read_bytes() == (site / "pki" / "server.pem").read_bytes()


def test_an_init_that_failed_can_be_repeated_with_other_values(tmp_path: Path) -> None:
    site = tmp_path / "site"
    wrong = "postgresql://pithead:secret@127.0.0.1:9/none"
    assert pithead(tmp_path, "init", "--data-dir", site, "--database-url", wrong).returncode == 1
    assert not (site / "pithead.toml").exists()
    assert not (site / "pki").exists()
    made = pithead(tmp_path, "init", "--data-dir", site, "--database-url", f"sqlite:///{tmp_path}/x.db")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "x.db").exists()


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////no/such/directory/x.db", "postgresql://nobody@127.0.0.1:9/none"]
)
def test_a_database_that_cannot_be_used_is_told(tmp_path: Path, url: str) -> None:
    done = pithead(tmp_path, "init", "--data-dir", tmp_path / "site", "--database-url", url)
    assert done.returncode == 1
    assert "config.invalid: database_url" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_data_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = pithead(tmp_path, "init", "--data-dir", tmp_path / "file" / "site")
    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "environment", "says"),
    [
        ("api_prt = 1", {}, "api_prt"),
        ("api_port = 0", {}, "api_port"),
        ("api_port = ", {}, "pithead.toml"),
        ("", {"PITHEAD_API_PRT": "1"}, "PITHEAD_API_PRT"),
        ("", {"PITHEAD_API_PORT": "many"}, "api_port"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, environment: dict[str, str], says: str) -> None:
    (tmp_path / "pithead.toml").write_text(text)
    done = pithead(tmp_path, "serve", "--data-dir", tmp_path, **environment)
    assert done.returncode == 1
    assert "config.invalid" in done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
