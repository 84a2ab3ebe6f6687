"""What ``status`` and ``doctor`` say of a device with which something is wrong."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from agent import wiring
from agent.__main__ import main
from agent.core.layout import Layout
from agent.core.settings import SOURCE_KINDS, AgentSettings, Broker, Lane, Probe
from agent.core.slots import Slots
from agent.engine import sources
from agent.identity.record import Identity
from agent.service import doctor
from agent.service.doctor import Surroundings
from agent.service.world import DESIRED
from agent.store.slots import SlotStore
from agent.store.state import StateStore
from contract.errors import PitheadError
from contract.messages import Desired
from tests.agent.bench import Assign
from tests.agent.test_store import fill, small_disk

__all__ = ["small_disk"]
IDENTITY = Identity("dev-test0001", "https://127.0.0.1:1", "127.0.0.1", 1, 5)


def enrolled(root: Path) -> Layout:
    layout = Layout(root)
    layout.identity.mkdir(parents=True)
    layout.identity_file.write_bytes(msgspec.json.encode(IDENTITY))
    return layout


def surroundings(layout: Layout, settings: AgentSettings) -> Surroundings:
    return Surroundings(
        layout=layout,
        settings=settings,
        now=datetime.now(UTC),
        tls=ssl.create_default_context,
        server=lambda identity: wiring.update_server(layout, settings, identity),
    )


def test_status_tells_what_it_cannot_read_from_what_is_not_there(
    tmp_path: Path,
    assign: Assign,
    desire: Callable[..., Desired],
    capsys: pytest.CaptureFixture[str],
) -> None:
    layout = enrolled(tmp_path)
    state = StateStore(layout.state)
    state.put({DESIRED: desire(assign("1.0.0"), revision=7)})
    state.close()
    SlotStore(layout.slots).save(Slots("pump"))
    assert main(["status", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "revision 7" in said
    assert "problem" not in said
    layout.state.write_bytes(b"no database at all" * 500)
    layout.outbox.write_bytes(b"no database at all" * 500)
    (layout.slots / "fan.json").write_text("{")
    layout.config.parent.mkdir(parents=True)
    layout.config.write_text("[sever]\n")
    assert main(["status", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for named in ("state.db", "outbox.db", "fan.json", "sever"):
        assert any(named in line for line in said.splitlines() if line.startswith("problem")), named


def test_keys_that_are_missing_mean_to_enrol_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = enrolled(tmp_path)
    with pytest.raises(PitheadError, match=r"device\.key missing\); delete it and enrol again"):
        wiring.device_tls(layout)
    assert main(["doctor", "--root", str(tmp_path)]) == 1
    assert "enrol again" in capsys.readouterr().out


def test_doctor_survives_an_address_that_is_none(tmp_path: Path) -> None:
    settings = AgentSettings(broker=Broker(host="plant..example"))
    found = doctor._broker(surroundings(enrolled(tmp_path), settings), IDENTITY)
    assert found.result == "failed"
    assert "plant..example" in found.detail


def test_doctor_looks_at_each_source_s_settings_and_at_what_is_required(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = Lane("a", "pump", {"kind": "replay", "path": "rows.csv"})
    typo = Lane("b", "pump", {"kind": "replay", "pathh": "rows.csv"})
    settings = AgentSettings(lanes=(good, typo), probe=Probe("full"))
    found = list(doctor._lanes(settings))
    assert [f.result for f in found] == ["ok", "failed"]
    assert "pathh" in found[1].detail or "path" in found[1].detail
    monkeypatch.setattr(doctor, "TRY_SANDBOX", "print('partial')")
    assert doctor._sandbox(settings).result == "failed"
    assert doctor._sandbox(AgentSettings()).result == "warning"


@pytest.mark.parametrize("kind", SOURCE_KINDS)
def test_every_source_can_be_checked_without_opening_it(kind: str) -> None:
    with pytest.raises(PitheadError, match="field") as caught:
        sources.check({"kind": kind, "path": "rows.csv", "unknown_key": 1})
    assert caught.value.code == "config.invalid"


def test_doctor_calls_a_full_disk_a_failure(small_disk: Path) -> None:
    layout = Layout(small_disk)
    layout.state_dir.mkdir(parents=True)
    fill(small_disk)
    assert doctor._disk(layout).result == "failed"
