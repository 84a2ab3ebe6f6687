"""A revoked device is outside when the broker was seen to shut it out, and not before."""

import datetime as dt
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from contract import codec
from contract.bundle import ENROL_PATH, DeviceFacts, EnrolRequest, EnrolResponse
from control_plane.settings import Settings
from control_plane.wiring.layout import Layout
from control_plane.wiring.revocations import SiteBroker
from control_plane.workers.revocations import ALARM_US, DAY_US, RevocationLists
from provisioning import broker, pki
from simulator.plant import Plant
from tests.control_plane.messages import NOW
from tests.services import BrokerSite, make_broker_site, request_for, utc_now, wait_for

DEVICE = "device-one"


class Slow:
    """A broker that obeys, and lets itself be visited, when the test says so."""

    def __init__(self) -> None:
        self.obeys = False
        self.open = False
        self.broken = False
        self.written = 0
        self.evicted: list[str] = []

    def write(self, _revoked: Sequence[pki.Revocation], _now: dt.datetime) -> None:
        self.written += 1

    def apply(self) -> bool:
        if self.broken:
            raise OSError("no such file")
        return self.obeys

    def evict(self, device: str) -> bool:
        if self.open:
            self.evicted.append(device)
        return self.open


class Time:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> int:
        return self.now


def test_it_is_tried_until_it_is_done() -> None:
    serials: list[pki.Revocation] = []
    slow = Slow()
    lists = RevocationLists(lambda: serials, slow, Time())
    assert not lists.tick()
    serials.append(pki.Revocation("a1", utc_now()))
    assert not lists.revoked(DEVICE)
    slow.broken = True
    assert not lists.revoked(DEVICE)  # and nothing is raised
    slow.broken, slow.obeys = False, True
    assert not lists.tick()
    assert not lists.in_force
    slow.open = True
    assert lists.tick()
    assert lists.in_force
    assert (slow.evicted, slow.written) == ([DEVICE], 2)
    assert lists.tick()
    assert (slow.evicted, slow.written) == ([DEVICE], 2)
    assert lists.revoked(DEVICE)


def test_people_hear_of_it_before_everybody_is_locked_out(caplog: pytest.LogCaptureFixture) -> None:
    clock = Time()
    lists = RevocationLists(list, Slow(), clock)
    lists.tick()
    assert "revocations.expiring" not in caplog.messages
    clock.now += ALARM_US + 1
    lists.tick()
    clock.now += DAY_US // 2
    lists.tick()
    assert caplog.messages.count("revocations.expiring") == 1


@pytest.fixture
def site(tmp_path: Path) -> Iterator[BrokerSite]:
    found = make_broker_site(tmp_path)
    yield found
    found.stop()


def of(site: BrokerSite) -> SiteBroker:
    return SiteBroker(Layout(site.directory), Settings(host="127.0.0.1", broker_port=site.port))


def test_a_broker_that_reads_the_lists_is_seen_to_obey(site: BrokerSite) -> None:
    gate = of(site)
    gate.write((), utc_now())
    assert not gate.apply()
    site.start()
    assert gate.apply()
    gate.write((), utc_now())
    assert gate.apply()


def test_a_broker_that_lets_the_revoked_in_is_stopped(
    site: BrokerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("control_plane.wiring.revocations.OBEY_S", 0.3)
    text = site.config.read_text()
    site.config.write_text("\n".join(line for line in text.splitlines() if not line.startswith("crlfile")))
    site.start()
    gate = of(site)
    gate.write((), utc_now())
    assert not gate.apply()
    assert site.process is not None
    assert site.process.wait(10) == 0


def test_a_broker_that_cannot_be_told_is_left_alone_and_not_believed(
    site: BrokerSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.start()
    monkeypatch.setattr(broker, "running", lambda _directory: None)
    gate = of(site)
    gate.write((), utc_now())
    assert not gate.apply()
    assert site.process is not None
    assert site.process.poll() is None


def enrol(plant: Plant) -> str:
    request = EnrolRequest(
        token=plant.join_token(1),
        csr=request_for(ec.generate_private_key(ec.SECP256R1())),
        facts=DeviceFacts(),
    )
    context = ssl.create_default_context(cafile=str(plant.data_dir / "pki" / "server-ca" / "ca.pem"))
    answer = httpx.post(plant.device_url + ENROL_PATH, content=codec.encode(request), verify=context)
    return codec.decode(answer.content, EnrolResponse).device


def test_the_api_says_when_the_broker_does_not_know_yet(tmp_path: Path) -> None:
    plant = Plant(tmp_path / "plant")
    plant.prepare()
    try:
        plant.start_control_plane()
        device = enrol(plant)
        answer = plant.api.request("POST", f"/api/v1/devices/{device}/revoke")
        assert answer.status_code == 202
        assert answer.json()["device"] == device
        assert "may still be connected" in answer.json()["warning"]
        assert plant.api.get(f"/api/v1/devices/{device}")["state"] == "revoked"
        plant.start_broker()
        wait_for(lambda: plant.api.get("/api/v1/health")["status"] == "ok", "the lists to be in force", 40)
        assert plant.api.request("POST", f"/api/v1/devices/{enrol(plant)}/revoke").status_code == 204
    finally:
        plant.stop()
