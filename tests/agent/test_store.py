"""What the supervisor keeps on disk: whole or not at all, full disks, sudden death."""

import contextlib
import hashlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.slots import Installed, Serving, Slots
from agent.store import durable
from agent.store.objects import ObjectStore
from agent.store.outbox import Entry, Outbox
from agent.store.slots import SlotStore
from agent.store.state import StateStore
from contract import codec
from contract.errors import PitheadError
from contract.messages import (
    AckRange,
    Anomaly,
    AssignmentState,
    Envelope,
    Health,
    OutboxHealth,
    PriorityClass,
    Receipt,
)

RECEIPT = Receipt("pump", "1.0.0", AssignmentState.CONFIRMED)
HEALTH = Health(1.0, 1.0, 1.0, 1, 1, OutboxHealth(0, 0))
ANOMALY = Anomaly("pump", "1.0.0", 5, 2.0, 1.0)


def entries(priority: PriorityClass, n: int = 1) -> list[Entry]:
    body = {PriorityClass.RECEIPT: RECEIPT, PriorityClass.HEALTH: HEALTH, PriorityClass.ANOMALY: ANOMALY}
    return [Entry(priority, 10 + i, 20 + i, body[priority]) for i in range(n)]


@pytest.fixture
def open_outbox(tmp_path: Path) -> Callable[..., Outbox]:
    def opened(limit: int = 10_000_000) -> Outbox:
        return Outbox(tmp_path / "outbox.db", device="dev-test0001", boot_id="b", limit=limit)

    return opened


def sequence(outbox: Outbox, priority: PriorityClass) -> list[int]:
    batch = outbox.unsent(priority, 0, records=100_000, size=2**40)
    return [] if batch is None else [codec.decode(r, Envelope).seq for r in batch.records]


# --- files


def test_a_write_replaces_whole_files_and_keeps_the_mode(tmp_path: Path):
    path = tmp_path / "deep" / "down" / "file"
    durable.write(path, b"one")
    durable.write(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path):
    durable.write_directory(tmp_path / "id", {"a": (b"1", 0o600), "b": (b"2", 0o644)})
    assert {p.name: p.read_bytes() for p in (tmp_path / "id").iterdir()} == {"a": b"1", "b": b"2"}
    with pytest.raises(PitheadError) as caught:
        durable.write_directory(tmp_path / "id", {"a": (b"9", 0o600)})
    assert caught.value.code == "storage.failed"
    assert (tmp_path / "id" / "a").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["id"]


def test_leftovers_of_a_power_cut_are_swept(tmp_path: Path):
    (tmp_path / f"{durable.TEMPORARY}x").write_bytes(b"half")
    (tmp_path / f"{durable.TEMPORARY}dir").mkdir()
    (tmp_path / f"{durable.TEMPORARY}dir" / "y").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"whole")
    durable.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@contextlib.contextmanager
