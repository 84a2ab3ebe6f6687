"""The operators' API of a running control plane."""

import http.client
import json
from typing import Any

import pytest

from contract.errors import ERRORS, PitheadError
from control_plane.cli.client import Client
from control_plane.services.access import ROLES
from simulator.plant import Plant

pytestmark = pytest.mark.xdist_group("plant")

OPEN = {("GET", "/api/v1/health")}
ASKING = {("POST", "/api/v1/rollouts/plan")}
"""Questions with a body: they change nothing."""
WRITES = {"POST", "PUT", "PATCH", "DELETE"}


def call(
    plant: Plant, method: str, path: str, token: str | None = None, body: bytes | None = None
) -> tuple[int, dict[str, Any], str]:
    """Return status, body and content type of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", plant.ports.api, timeout=30)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(method, path, body=body, headers=headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    found = json.loads(text) if text else {}
    return answer.status, found if isinstance(found, dict) else {}, answer.getheader("Content-Type", "")


def routes(plant: Plant) -> list[tuple[str, str]]:
    """Return every route that the OpenAPI document names, with its parameters filled in."""
    _status, document, _kind = call(plant, "GET", "/api/v1/openapi.json")
    found = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            filled = path
            for parameter in operation.get("parameters", ()):
                if parameter["in"] == "path":
                    filled = filled.replace("{" + parameter["name"] + "}", "0" * 64)
            found.append((method.upper(), filled))
    return found


def token_of(plant: Plant, *roles: str, ttl_s: float | None = None) -> dict[str, Any]:
    made: dict[str, Any] = plant.api.post(
        "/api/v1/tokens", {"name": "-".join(roles), "roles": list(roles), "ttl_s": ttl_s}
    )
    return made


def assert_problem(answer: tuple[int, dict[str, Any], str], status: int, code: str) -> None:
    assert answer[0] == status, answer
    assert answer[2] == "application/problem+json"
    body = answer[1]
    assert body["type"] == code
    assert body["status"] == status
    assert body["title"] == ERRORS[code].summary
    assert body["detail"]
    assert body["remedy"]


def test_every_route_needs_a_token(plant: Plant) -> None:
    found = routes(plant)
    assert len(found) > 30
    for method, path in found:
        answer = call(plant, method, path)
        if (method, path) in OPEN:
            assert answer[0] == 200
        else:
            assert_problem(answer, 401, "auth.missing")
            assert_problem(call(plant, method, path, "pt1.wrong"), 401, "auth.invalid")


def test_a_viewer_changes_nothing(plant: Plant) -> None:
    viewer = token_of(plant, "viewer")["token"]
    for method, path in routes(plant):
        answer = call(plant, method, path, viewer)
        if method in WRITES and (method, path) not in ASKING:
            assert_problem(answer, 403, "auth.forbidden")
        elif not path.startswith(("/api/v1/tokens", "/api/v1/join-tokens")):
            assert answer[0] in {200, 404, 422}, (path, answer)
        else:
            assert_problem(answer, 403, "auth.forbidden")


@pytest.mark.parametrize(
    ("role", "method", "path", "allowed"),
    [
        ("operator", "POST", "/api/v1/join-tokens", True),
        ("operator", "POST", "/api/v1/tokens", False),
        ("operator", "PUT", "/api/v1/staging/" + "0" * 64, False),
        ("releaser", "PUT", "/api/v1/staging/" + "0" * 64, True),
        ("releaser", "POST", "/api/v1/join-tokens", False),
        ("approver", "POST", "/api/v1/groups", False),
        ("admin", "GET", "/api/v1/tokens", True),
    ],
)
def test_roles(plant: Plant, role: str, method: str, path: str, *, allowed: bool) -> None:
    answer = call(plant, method, path, token_of(plant, role)["token"])
    assert (answer[0] != 403) is allowed, answer


def test_a_revoked_and_an_expired_token(plant: Plant) -> None:
    made = token_of(plant, "viewer")
    assert call(plant, "GET", "/api/v1/devices", made["token"])[0] == 200
    plant.api.delete(f"/api/v1/tokens/{made['id']}")
    assert_problem(call(plant, "GET", "/api/v1/devices", made["token"]), 401, "auth.invalid")
    short = token_of(plant, "viewer", ttl_s=0.001)
    assert_problem(call(plant, "GET", "/api/v1/devices", short["token"]), 401, "auth.invalid")


def test_no_secret_is_shown_twice(plant: Plant) -> None:
    made = token_of(plant, "viewer")
    join = plant.api.post("/api/v1/join-tokens", {"labels": {"site": "north"}})
    shown = json.dumps(plant.api.get("/api/v1/tokens")) + json.dumps(plant.api.get("/api/v1/join-tokens"))
    assert made["token"] not in shown
    assert join["token"].split(".")[1] not in shown


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "says"),
    [
        ("POST", "/api/v1/join-tokens", b"{", 422, "request.invalid", "body"),
        ("POST", "/api/v1/join-tokens", b'{"max_uses": 0}', 422, "request.invalid", "body.max_uses"),
        ("POST", "/api/v1/join-tokens", b'{"typo": 1}', 422, "request.invalid", "body.typo"),
        ("POST", "/api/v1/tokens", b'{"name": "x", "roles": ["king"]}', 422, "request.invalid", "king"),
        ("POST", "/api/v1/groups", b'{"name": "A B", "selector": {}}', 422, "request.invalid", "name"),
        ("GET", "/api/v1/devices?label=nonsense", None, 422, "request.invalid", "nonsense"),
        ("GET", "/api/v1/devices?limit=0", None, 422, "request.invalid", "limit"),
        ("GET", "/api/v1/anomalies?since=x", None, 422, "request.invalid", "since"),
        ("GET", "/api/v1/devices/device-nobody", None, 404, "request.not_found", "device-nobody"),
        ("GET", "/api/v1/nothing", None, 404, "request.not_found", "Not Found"),
        ("DELETE", "/api/v1/health", None, 405, "request.invalid", "Method Not Allowed"),
        ("POST", "/api/v1/groups", b"x" * 2_000_000, 413, "request.too_large", "1048576"),
    ],
)
def test_every_refusal_is_a_problem_document(
    plant: Plant, method: str, path: str, body: bytes | None, status: int, code: str, says: str
) -> None:
    answer = call(plant, method, path, plant.token, body)
    assert_problem(answer, status, code)
    assert says in answer[1]["detail"]


def test_groups_and_events(plant: Plant) -> None:
    plant.api.post("/api/v1/groups", {"name": "north", "selector": {"site": "north"}})
    with pytest.raises(PitheadError, match=r"request\.conflict"):
        plant.api.post("/api/v1/groups", {"name": "north", "selector": {}})
    plant.api.put("/api/v1/groups/north", {"selector": {"site": "north", "line": "1"}})
    assert plant.api.get("/api/v1/groups/north")["selector"] == {"site": "north", "line": "1"}
    plant.api.delete("/api/v1/groups/north")
    kinds = [event["kind"] for event in plant.pages("/api/v1/events", {"subject": "north"})]
    assert kinds == ["group.deleted", "group.changed", "group.created"]


def test_pages_meet(plant: Plant) -> None:
    for _ in range(5):
        plant.api.post("/api/v1/join-tokens", {})
    whole = plant.pages("/api/v1/events")
    cursor, parts = None, []
    while True:
        answer = plant.api.get("/api/v1/events", {"limit": 3, "cursor": cursor})
        parts += answer["items"]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    assert parts == list(whole)


def test_health_names_its_parts(plant: Plant) -> None:
    answer = plant.api.get("/api/v1/health")
    assert answer["status"] == "ok"
    parts = ("database", "broker", "revocations", "signer")
    assert answer["parts"] == dict.fromkeys(parts, True)


def test_every_route_is_explained(plant: Plant) -> None:
    _status, document, _kind = call(plant, "GET", "/api/v1/openapi.json")
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation.get("summary"), (method, path)
            assert operation.get("tags"), (method, path)


def test_a_server_that_is_not_there() -> None:
    with Client("http://127.0.0.1:9", "x") as client, pytest.raises(PitheadError, match="cannot reach"):
        client.get("/api/v1/health")


def test_roles_grow_and_never_skip() -> None:
    for actions in ROLES.values():
        assert ROLES["viewer"] <= actions <= ROLES["admin"]
