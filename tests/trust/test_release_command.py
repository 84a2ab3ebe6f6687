"""`pithead release` against the real API: sign here, upload, publish; keys stay where they are."""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner

from contract.errors import PitheadError
from control_plane.api import releases
from control_plane.api.app import operators_app
from control_plane.cli.client import Client
from control_plane.cli.release import publish, release_app
from control_plane.services.access import Access
from provisioning.keys import Keys
from tests.trust.conftest import Plant


class Api:
    """The API's address and a token for each role."""

    def __init__(self, url: str, access: Access) -> None:
        self.url = url
        self.tokens = {
            role: access.create(name=role, roles=[role], actor="test").token
            for role in ("releaser", "viewer")
        }

    def client(self, role: str = "releaser") -> Client:
        return Client(self.url, self.tokens[role])


@pytest.fixture
def api(plant: Plant) -> Iterator[Api]:
    access = Access(plant.database, plant.clock)
    app = operators_app("0", access, [releases.router(plant.releases)], max_body_bytes=1_000_000)
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Api(f"http://127.0.0.1:{listening.getsockname()[1]}", access)
        finally:
            server.should_exit = True
            thread.join(10)
    assert not thread.is_alive()


def test_release_metadata_may_be_larger_than_other_bodies(api: Api) -> None:
    """They name every file that was ever released."""
    with api.client() as client:
        for length, code in ((2_000_000, "request.invalid"), (9_000_000, "request.too_large")):
            with pytest.raises(PitheadError) as caught:
                client.post(
                    "/api/v1/releases", {"name": "a", "version": "1.0.0", "release_metadata": "e" * length}
                )
            assert caught.value.code == code


def test_the_command(plant: Plant, api: Api, keys: Keys, tmp_path: Path) -> None:
    package = plant.package()
    key = tmp_path / "release-1.pem"
    key.write_bytes(keys["release-1"].private_bytes)
    arguments = [str(package.directory), "--key", str(key), "--min-release-counter", "1"]
    environment = {"PITHEAD_SERVER": api.url, "PITHEAD_TOKEN": api.tokens["releaser"]}
    done = CliRunner().invoke(release_app, arguments, env=environment)
    assert done.exit_code == 0, done.output
    assert "released pump 1.0.0" in done.output
    with api.client("viewer") as client:
        shown = client.get("/api/v1/models/pump/versions/1.0.0")
        assert shown["manifest"]["name"] == "pump"
        assert shown["released_by"] == "releaser"
        [model] = client.get("/api/v1/models")
        assert (model["name"], model["min_release_counter"]) == ("pump", 1)
        assert client.get("/api/v1/models/pump")["versions"][0]["version"] == "1.0.0"
    device = plant.device()
    plant.want(device.id, ("pump", "1.0.0"))
    assert device.refresh(plant.bundle(device.id)).files


def test_a_key_that_is_no_release_key(plant: Plant, api: Api, keys: Keys) -> None:
    package = plant.package()
    with api.client() as client, pytest.raises(PitheadError) as caught:
        publish(client, package, [keys["image-targets-1"]], root=plant.releases.current().roots[0])
    assert caught.value.code == "release.signature_invalid"
    assert plant.releases.models() == []


def test_a_viewer_may_not(plant: Plant, api: Api, keys: Keys) -> None:
    with api.client("viewer") as client, pytest.raises(PitheadError) as caught:
        publish(client, plant.package(), [keys["release-1"]])
    assert caught.value.code == "auth.forbidden"
    with api.client("viewer") as client, pytest.raises(PitheadError) as caught:
        client.post("/api/v1/releases", {"name": "pump", "version": "1.0.0", "release_metadata": ""})
    assert caught.value.code == "auth.forbidden"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"name": "pump", "version": "1.0.0", "release_metadata": "not base64!"}, "request.invalid"),
        ({"name": "../pump", "version": "1.0.0", "release_metadata": ""}, "request.invalid"),
        ({"name": "pump", "version": "1", "release_metadata": ""}, "request.invalid"),
        ({"name": "pump"}, "request.invalid"),
    ],
)
def test_bad_requests(api: Api, body: dict[str, str], code: str) -> None:
    with api.client() as client, pytest.raises(PitheadError) as caught:
        client.post("/api/v1/releases", body)
    assert caught.value.code == code


def test_nothing_released_is_not_found(api: Api) -> None:
    with api.client() as client:
        for path in ("/api/v1/models/pump", "/api/v1/models/pump/versions/1.0.0"):
            with pytest.raises(PitheadError) as caught:
                client.get(path)
            assert caught.value.code == "request.not_found"


def test_an_upload_that_breaks_off_leaves_nothing(plant: Plant, api: Api) -> None:
    content = b"x" * 500_000
    sha256 = hashlib.sha256(content).hexdigest()

    def broken() -> Iterator[bytes]:
        yield content[:100_000]
        raise RuntimeError("the network is gone")

    headers = {"Authorization": f"Bearer {api.tokens['releaser']}"}
    with pytest.raises(RuntimeError):
        httpx.put(f"{api.url}/api/v1/staging/{sha256}", content=broken(), headers=headers)
    deadline = time.monotonic() + 10
    while list(plant.staging.directory.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    answer = httpx.put(f"{api.url}/api/v1/staging/{sha256}", content=content, headers=headers)
    assert answer.json() == {"sha256": sha256, "length": len(content)}


def test_an_upload_beyond_the_quota(plant: Plant, api: Api) -> None:
    plant.staging.quota_bytes = 1000
    with api.client() as client, pytest.raises(PitheadError) as caught:
        client.put(f"/api/v1/staging/{'0' * 64}", content=b"x" * 2000)
    assert caught.value.code == "request.too_large"
