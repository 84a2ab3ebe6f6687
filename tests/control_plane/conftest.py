"""Databases of both kinds, and a site of our own."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlmodel import SQLModel

from control_plane.store.database import Database
from simulator.plant import Plant
from tests.services import BrokerSite, Postgres, make_broker_site, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server."""
    with running_postgres() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
        yield server


@pytest.fixture(scope="session")
def migrated_postgres(postgres: Postgres) -> str:
    """The address of a database of the newest schema, to be emptied for every test."""
    url = postgres.new_database()
    _migrate(url)
    return url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database of the newest schema, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    _migrate(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with the newest schema, once of each kind."""
    if request.param == "sqlite":
        path = tmp_path / "test.db"
        shutil.copy(request.getfixturevalue("migrated_file"), path)
        url = f"sqlite:///{path}"
    else:
        url = request.getfixturevalue("migrated_postgres")
    database = Database(url)
    if not database.is_sqlite:
        names = ", ".join(f'"{table.name}"' for table in SQLModel.metadata.sorted_tables)
        with database.transaction() as tx:
            tx.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    yield database
    database.close()


def _migrate(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.close()


@pytest.fixture
def broker_site(tmp_path: Path) -> Iterator[BrokerSite]:
    """A site whose broker does not run yet."""
    site = make_broker_site(tmp_path / "site")
    yield site
    site.stop()


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """A whole control plane as its commands make it: keys, broker, `pithead serve`."""
    plant = Plant(tmp_path_factory.mktemp("plant"))
    try:
        plant.prepare()
        plant.start()
        yield plant
    finally:
        plant.stop()