def no_room(limit: int = 0) -> Iterator[None]:
    """No file of this process may grow beyond ``limit`` bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_failed_write_keeps_the_old_content_and_says_storage_full(tmp_path: Path):
    path = tmp_path / "file"
    durable.write(path, b"old")
    with no_room(), pytest.raises(PitheadError) as caught:
        durable.write(path, b"new content")
    assert caught.value.code == "storage.full"
    assert caught.value.retryable
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- objects


def test_objects_lie_under_their_hash_and_damage_shows(tmp_path: Path):
    store = ObjectStore(tmp_path / "objects")
    sha256 = store.put(b"weights")
    assert sha256 == hashlib.sha256(b"weights").hexdigest()
    assert store.has(sha256, 7)
    assert not store.has(sha256, 8)
    assert store.read(sha256) == b"weights"
    assert store.verify(sha256)
    store.path(sha256).write_bytes(b"weightz")
    with pytest.raises(PitheadError) as caught:
        store.read(sha256)
    assert caught.value.code == "storage.corrupt"
    assert not store.has(sha256)


def test_collection_keeps_what_is_needed(tmp_path: Path):
    store = ObjectStore(tmp_path / "objects")
    kept, gone = store.put(b"kept"), store.put(b"gone")
    part_kept, part_gone = (store.directory / f"{name}.part" for name in (kept, gone))
    for path in (part_kept, part_gone, store.directory / "README"):
        path.write_bytes(b"x")
    assert store.collect({kept}) == 2
    assert {p.name for p in store.directory.iterdir()} == {kept, part_kept.name, "README"}


# --- slots and state


def test_slots_survive_and_a_broken_file_does_not_stop_the_others(tmp_path: Path):
    store = SlotStore(tmp_path)
    installed = Installed("1.0.0", "a" * 64, "int8", "cpu", {"m": "b" * 64})
    pump = Slots("pump", active=Serving(installed, activation=3))
    store.save(pump)
    store.save(Slots("fan", standby=installed))
    assert SlotStore(tmp_path).all() == store.all()
    (tmp_path / "fan.json").write_bytes(b"{")
    again = SlotStore(tmp_path)
    assert again.all() == {"pump": pump}
    again.save(Slots("fan", standby=installed))
    assert (tmp_path / "fan.json.damaged").read_bytes() == b"{"
    again.remove("pump")
    assert SlotStore(tmp_path).get("pump") == Slots("pump")


def test_state_is_all_or_nothing_and_forgets_what_it_cannot_read(tmp_path: Path):
    store = StateStore(tmp_path / "state.db")
    store.put({"a/1": 1, "a/2": 2, "b": "text"})
    store.put({"a/1": None})
    store.close()
    store = StateStore(tmp_path / "state.db")
    assert store.scan("a/", int) == {"2": 2}
    assert store.get("b", str) == "text"
    assert store.get("b", int) is None
    store.close()


def test_a_damaged_database_is_put_aside_and_a_new_one_begun(tmp_path: Path):
    path = tmp_path / "state.db"
    path.write_bytes(b"this is no database, not at all" * 100)
    store = StateStore(path)
    store.put({"a": 1})
    assert store.get("a", int) == 1
    store.close()
    assert len(list(tmp_path.glob("state.db.damaged-*"))) == 1


def test_of_damaged_databases_the_newest_is_kept(tmp_path: Path):
    for _ in range(3):
        (tmp_path / "state.db").write_bytes(b"this is no database, not at all" * 100)
        StateStore(tmp_path / "state.db").close()
    assert len(list(tmp_path.glob("state.db.damaged-*"))) == 1


def test_a_database_that_another_process_owns_is_not_gone_around(tmp_path: Path):
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(PitheadError, match="locked"):
            StateStore(tmp_path / "state.db")


# --- outbox


def test_sequences_count_by_class_and_go_on_after_a_restart(open_outbox: Callable[..., Outbox]):
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.HEALTH, 2) + entries(PriorityClass.RECEIPT))
    epoch = outbox.epoch
    assert outbox.acknowledge(AckRange(epoch, PriorityClass.HEALTH, 2)) == 2
    outbox.close()
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.HEALTH))
    assert outbox.epoch == epoch
    assert sequence(outbox, PriorityClass.HEALTH) == [3]
    assert sequence(outbox, PriorityClass.RECEIPT) == [1]
    outbox.close()


def test_a_lost_outbox_begins_a_new_epoch(open_outbox: Callable[..., Outbox], tmp_path: Path):
    outbox = open_outbox()
    epoch = outbox.epoch
    outbox.close()
    for path in tmp_path.glob("outbox.db*"):
        path.unlink()
    outbox = open_outbox()
    assert outbox.epoch != epoch
    outbox.append(entries(PriorityClass.HEALTH))
    assert outbox.acknowledge(AckRange(epoch, PriorityClass.HEALTH, 9)) == 0
    outbox.close()


def test_only_what_is_acknowledged_is_deleted(open_outbox: Callable[..., Outbox]):
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.ANOMALY, 10) + entries(PriorityClass.HEALTH, 3))
    assert (
        outbox.acknowledge(AckRange(outbox.epoch, PriorityClass.ANOMALY, 2, ((5, 6), (6, 8), (20, 30)))) == 6
    )
    assert sequence(outbox, PriorityClass.ANOMALY) == [3, 4, 9, 10]
    assert sequence(outbox, PriorityClass.HEALTH) == [1, 2, 3]
    assert outbox.waiting(PriorityClass.ANOMALY, 9) == (3, 3)
    assert outbox.health().records == 7
    outbox.close()


def test_batches_respect_both_limits(open_outbox: Callable[..., Outbox]):
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.HEALTH, 10))
    first = outbox.unsent(PriorityClass.HEALTH, 0, records=4, size=2**20)
    assert first is not None
    assert (len(first.records), first.last) == (4, 4)
    small = outbox.unsent(PriorityClass.HEALTH, 4, records=4, size=1)
    assert small is not None
    assert (len(small.records), small.last) == (1, 5)
    assert outbox.unsent(PriorityClass.HEALTH, 10, records=4, size=1) is None
    outbox.close()


def test_when_it_is_full_the_least_important_and_oldest_go_and_are_counted(
    open_outbox: Callable[..., Outbox],
):
    outbox = open_outbox(limit=20_000)
    outbox.append(entries(PriorityClass.HEALTH, 40))
    outbox.append(entries(PriorityClass.RECEIPT, 60))
    kept = sequence(outbox, PriorityClass.HEALTH)
    assert kept == list(range(41 - len(kept), 41))
    assert 0 < len(kept) < 40
    health = outbox.health()
    assert health.lost == {"health": 40 - len(kept)}
    assert health.bytes <= 20_000
    outbox.append(entries(PriorityClass.HEALTH, 100))
    assert sequence(outbox, PriorityClass.RECEIPT) == list(range(1, 61))
    assert outbox.health().bytes <= 20_000
    outbox.close()


def test_a_record_that_could_never_be_sent_is_counted_as_lost(open_outbox: Callable[..., Outbox]):
    outbox = open_outbox()
    huge = Anomaly("pump", "1.0.0", 5, 2.0, 1.0, contributions={f"{i:060}": 0.1 for i in range(4000)})
    outbox.append([Entry(PriorityClass.ANOMALY, 1, 1, huge), *entries(PriorityClass.ANOMALY)])
    assert outbox.health().lost == {"anomaly": 1}
    assert len(sequence(outbox, PriorityClass.ANOMALY)) == 1
    outbox.close()


def damage(outbox: Outbox) -> None:
    """Overwrite all of an open outbox's file but its first page, as a dying disk may."""
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    outbox._db.execute("PRAGMA shrink_memory")
    with outbox.path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(4096)
        file.write(os.urandom(size - 4096))


