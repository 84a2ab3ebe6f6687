"""The command line as a person uses it."""

import json
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from contract import codec, topics
from contract.bundle import ENROL_PATH, DeviceFacts, EnrolRequest, EnrolResponse
from contract.messages import (
    Ailing,
    AssignmentState,
    Bypass,
    RejectedVersion,
    Reported,
    ReportedModel,
    VersionInSlot,
)
from control_plane.cli.devices import reasons
from provisioning.site import Site
from simulator.plant import BIN, Plant
from tests.control_plane.messages import NOW, anomaly, envelope, health, receipt, summary
from tests.services import BrokerSite, Connection, device_identity, request_for, wait_for

pytestmark = pytest.mark.xdist_group("plant")

Run = Callable[..., subprocess.CompletedProcess[str]]
HASH = "0" * 64


@pytest.fixture
def run(plant: Plant) -> Run:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "pithead", *arguments],
            env={
                "PATH": "/usr/bin:/bin",
                "HOME": str(plant.data_dir),
                "XDG_CONFIG_HOME": str(plant.data_dir / "config"),
                "COLUMNS": "180",
                **environment,
            },
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture(scope="session")
def seen_device(plant: Plant, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A device that has told the plant all about itself."""
    directory = tmp_path_factory.mktemp("device")
    site = Site(plant.data_dir / "pki")
    device = _enrol(plant)
    connection = Connection(
        BrokerSite(plant.data_dir, site, plant.ports.broker, plant.config),
        device_identity(site, device, directory),
    ).open()
    slot = VersionInSlot(version="1.0.0", digest=HASH, variant="int8", accelerator="xnnpack")
    rejected = RejectedVersion(
        version="1.1.0", digest=HASH, attempt=0, code="probe.golden_mismatch", detail="12 of 16 differ"
    )
    model = ReportedModel(
        model_name="shuttle", active=slot, last_good=slot, lane="running", rejected=(rejected,)
    )
    refused = receipt(AssignmentState.REFUSED, code="probe.golden_mismatch", detail="12 of 16 differ")
    sick = Ailing("press", "sink", "failed", "hook", "http", "sink.failed", "no route", waiting=4, lost=2)
    for batch in (
        [
            envelope(refused, 1, device=device),
            envelope(Reported(revision=0, models=(model,), hardware="rpi4"), 2, device=device),
        ],
        [envelope(anomaly(7.5, source="replay", source_ref="row 12"), 1, device=device)],
        [envelope(summary(), 1, device=device)],
        [envelope(health(bypass=Bypass(NOW, "ann", "valve is out"), ailing=(sick,)), 1, device=device)],
    ):
        payload, kind = codec.encode_batch(batch)
        connection.publish(topics.records(device, batch[0].priority), payload, content_type=kind)
    connection.close()
    wait_for(lambda: plant.api.get(f"/api/v1/devices/{device}")["health"], "the device's health")
    return device


def _enrol(plant: Plant) -> str:
    token = plant.join_token(1, {"site": "south"})
    facts = DeviceFacts(name="furnace 2", hardware="rpi4")
    request = EnrolRequest(token, request_for(ec.generate_private_key(ec.SECP256R1())), facts)
    context = ssl.create_default_context(cafile=str(plant.data_dir / "pki" / "server-ca" / "ca.pem"))
    connection = HTTPSConnection("127.0.0.1", plant.ports.device, context=context)
    connection.request("POST", ENROL_PATH, body=codec.encode(request))
    answer = codec.decode(connection.getresponse().read(), EnrolResponse)
    connection.close()
    return answer.device


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no control plane."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["devices", "list", "--server", "OTHER"], "no control plane: it answers with text/html"),
        (["devices", "list", "--server", "http://127.0.0.1:9"], "--server"),
        (["devices", "list", "--server", "http://["], "server.unreachable"),
        (["devices", "list", "--token", "wr€ng"], "auth.invalid"),
        (["anomalies", "list", "--minutes", "nan"], "--minutes"),
        (["events", "list", "--minutes", "1e300"], "--minutes"),
        (["devices", "show", ""], "the device is empty"),
        (["tokens", "create", "--role", "operator"], "--kind api"),
        (["tokens", "create", "--kind", "api", "--uses", "3"], "join tokens"),
        (["groups", "create", "g", "--label", "x=!"], "selector.x"),
        (["serve", "--data-dir", "/nowhere", "--log-level", "foo"], "log_level"),
    ],
)
def test_a_slip_is_one_sentence(run: Run, other_server: str, arguments: list[str], says: str) -> None:
    done = run(*[other_server if word == "OTHER" else word for word in arguments])
    assert done.returncode == 1, done
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "the device tries again" not in done.stderr


def test_help_is_quick_since_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from control_plane.__main__ import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'fastapi', 'sqlmodel', 'numpy', 'tuf', 'paho', 'httpx', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.endswith("[]\n"), done.stdout
    for name in ("init", "serve", "devices", "rollouts", "release", "models", "keys", "demo"):
        assert f" {name} " in done.stdout


@pytest.mark.parametrize(
    "command", ["init", "serve", "broker", "devices", "groups", "tokens", "anomalies", "events", "keys"]
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"pithead {command}" in done.stdout


def test_a_broken_command_of_another_package_breaks_no_other(tmp_path: Path, run: Run) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pithead.commands]\nbroken = no_such_module:app\n")
    listed = run("--help", PYTHONPATH=str(tmp_path))
    assert "broken" in listed.stdout
    done = run("broken", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "no_such_module" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("groups", "list", PYTHONPATH=str(tmp_path)).returncode == 0


def test_what_runs_where(run: Run, seen_device: str) -> None:
    done = run("devices", "list", "--label", "site=south")
    (line,) = [line for line in done.stdout.splitlines() if seen_device in line]
    for part in ("furnace 2", "shuttle 1.0.0", "1 rejected", "site=south", "rpi4", " bypassed"):
        assert part in line


def test_devices_that_tell_of_trouble_are_found(run: Run, seen_device: str, plant: Plant) -> None:
    other = _enrol(plant)
    plant.api.patch(f"/api/v1/devices/{other}", {"name": "oven"})
    for option, found in (("--troubled", {seen_device}), ("--untroubled", {other})):
        listed = run("devices", "list", "--label", "site=south", option).stdout
        assert {device for device in (seen_device, other) if device in listed} == found


def test_and_why(run: Run, seen_device: str) -> None:
    done = run("devices", "show", seen_device)
    assert done.returncode == 0, done.stderr
    for part in (
        "furnace 2",
        "running",
        "int8",
        "xnnpack",
        "shuttle 1.1.0 rejected: probe.golden_mismatch: 12 of 16 differ",
        "The model, the runtime or the kernel differs",
        "refused",
        "bypassed: no control is written, since 20",
        " by ann: valve is out",
        "lane press: sink hook (http) failed, 4 waiting, 2 lost: sink.failed: no route. ",
        "MUTED",
    ):
        assert part in done.stdout, done.stdout


def test_json_for_programs(run: Run, seen_device: str) -> None:
    shown: dict[str, Any] = json.loads(run("devices", "show", seen_device, "-o", "json").stdout)
    assert shown["reported"]["models"][0]["rejected"][0]["code"] == "probe.golden_mismatch"
    assert (shown["summaries"][0]["muted"], shown["health"]["ailing"][0]["lost"]) == (7, 2)
    listed = json.loads(run("anomalies", "list", "--device", seen_device, "--output", "json").stdout)
    assert [entry["score"] for entry in listed] == [7.5]


def test_labels_groups_anomalies_events(run: Run, seen_device: str) -> None:
    assert run("devices", "label", seen_device, "line=3", "site=").stdout == "line=3\n"
    assert run("devices", "label", seen_device, "site=south", "line=").stdout == "site=south\n"
    assert run("groups", "create", "southern", "--label", "site=south").returncode == 0
    assert "site=south" in run("groups", "list").stdout
    assert seen_device in run("devices", "list", "--group", "southern").stdout
    assert run("groups", "delete", "southern").returncode == 0
    assert "row 12" in run("anomalies", "list", "--device", seen_device).stdout
    assert "device.enrolled" in run("events", "list", "--subject", seen_device).stdout


def test_tokens(run: Run) -> None:
    made = run("tokens", "create", "--label", "site=x", "--uses", "3", "--ttl", "2h", "--name", "batch 9")
    assert made.stdout.startswith("pj1.")
    assert "batch 9" in run("tokens", "list").stdout
    issued = json.loads(run("tokens", "create", "--kind", "api", "--role", "viewer", "-o", "json").stdout)
    assert run("devices", "list", PITHEAD_TOKEN=issued["token"]).returncode == 0
    denied = run("tokens", "create", PITHEAD_TOKEN=issued["token"])
    assert denied.returncode == 1
    assert "auth.forbidden" in denied.stderr
    assert run("tokens", "revoke", issued["id"], "--kind", "api").returncode == 0
    assert "auth.invalid" in run("devices", "list", PITHEAD_TOKEN=issued["token"]).stderr


def test_mistakes_are_told_in_one_piece(run: Run) -> None:
    for arguments, says in (
        (("devices", "show", "device-nobody"), "request.not_found"),
        (("tokens", "create", "--ttl", "soon"), "--ttl"),
        (("devices", "list", "--server", "http://127.0.0.1:9"), "cannot reach"),
        (("devices", "list", "--token", "pt1.wrong"), "auth.invalid"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_reasons_of_a_device_that_never_spoke() -> None:
    device = {"online": False, "reported": None, "desired": {"revision": 2}}
    assert [line.split(":")[0] for line in reasons(device)] == ["offline", "it has not reported yet"]


def test_a_device_is_found_by_its_name_while_one_alone_has_it(
    plant: Plant, run: Run, seen_device: str
) -> None:
    assert f"{seen_device}  furnace 2" in run("devices", "show", "furnace 2").stdout
    twin = _enrol(plant)
    refused = run("devices", "show", "furnace 2")
    assert refused.returncode == 1
    for part in ("request.invalid", "several devices", seen_device, twin):
        assert part in refused.stderr
    assert run("devices", "revoke", twin, "--yes").returncode == 0
    assert run("devices", "show", "furnace 2").returncode == 0
