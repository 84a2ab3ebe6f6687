"""The same on PostgreSQL: other locks, other types, other ids."""

from collections.abc import Iterator
from typing import Any

import pytest

from control_plane.store.database import Database
from tests.services import Postgres, running_postgres


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        if server is None:
            pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
        yield server


@pytest.fixture
def database(postgres: Postgres) -> Iterator[Database]:
    found = Database(postgres.new_database())
    found.migrate()
    yield found
    found.close()


def test_a_good_and_a_bad_release(fleet: Any):
    fleet.release("2.0.0")
    good = fleet.create("2.0.0")
    assert fleet.run_until(good, {"succeeded", "rolled_back", "paused"}, 200) == "succeeded"
    fleet.run(12)
    assert fleet.versions() == {"2.0.0": 20}
    fleet.release("3.0.0", alarm_rate=0.2)
    bad = fleet.create("3.0.0")
    assert fleet.run_until(bad, {"succeeded", "rolled_back", "paused"}, 200) == "rolled_back"
    assert fleet.versions() == {"2.0.0": 20}
    halt = fleet.rollouts.verdicts(bad)[-1]
    assert fleet.rollouts.replay(bad, halt.id).reason == halt.reason