ACTS: list[Callable[[Outbox], object]] = [
    lambda o: o.unsent(PriorityClass.ANOMALY, 0, records=10, size=10**6),
    lambda o: o.waiting(PriorityClass.ANOMALY, 10**6),
    lambda o: o.marked("engine"),
    lambda o: o.health(),
    lambda o: o.append(entries(PriorityClass.HEALTH)),
    lambda o: o.acknowledge(AckRange(o.epoch, PriorityClass.ANOMALY, 5000)),
    lambda o: o.forget_marks("engine"),
]


@pytest.mark.parametrize("act", ACTS)
def test_an_outbox_that_is_damaged_while_it_is_used_begins_anew_and_says_what_it_lost(
    open_outbox: Callable[..., Outbox], act: Callable[[Outbox], object]
):
    outbox = open_outbox()
    for n in range(40):
        outbox.append(entries(PriorityClass.ANOMALY, 50), (f"engine-{n}" * 9, n))
    epoch = outbox.epoch
    damage(outbox)
    act(outbox)
    outbox.append(entries(PriorityClass.ANOMALY))
    for sound in ACTS[:4]:
        sound(outbox)
    assert outbox.epoch != epoch
    assert sequence(outbox, PriorityClass.ANOMALY) == [1]
    assert outbox.health().lost == {"anomaly": 2000}
    outbox.close()


def test_an_outbox_that_was_damaged_while_it_was_closed_counts_as_lost(
    open_outbox: Callable[..., Outbox], tmp_path: Path
):
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.ANOMALY, 500))
    outbox.close()
    with (tmp_path / "outbox.db").open("r+b") as file:
        file.write(os.urandom(4096))
    outbox = open_outbox()
    assert sum(outbox.health().lost.values()) >= 1
    outbox.close()


def test_what_never_came_is_counted_with_what_did(open_outbox: Callable[..., Outbox]):
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.ANOMALY), ("engine", 9), {PriorityClass.ANOMALY: 8})
    assert outbox.health().lost == {"anomaly": 8}
    outbox.close()


def test_marks_are_stored_with_their_records(open_outbox: Callable[..., Outbox]):
    outbox = open_outbox()
    outbox.append(entries(PriorityClass.ANOMALY), ("engine-1", 7))
    outbox.close()
    outbox = open_outbox()
    assert outbox.marked("engine-1") == 7
    outbox.forget_marks("engine-2")
    assert outbox.marked("engine-1") == 0
    outbox.close()


