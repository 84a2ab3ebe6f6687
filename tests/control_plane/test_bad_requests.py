"""Whatever is asked for, in whatever bytes: a refusal that names the field, and never our own fault."""

import json
from collections.abc import Sequence

import pytest

from contract.errors import PitheadError
from contract.messages import Ack, DesiredHint
from control_plane.api import devices, events, groups, releases, telemetry, tokens
from control_plane.api.app import operators_app
from control_plane.services import desired
from control_plane.services.access import Access
from control_plane.services.devices import Devices
from control_plane.services.enrolment import Enrolment
from control_plane.services.telemetry import Telemetry
from control_plane.store.database import Database
from control_plane.workers.hints import HintPublisher
from provisioning import pki
from tests.control_plane.in_process import InProcess
from tests.control_plane.messages import DEVICE, NOW, add_device
from tests.services import utc_now


class NoAnchors:
    def first_roots(self) -> tuple[bytes, bytes]:
        return b"", b""


@pytest.fixture
def api(database: Database) -> InProcess:
    def clock() -> int:
        return NOW

    access, service, asked = Access(database, clock), Devices(database, clock), Telemetry(database)
    authority = pki.create_authority("test", utc_now())
    enrolment = Enrolment(
        database,
        clock,
        device_authority=authority,
        server_authority=authority,
        anchors=NoAnchors(),
        broker=("x", 1),
        certificate_days=30,
    )
    routers = [
        devices.router(service),
        groups.router(service),
        telemetry.router(asked),
        events.router(asked),
        tokens.router(access, enrolment),
        releases.router(None),  # type: ignore[arg-type]
    ]
    token = access.create(actor="test", name="test", roles=["admin"]).token
    return InProcess(operators_app("1", access, routers, max_body_bytes=10**6), token)


@pytest.mark.parametrize(
    ("method", "path", "body", "says"),
    [
        *[
            ("GET", f"/api/v1/{listing}?cursor={2**70}", None, "cursor")
            for listing in ("events", "anomalies", "receipts", "summaries", "dead-letters", "device-health")
        ],
        ("GET", "/api/v1/events?kind=%00", None, "query.kind"),
        ("GET", "/api/v1/devices?cursor=a%00", None, "query.cursor"),
        ("GET", "/api/v1/devices?label=a%3D%00", None, "query.label"),
        ("GET", "/api/v1/devices/%00", None, "path"),
        ("GET", "/api/v1/groups/a%00", None, "path"),
        ("DELETE", "/api/v1/tokens/%00", None, "path"),
        ("POST", "/api/v1/groups", {"name": "a", "selector": {}, "description": "\0"}, "body.description"),
        ("POST", "/api/v1/groups", {"name": "a", "selector": {"a\0": "b"}}, "body.selector"),
        (
            "POST",
            "/api/v1/groups",
            {"name": "a", "selector": {}, "description": "\ud800"},
            "body.description",
        ),
        ("POST", "/api/v1/tokens", {"name": "a\0", "roles": ["viewer"]}, "body.name"),
        ("POST", "/api/v1/tokens", {"name": "a", "roles": ["\0"]}, "body.roles"),
        ("POST", "/api/v1/join-tokens", {"description": "\0"}, "body.description"),
        (
            "POST",
            "/api/v1/releases",
            {"name": "a", "version": "1.0.0", "release_metadata": "\u00e9"},
            "release_metadata",
        ),
    ],
)
def test_a_wrong_value_is_named(api: InProcess, method: str, path: str, body: object, says: str) -> None:
    content = None if body is None else json.dumps(body).encode()
    answer = api.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["type"]) == (422, "request.invalid"), answer.text
    assert says in answer.json()["detail"]


@pytest.mark.parametrize(("kind", "says"), [(None, "is missing"), ("text/plain", "'text/plain'")])
def test_json_without_its_content_type_is_told(api: InProcess, kind: str | None, says: str) -> None:
    body = b'{"name": "a", "selector": {}}'
    headers = {} if kind is None else {"Content-Type": kind}
    answer = api.post("/api/v1/groups", content=body, headers=headers)
    assert answer.status_code == 422
    assert "Content-Type" in answer.json()["detail"]
    assert says in answer.json()["detail"]
    assert api.post("/api/v1/groups", content=body, headers={"Content-Type": "application/json"}).is_success


class Away:
    """A broker that is not there."""

    connected = False

    def hints(self, hints: Sequence[DesiredHint]) -> frozenset[str]:
        raise AssertionError(hints)

    def acks(self, acks: Sequence[Ack]) -> None:
        raise AssertionError(acks)


def test_no_hint_is_made_while_nobody_can_take_it(database: Database) -> None:
    def hint(device: str) -> DesiredHint:
        raise PitheadError("signing.unavailable", device)

    add_device(database, DEVICE)
    with database.transaction() as tx:
        desired.change(
            tx, DEVICE, lambda before: before.__class__(v=1, device=DEVICE, revision=0, agent_version="2")
        )
    assert HintPublisher(database, hint, Away()).tick() == 0
