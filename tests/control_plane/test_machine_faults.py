"""A full disk and a database that is away: said as what they are, and reading goes on."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter
from sqlalchemy import event

from control_plane.api import devices, groups
from control_plane.api.app import operators_app
from control_plane.services.access import Access
from control_plane.services.devices import Devices
from control_plane.store.database import Database
from tests.control_plane.in_process import InProcess
from tests.control_plane.messages import NOW
from tests.services import Postgres

GROUP = {"name": "north", "selector": {}, "description": "x" * 400}


def client_of(database: Database, *more: APIRouter) -> InProcess:
    access = Access(database, lambda: NOW)
    service = Devices(database, lambda: NOW)
    app = operators_app(
        "1", access, [devices.router(service), groups.router(service), *more], max_body_bytes=10**6
    )
    token = access.create(actor="test", name="test", roles=["admin"]).token
    return InProcess(app, token)


def sqlite(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/test.db")
    database.migrate()
    return database


def spoil(database: Database, pragma: str) -> None:
    """Let every connection from now on have this setting."""
    database.engine.dispose()

    def prepare(connection: sqlite3.Connection, _entry: Any) -> None:
        connection.execute(f"PRAGMA {pragma}")

    event.listen(database.engine, "connect", prepare)


def test_a_full_disk_of_the_database(tmp_path: Path) -> None:
    database = sqlite(tmp_path)
    client = client_of(database)
    spoil(database, "max_page_count=1")
    answers = [
        client.post("/api/v1/groups", json={**GROUP, "name": f"north-{number}"}) for number in range(50)
    ]
    assert answers[-1].status_code == 507, answers[-1].text
    assert answers[-1].json()["type"] == "server.disk_full"
    assert answers[-1].json()["retryable"]
    assert client.get("/api/v1/devices").status_code == 200
    database.close()


def test_who_may_read_can_read_while_nothing_can_be_written(tmp_path: Path) -> None:
    database = sqlite(tmp_path)
    client = client_of(database)
    spoil(database, "query_only=ON")
    assert client.get("/api/v1/devices").status_code == 200
    refused = client.post("/api/v1/groups", json=GROUP)
    assert (refused.status_code, refused.json()["type"]) == (503, "server.unavailable")
    assert refused.headers["Retry-After"]
    database.close()


def test_a_database_that_is_away(postgres: Postgres) -> None:
    database = Database(postgres.new_database())
    database.migrate()
    client = client_of(database)
    postgres.stop()
    try:
        for answer in (client.get("/api/v1/devices"), client.post("/api/v1/groups", json=GROUP)):
            assert (answer.status_code, answer.json()["type"]) == (503, "server.unavailable")
            assert answer.headers["Retry-After"]
            assert "report" not in answer.json()["remedy"]
    finally:
        postgres.run_server()
    assert client.get("/api/v1/devices").status_code == 200
    database.close()


@pytest.mark.parametrize(("path", "status"), [("/dev/full", 507), ("/no/such/file", 500)])
def test_a_full_disk_of_files(tmp_path: Path, path: str, status: int) -> None:
    routes = APIRouter()

    @routes.put("/write")
    def write() -> None:
        with Path(path).open("wb", buffering=0) as file:
            file.write(b"x")

    database = sqlite(tmp_path)
    assert client_of(database, routes).put("/write").status_code == status
    database.close()