APPENDER = """
import sys
from agent.store.outbox import Entry, Outbox
from contract.messages import Anomaly, PriorityClass
outbox = Outbox(__import__("pathlib").Path(sys.argv[1]), device="dev-test0001", boot_id="b", limit=10**8)
n = 0
while True:
    body = Anomaly("pump", "1.0.0", n, 2.0, 1.0)
    outbox.append([Entry(PriorityClass.ANOMALY, n, 0, body)] * 7, ("engine", n + 7))
    n += 7
    print(n, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 5, 23])
def test_killed_in_the_middle_of_appending_nothing_stored_is_lost(
    open_outbox: Callable[..., Outbox], tmp_path: Path, lines: int
):
    with subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(tmp_path / "outbox.db")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        said = [int(child.stdout.readline()) for _ in range(lines)]
        child.kill()
        said += [int(line) for line in child.stdout if line.endswith("\n")]
    outbox = open_outbox()
    found = sequence(outbox, PriorityClass.ANOMALY)
    assert len(found) >= said[-1]
    assert len(found) % 7 == 0
    assert found == list(range(1, len(found) + 1))
    assert outbox.marked("engine") == len(found)
    outbox.append(entries(PriorityClass.ANOMALY))
    assert sequence(outbox, PriorityClass.ANOMALY)[-1] == len(found) + 1
    outbox.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"this machine cannot mount: {done.stderr.decode().strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_on_a_full_disk_appending_fails_clearly_and_nothing_is_lost(small_disk: Path):
    path = small_disk / "outbox.db"
    with contextlib.closing(Outbox(path, device="dev-test0001", boot_id="b", limit=10**8)) as outbox:
        code = None
        while code is None:
            stored = outbox.health().records
            assert stored < 20_000
            try:
                outbox.append(entries(PriorityClass.ANOMALY, 100))
            except PitheadError as error:
                code = error.code
        assert code == "storage.full"
        assert outbox.health().records == stored > 0
        with pytest.raises(PitheadError):
            durable.write(small_disk / "slot.json", bytes(600_000))
        assert len(sequence(outbox, PriorityClass.ANOMALY)) == stored
        assert outbox.acknowledge(AckRange(outbox.epoch, PriorityClass.ANOMALY, stored)) == stored
        outbox.append(entries(PriorityClass.ANOMALY, 100))
        assert sequence(outbox, PriorityClass.ANOMALY) == list(range(stored + 1, stored + 101))
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def fill(disk: Path) -> None:
    with (disk / "junk").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_on_a_full_disk_what_matters_more_takes_the_room_of_what_matters_less(small_disk: Path):
    with contextlib.closing(
        Outbox(small_disk / "outbox.db", device="dev-test0001", boot_id="b", limit=10**8)
    ) as outbox:
        outbox.append(entries(PriorityClass.HEALTH, 800))
        fill(small_disk)
        with contextlib.suppress(PitheadError):
            for _ in range(100):
                outbox.append(entries(PriorityClass.HEALTH, 10))
        held = outbox.health().records
        with pytest.raises(PitheadError, match=r"storage\.full"):
            outbox.append(entries(PriorityClass.HEALTH, 100))
        for n in range(1, 20):
            outbox.append(entries(PriorityClass.RECEIPT))
            assert sequence(outbox, PriorityClass.RECEIPT) == list(range(1, n + 1))
        lost = outbox.health().lost["health"]
        assert 0 < lost < held
        assert sequence(outbox, PriorityClass.HEALTH)[0] == lost + 1


def test_a_full_disk_keeps_neither_a_rollback_nor_the_next_start_from_happening(small_disk: Path):
    def started() -> tuple[StateStore, Outbox, SlotStore]:
        outbox = Outbox(small_disk / "outbox.db", device="dev-test0001", boot_id="b", limit=10**8)
        return StateStore(small_disk / "state.db"), outbox, SlotStore(small_disk / "slots")

    state, outbox, store = started()
    state.put({"etag": "e1"})
    outbox.append(entries(PriorityClass.ANOMALY, 10))
    pump = Slots("pump", trial_starts=1)
    store.save(pump)
    outbox.close()
    state.close()
    fill(small_disk)
    state, outbox, store = started()
    assert state.get("etag", str) == "e1"
    assert len(sequence(outbox, PriorityClass.ANOMALY)) == 10
    assert store.get("pump") == pump
    store.save(Slots("pump", trial_starts=2))
    assert SlotStore(small_disk / "slots").get("pump").trial_starts == 2
    outbox.close()
    state.close()


def test_without_a_disk_that_can_be_written_the_databases_live_in_memory(small_disk: Path):
    store = SlotStore(small_disk / "slots")
    store.save(Slots("pump", trial_starts=1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    state = StateStore(small_disk / "state.db")
    outbox = Outbox(small_disk / "outbox.db", device="dev-test0001", boot_id="b", limit=10**8)
    state.put({"etag": "e1"})
    outbox.append(entries(PriorityClass.ANOMALY))
    assert (state.get("etag", str), len(sequence(outbox, PriorityClass.ANOMALY))) == ("e1", 1)
    assert SlotStore(small_disk / "slots").get("pump").trial_starts == 1
    outbox.close()
    state.close()
