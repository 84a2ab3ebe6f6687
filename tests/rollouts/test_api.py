"""The API and the command line, with real tokens, services and a simulated fleet behind them."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from typer.testing import CliRunner

from contract.errors import PitheadError
from control_plane.api import problems, rollouts
from control_plane.cli.client import Client
from control_plane.cli.rollouts import rollouts_app
from control_plane.services.access import Access
from control_plane.store.database import Database
from tests.services import wait_for

PATH = "/api/v1/rollouts"


class Site:
    """A fleet behind a listening API, and a token for each role."""

    def __init__(self, fleet: Any, database: Database) -> None:
        self.fleet = fleet
        self.access = Access(database, lambda: fleet.now)
        app = FastAPI()
        problems.install(app)
        app.state.access = self.access
        app.include_router(rollouts.router(fleet.rollouts))
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.clients: list[Client] = []
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> None:
        self.thread.start()
        wait_for(lambda: self.server.started, "the API")

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self.server.should_exit = True
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def client(self, *roles: str) -> Client:
        return self.connect(self.token(*roles))

    def connect(self, token: str | None) -> Client:
        self.clients.append(Client(self.url, token))
        return self.clients[-1]

    def token(self, *roles: str) -> str:
        return self.access.create(actor="test", name="-".join(roles), roles=roles).token

    def cli(self, *arguments: str, roles: tuple[str, ...] = ("admin",)) -> str:
        options = ["--server", self.url, "--token", self.token(*roles)]
        done = CliRunner().invoke(rollouts_app, [*arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture
def site(fleet: Any, database: Database) -> Iterator[Site]:
    fleet.release("2.0.0")
    made = Site(fleet, database)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def wanted(policy: dict[str, Any]) -> dict[str, Any]:
    return {"model": "shuttle", "version": "2.0.0", "policy": policy}


def test_roles(site: Site, wanted: dict[str, Any]):
    with pytest.raises(PitheadError) as caught:
        site.connect(None).get(PATH)
    assert caught.value.code == "auth.missing"
    with pytest.raises(PitheadError) as caught:
        site.client("viewer").post(PATH, wanted)
    assert caught.value.code == "auth.forbidden"
    made = site.client("operator").post(PATH, wanted)
    for action in ("approve", "skip"):
        with pytest.raises(PitheadError) as caught:
            site.client("operator").post(f"{PATH}/{made['id']}/{action}")
        assert caught.value.code == "auth.forbidden"
    with pytest.raises(PitheadError) as caught:
        site.client("approver").post(f"{PATH}/{made['id']}/rollback")
    assert caught.value.code == "auth.forbidden"


def test_a_rollout_through_the_api(site: Site, wanted: dict[str, Any]):
    api = site.client("admin")
    made = api.post(PATH, wanted)
    assert (made["state"], made["stage"], made["stages"], made["devices"]) == ("scheduled", 1, 3, 20)
    site.fleet.run_until(made["id"], {"succeeded"}, 200)
    found = api.get(f"{PATH}/{made['id']}")
    assert found["states"] == {"confirmed": 17, "ready": 3}
    assert found["arms"] == {"canary": 17, "hold_out": 3}
    verdicts = api.get(f"{PATH}/{made['id']}/verdicts")
    last = [v for v in verdicts if v["kind"] == "gate"][-1]
    assert (last["verdict"], last["stage"]) == ("advance", 3)
    assert {m["metric"] for m in last["numbers"]["look"]["metrics"]} == {
        "latency_p95_us",
        "alarm_rate",
        "error_rate",
    }
    trace = api.get_bytes(f"{PATH}/{made['id']}/verdicts/{last['id']}/trace").decode()
    assert json.loads(trace.splitlines()[0])["metric"] == "latency_p95_us"
    members = api.get(f"{PATH}/{made['id']}/assignments")
    assert {m["previous_version"] for m in members} == {"1.0.0"}
    assert next(one["id"] for one in api.get(PATH, {"state": "succeeded"})["items"]) == made["id"]


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        ({"policy": {"alhpa": 1}}, "rollout.policy_invalid", "alhpa"),
        ({"version": "9.9.9"}, "request.not_found", "9.9.9"),
        ({"colour": "red"}, "request.invalid", "colour"),
        ({"group": "nowhere"}, "request.not_found", "nowhere"),
    ],
)
def test_wrong_requests(site: Site, wanted: dict[str, Any], change: dict[str, Any], code: str, named: str):
    for path in (PATH, f"{PATH}/plan"):
        with pytest.raises(PitheadError) as caught:
            site.client("admin").post(path, wanted | change)
        assert caught.value.code == code
        assert named in caught.value.detail


def test_what_is_not_there(site: Site):
    for path in ("nothing", "nothing/verdicts", "nothing/assignments", "nothing/verdicts/1/trace"):
        with pytest.raises(PitheadError) as caught:
            site.client("viewer").get(f"{PATH}/{path}")
        assert caught.value.code == "request.not_found"


def test_decisions_at_the_wrong_time_are_refused(site: Site, wanted: dict[str, Any]):
    api = site.client("admin")
    made = api.post(PATH, wanted)
    for action in ("approve", "resume", "skip", "pause", "rollback", "retry"):
        with pytest.raises(PitheadError) as caught:
            api.post(f"{PATH}/{made['id']}/{action}", {"reason": "because"} if action != "retry" else None)
        assert caught.value.code == "rollout.illegal_transition"
    assert api.post(f"{PATH}/{made['id']}/abort", {"reason": "changed my mind"})["state"] == "aborted"


def test_the_command_line(site: Site, policy_file: Path, tmp_path: Path):
    plan = site.cli("plan", "shuttle", "2.0.0", "--policy", str(policy_file))
    assert "20 devices, canary; hold-out 3" in plan
    rollout = site.cli("create", "shuttle", "2.0.0", "--policy", str(policy_file)).strip()
    site.fleet.run_until(rollout, {"running"}, 5)
    while site.fleet.rollouts.detail(rollout).verdict is None:
        site.fleet.run(0.5)
    assert "paused" in site.cli("pause", rollout, "-m", "lunch")
    assert "running" in site.cli("resume", rollout)
    shown = site.cli("show", rollout, "--devices", "--verdicts")
    assert "gate" in shown
    assert "canary" in shown
    device = site.fleet.devices[0].id
    assert "its turn" in site.cli("why", rollout, device)
    assert rollout in site.cli("list")
    assert json.loads(site.cli("show", rollout, "-o", "json"))["id"] == rollout
    looked = site.fleet.rollouts.verdicts(rollout)[-1]
    trace = tmp_path / "trace.jsonl"
    trace.write_text(site.cli("trace", rollout, str(looked.id)))
    replayed = CliRunner().invoke(
        rollouts_app, ["replay", "--policy", str(policy_file), "--trace", str(trace)], catch_exceptions=False
    )
    last = json.loads(replayed.stdout.splitlines()[-1])
    assert last["verdict"] == looked.verdict
    assert last["reason"].endswith(looked.reason)
    assert "rolling_back" in site.cli("rollback", rollout)
    site.fleet.run_until(rollout, {"rolled_back"}, 30)
    watched = CliRunner().invoke(
        rollouts_app, ["watch", rollout, "--server", site.url, "--token", site.token("viewer")]
    )
    assert watched.exit_code == 1, "it did not succeed"
    assert "rolled_back" in watched.output


def test_a_small_fleet_asks_for_approval_through_the_api(
    make_fleet: Callable[..., Any], database: Database, wanted: dict[str, Any]
):
    fleet = make_fleet(devices=3)
    fleet.install()
    fleet.release("2.0.0")
    site = Site(fleet, database)
    site.start()
    try:
        wanted["policy"] |= {"stages": [{"devices": 1}, {"percent": 100}], "max_soak_buckets": 8}
        wanted["policy"]["min_soak_buckets"] = 5
        made = site.client("operator").post(PATH, wanted)
        fleet.run_until(made["id"], {"paused"}, 60)
        found = site.client("viewer").get(f"{PATH}/{made['id']}")
        assert found["pause"] == "held"
        assert "too few devices" in found["reason"]
        body = {"reason": "seen it myself"}
        approved = site.client("approver").post(f"{PATH}/{made['id']}/approve", body)
        assert (approved["state"], approved["stage"]) == ("running", 2)
    finally:
        site.stop()
