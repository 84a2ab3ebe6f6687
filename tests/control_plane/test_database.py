"""One writer at a time, on both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlmodel import SQLModel, col, func, select

from control_plane.store import events, ids
from control_plane.store.database import Database
from control_plane.store.tables.event import Event


def add(database: Database, subject: str) -> None:
    with database.transaction() as tx:
        events.append(tx, t=1, actor="test", kind="test", subject=subject, facts={})


def count(database: Database) -> int:
    with database.reading() as tx:
        return tx.exec(select(func.count(col(Event.id)))).one()


def test_the_schema_is_what_the_tables_say(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), SQLModel.metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    add(database, "kept")
    database.migrate()
    assert count(database) == 1


def test_an_error_undoes_everything(database: Database) -> None:
    def fail() -> None:
        with database.transaction() as tx:
            events.append(tx, t=1, actor="test", kind="test", subject="lost", facts={})
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert count(database) == 0
    add(database, "next")
    assert count(database) == 1


def test_reading_then_writing_meets_nobody_in_between(database: Database) -> None:
    """Each thread counts, and writes what it counted: no two may count the same."""

    def work(_number: int) -> None:
        with database.transaction() as tx:
            seen = tx.exec(select(func.count(col(Event.id)))).one()
            events.append(tx, t=seen, actor="test", kind="test", subject="", facts={})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    with database.reading() as tx:
        assert sorted(tx.exec(select(Event.t))) == list(range(40))


def test_ids_become_visible_in_their_order(database: Database) -> None:
    """A reader with a cursor misses nothing while others write."""
    stop = threading.Event()
    seen: list[int] = []

    def follow() -> None:
        cursor = 0
        while True:
            last = stop.is_set()
            with database.reading() as tx:
                rows = list(tx.exec(select(Event.id).where(col(Event.id) > cursor).order_by(col(Event.id))))
            seen.extend(row for row in rows if row is not None)
            cursor = seen[-1] if seen else 0
            if last:
                return

    reader = threading.Thread(target=follow)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add(database, str(number)), range(60)))
    stop.set()
    reader.join()
    assert len(seen) == len(set(seen)) == 60


def test_a_reader_cannot_write_on_postgresql_and_sees_one_state(database: Database) -> None:
    add(database, "one")
    with database.reading() as tx:
        assert tx.exec(select(func.count(col(Event.id)))).one() == 1
        add(database, "two")
        assert tx.exec(select(func.count(col(Event.id)))).one() == 1
    assert count(database) == 2


def test_a_use_case_has_one_transaction(database: Database) -> None:
    with database.transaction(), pytest.raises(RuntimeError, match="one transaction"), database.transaction():
        pass


def test_two_processes_share_a_database(database: Database) -> None:
    other = Database(database.url.render_as_string(hide_password=False))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: add((database, other)[number % 2], str(number)), range(40)))
    assert count(other) == 40
    other.close()


def test_ids_are_version_7_and_rise() -> None:
    made = [ids.new_id() for _ in range(50)]
    assert len(set(made)) == 50
    assert {(text[14], text[19] in "89ab") for text in made} == {("7", True)}
    assert [text[:13] for text in made] == sorted(text[:13] for text in made)


def test_the_file_of_sqlite_survives_a_reopen(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    first = Database(url)
    first.migrate()
    add(first, "kept")
    first.close()
    second = Database(url)
    second.migrate()
    assert count(second) == 1
    second.close()
