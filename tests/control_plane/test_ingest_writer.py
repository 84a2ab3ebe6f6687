"""Every record once, whatever is repeated, reordered or broken."""

import msgspec
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlmodel import Session, select

from contract import codec, topics
from contract.codec import JSON_ZSTD, MAX_DECODED, MAX_PAYLOAD
from contract.messages import Ailing, Bypass, PriorityClass, Reported, Status
from control_plane.ingest.decode import MAX_EPOCHS, MAX_RECORDS, Decoded, Inbound, decode
from control_plane.ingest.watermark import MAX_RANGES
from control_plane.ingest.writer import LETTERS, Writer, Written
from control_plane.services.devices import Devices
from control_plane.store import devices, telemetry
from control_plane.store import ingest as store
from control_plane.store.database import Database
from control_plane.store.ids import new_id
from control_plane.store.tables.telemetry import Watermark
from control_plane.store.telemetry import Window
from control_plane.workers.retention import DEAD_LETTERS_US, Retention
from tests.control_plane.messages import (
    DEVICE,
    NOW,
    OTHER,
    add_device,
    anomaly,
    envelope,
    health,
    message,
    plain,
    raw,
    receipt,
    summary,
)

ALL = Window(limit=1000)


@pytest.fixture
def writer(database: Database) -> Writer:
    add_device(database, DEVICE)
    add_device(database, OTHER)
    return Writer(database, lambda: NOW)


def scores(database: Database) -> list[float]:
    with database.reading() as tx:
        return sorted(row.score for row in telemetry.anomalies(tx, ALL))


def dead(database: Database) -> list[telemetry.DeadLetterRecord]:
    with database.reading() as tx:
        return telemetry.dead_letters(tx, ALL)


def acked(
    written: Written, device: str = DEVICE
) -> dict[tuple[str, str], tuple[int, tuple[tuple[int, int], ...]]]:
    return {
        (one.epoch, one.priority.value): (one.prefix, one.ranges)
        for ack in written.acks
        if ack.device == device
        for one in ack.acks
    }


def test_every_kind_is_stored(database: Database, writer: Writer) -> None:
    written = writer.write(
        [
            message([envelope(receipt(facts={"a": 1}, code="probe.timeout"), 1)]),
            message([envelope(anomaly(), 1)]),
            message([envelope(health(), 1)]),
            message([envelope(summary(), 1)]),
            message([envelope(Reported(revision=3, hardware="rpi5"), 2)]),
        ]
    )
    assert (written.records, written.refused) == (5, 0)
    with database.reading() as tx:
        assert telemetry.receipts(tx, ALL)[0].facts == {"a": 1}
        assert telemetry.anomalies(tx, ALL)[0].contributions == {"f1": 1.0}
        assert telemetry.health(tx, ALL)[0].body["cpu_percent"] == 2.0
        stored = telemetry.summaries(tx, ALL)[0]
        assert stored.latency_p95_us == pytest.approx(95, rel=0.02)
        assert stored.muted == 7
        device = devices.device(tx, DEVICE)
    assert device.reported is not None
    assert (device.reported.revision, device.hardware) == (3, "rpi5")
    assert device.health is not None
    assert (device.last_seen, device.clock_skew_us) == (NOW, 1000)
    assert acked(written)["e1", "receipt"] == (2, ())


def test_the_newest_summary_of_each_model_and_source_is_found(database: Database, writer: Writer) -> None:
    many = [
        summary(),
        summary(),
        msgspec.structs.replace(summary(), bucket_start=NOW + 60_000_000, muted=1),
        msgspec.structs.replace(summary(source="serve"), bucket_start=NOW - 60_000_000, muted=0),
    ]
    writer.write([message([envelope(each, seq) for seq, each in enumerate(many, 1)])])
    with database.reading() as tx:
        newest = telemetry.newest_summaries(tx, DEVICE)
    assert [(s.source, s.bucket_start - NOW, s.muted) for s in newest] == [
        ("lane", 60_000_000, 1),
        ("serve", -60_000_000, 0),
    ]


def test_devices_are_found_by_their_trouble(database: Database, writer: Writer) -> None:
    def found(*, troubled: bool) -> list[str]:
        with database.reading() as tx:
            return [d.id for d in devices.devices(tx, troubled=troubled)]

    why = '"ailing":[ "bypass":{'
    sick = Ailing("press", "lane", "failed", code="source.failed", detail="no route")
    for seq, body, troubled in (
        (1, health(), False),
        (2, health(bypass=Bypass(NOW, why=why)), True),
        (3, health(ailing=(msgspec.structs.replace(sick, detail=why),)), True),
        (4, health(), False),
    ):
        writer.write([message([envelope(body, seq)])])
        assert (DEVICE in found(troubled=True), DEVICE in found(troubled=False)) == (troubled, not troubled)
    assert OTHER in found(troubled=False), "of which nothing is known"


def test_repetitions_count_once(database: Database, writer: Writer) -> None:
    batch = message([envelope(anomaly(n), n) for n in (1, 2, 2, 3)])
    first = writer.write([batch, batch])
    second = writer.write([batch])
    assert (first.records, second.records) == (3, 0)
    assert acked(first) == acked(second) == {("e1", "anomaly"): (3, ())}
    assert scores(database) == [1.0, 2.0, 3.0]


def test_numbers_count_per_device_epoch_and_class(database: Database, writer: Writer) -> None:
    writer.write(
        [
            message([envelope(anomaly(1), 1)]),
            message([envelope(anomaly(2), 1, epoch="e2")]),
            message([envelope(anomaly(3), 1, device=OTHER)], device=OTHER),
            message([envelope(anomaly(4), 1, priority=PriorityClass.RAW)]),
        ]
    )
    assert scores(database) == [1.0, 2.0, 3.0, 4.0]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=6))
def test_any_order_and_any_repetition(
    database: Database, writer: Writer, deliveries: list[list[int]]
) -> None:
    epoch = new_id()
    before = len(scores(database))
    for delivery in deliveries:
        written = writer.write([message([envelope(anomaly(n), n, epoch=epoch) for n in delivery])])
    sent = {n for delivery in deliveries for n in delivery}
    assert len(scores(database)) - before == len(sent)
    prefix, ranges = acked(written)[epoch, "anomaly"]
    covered = {n for first, last in [(1, prefix), *ranges] for n in range(first, last + 1)}
    assert covered == sent


def test_one_bad_record_spoils_no_other(database: Database, writer: Writer) -> None:
    records = [plain(envelope(anomaly(n), n)) for n in (1, 2, 3)]
    records[1]["body"]["score"] = "high"
    written = writer.write([raw(msgspec.json.encode(records))])
    assert (written.records, written.refused) == (2, 1)
    assert scores(database) == [1.0, 3.0]
    assert acked(written) == {("e1", "anomaly"): (3, ())}
    (letter,) = dead(database)
    assert (letter.code, letter.device_id) == ("message.malformed", DEVICE)
    assert "score" in letter.detail


def test_poison_that_comes_again_is_one_letter(database: Database, writer: Writer) -> None:
    for _ in range(3):
        writer.write([raw(b"{nonsense")])
    (letter,) = dead(database)
    assert (letter.count, letter.payload) == (3, "{nonsense")


def compressed(size: int) -> bytes:
    return zstandard.ZstdCompressor(level=19).compress(b" " * size)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (raw(b""), "message.malformed"),
        (raw(b"\xff\xfe"), "message.malformed"),
        (raw(b'[{"v": 1}]'), "message.malformed"),
        (raw(b"[" * 100_000), "message.malformed"),
        (raw(b"[]", content_type="text/html"), "message.malformed"),
        (raw(b"not zstd", content_type=JSON_ZSTD), "message.malformed"),
        (raw(b"x" * (MAX_PAYLOAD + 1)), "message.too_large"),
        (raw(compressed(MAX_DECODED + 1), content_type=JSON_ZSTD), "message.too_large"),
        (message([envelope(anomaly(), 1, device=OTHER)]), "message.wrong_device"),
        (message([envelope(anomaly(), 1)], priority=PriorityClass.RECEIPT), "message.malformed"),
        (message([envelope(anomaly(), 1, v=9)]), "message.unsupported_version"),
        (Inbound(f"pithead/v1/{DEVICE}/up/nonsense", b"[]", None, NOW), "message.malformed"),
        (Inbound("pithead/v1/BAD/up/anomaly", b"[]", None, NOW), "message.malformed"),
        (Inbound(topics.status(DEVICE), b"{}", None, NOW), "message.malformed"),
    ],
)
def test_what_is_refused_is_kept_with_its_reason(
    database: Database, writer: Writer, bad: Inbound, code: str
) -> None:
    written = writer.write([bad, message([envelope(anomaly(), 7)])])
    assert (written.records, written.refused) == (1, 1)
    (letter,) = dead(database)
    assert letter.code == code
    assert letter.detail


def test_a_newer_protocol_is_not_acknowledged(writer: Writer) -> None:
    """The device keeps what this side may understand after its own upgrade."""
    assert acked(writer.write([message([envelope(anomaly(), 1, v=9)])])) == {}


def test_a_forged_sender_cannot_acknowledge_for_another(writer: Writer) -> None:
    written = writer.write([message([envelope(anomaly(), 1, device=OTHER)])])
    assert acked(written, OTHER) == {}


def test_a_device_that_never_enrolled_is_not_acknowledged(database: Database, writer: Writer) -> None:
    stranger = "device-stranger"
    written = writer.write([message([envelope(anomaly(), 1, device=stranger)], device=stranger)])
    assert (written.records, written.refused, written.acks) == (0, 1, ())
    assert dead(database)[0].code == "message.wrong_device"


def test_a_revoked_device_is_heard_no_more(database: Database, writer: Writer) -> None:
    Devices(database, lambda: NOW).revoke(actor="test", device_id=DEVICE)
    written = writer.write([message([envelope(anomaly(), 1)])])
    assert (written.records, written.refused, written.acks) == (0, 1, ())


def test_a_text_that_no_database_takes(database: Database, writer: Writer) -> None:
    """PostgreSQL keeps no NUL. Its neighbours are stored, and the device does not send it for ever."""
    batch = [envelope(anomaly(n, source="a\0b" if n == 2 else "ok"), n) for n in (1, 2, 3)]
    written = writer.write([message(batch), message([envelope(anomaly(9), 1, epoch="other")])])
    assert acked(written)["e1", "anomaly"] == (3, ())
    assert scores(database) == [1.0, 3.0, 9.0]
    (letter,) = dead(database)
    assert letter.code == "message.malformed"
    assert "$.body.source" in letter.detail


@pytest.mark.parametrize("priority", [PriorityClass.ANOMALY, PriorityClass.RECEIPT])
def test_a_number_that_no_database_takes(database: Database, writer: Writer, priority: PriorityClass) -> None:
    """A refused record whose epoch has a NUL stands in nobody's way, here or on PostgreSQL."""
    poison = plain(envelope(anomaly(), 1, priority=priority), epoch="e\0", body={"type": "anomaly"})
    written = writer.write(
        [raw(msgspec.json.encode([poison]), priority=priority), message([envelope(anomaly(7), 1)])]
    )
    assert (written.records, written.refused) == (1, 1)
    assert acked(written) == {("e1", "anomaly"): (1, ())}
    assert scores(database) == [7.0]


@pytest.mark.parametrize("where", ["insert_records", "insert_dead", "put_watermarks"])
def test_no_fault_of_one_message_stops_the_rest(
    database: Database, writer: Writer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whatever breaks at one device's record, it is refused or dropped, and the others are stored."""
    original = getattr(store, where)

    def breaks(tx: Session, what: object, *arguments: object) -> None:
        if OTHER in repr(what):
            raise ZeroDivisionError("nobody thought of this")
        original(tx, what, *arguments)

    monkeypatch.setattr(store, where, breaks)
    written = writer.write(
        [message([envelope(anomaly(9), 1, device=OTHER)], device=OTHER), message([envelope(anomaly(7), 1)])]
    )
    if where == "insert_dead":
        assert written.records == 2  # nothing went there
    else:
        assert (written.records, written.refused) == (1, 1)
        assert acked(written) == {("e1", "anomaly"): (1, ())}
    bad = raw(b"[1]", device=OTHER)
    assert writer.write([bad, message([envelope(anomaly(8), 2)])]).records == 1


def test_a_decoder_that_fails_is_survived(
    database: Database, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = decode(message([envelope(anomaly(7), 1)]))

    def fails(one: Inbound) -> Decoded:
        if one.payload == b"bad":
            raise MemoryError
        return good

    monkeypatch.setattr("control_plane.ingest.writer.decode", fails)
    assert writer.write([raw(b"bad"), raw(b"good")]).records == 1
    assert dead(database)[0].payload == "bad"


def zipped(records: list[dict[str, object]] | list[int]) -> Inbound:
    payload = zstandard.ZstdCompressor(level=19).compress(msgspec.json.encode(records))
    return raw(payload, content_type=JSON_ZSTD)


def test_a_message_of_many_epochs_is_refused(database: Database, writer: Writer) -> None:
    """Each would have a part in an acknowledgement that the broker takes for an attack."""
    epochs = [f"{number:064d}" for number in range(MAX_EPOCHS + 1)]
    written = writer.write([zipped([plain(envelope(anomaly(), 1, epoch=epoch)) for epoch in epochs])])
    assert (written.records, written.refused, written.acks) == (0, 1, ())
    assert "epochs" in dead(database)[0].detail
    written = writer.write([zipped([plain(envelope(anomaly(), 1, epoch=epoch)) for epoch in epochs[1:]])])
    assert written.records == MAX_EPOCHS


def test_an_acknowledgement_is_never_larger_than_the_broker_takes(writer: Writer) -> None:
    """Gaps everywhere, in many epochs at once: told in several parts that together say all."""
    epochs = [f"{number:064d}" for number in range(12)]
    numbers = [2**60 + 2 * n for n in range(MAX_RANGES)]
    written = writer.write(
        [message([envelope(anomaly(), n, epoch=epoch) for n in numbers]) for epoch in epochs]
    )
    assert written.records == len(epochs) * MAX_RANGES
    assert len(written.acks) > 1
    assert max(len(codec.encode(ack)) for ack in written.acks) < codec.MAX_PAYLOAD
    assert len(acked(written)) == len(epochs)


def test_watermarks_of_a_device_that_invents_epochs_are_bounded(database: Database, writer: Writer) -> None:
    for start in range(0, store.MARKS_PER_DEVICE + 3 * MAX_EPOCHS, MAX_EPOCHS):
        writer.write([message([envelope(anomaly(), 1, epoch=f"e{start + n}") for n in range(MAX_EPOCHS)])])
    with database.reading() as tx:
        assert len(tx.exec(select(Watermark)).all()) == store.MARKS_PER_DEVICE


def test_many_bad_records_are_a_few_letters(database: Database, writer: Writer) -> None:
    written = writer.write([zipped(list(range(50_000)))])
    assert (written.refused, len(dead(database))) == (1, 1)
    assert "50000 records" in dead(database)[0].detail
    written = writer.write([zipped(list(range(MAX_RECORDS)))])
    assert written.refused == MAX_RECORDS
    letters = dead(database)
    assert len(letters) == 1 + LETTERS
    assert f"and {MAX_RECORDS - LETTERS} more records" in letters[0].detail


def test_dead_letters_are_bounded(
    database: Database, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DEAD_PER_DEVICE", 20)
    for number in range(30):
        writer.write([msgspec.structs.replace(raw(b"%d" % number), t_received=NOW + number)])
    writer.write([raw(b"other", device=OTHER)])
    assert len(dead(database)) == 21
    assert {letter.payload for letter in dead(database)} == {"other", *map(str, range(10, 30))}
    assert Retention(database, lambda: NOW + DEAD_LETTERS_US + 25).tick() == 16
    assert len(dead(database)) == 5
    with database.transaction() as tx:
        assert store.prune_dead(tx, 0, keep=2) == 3
    assert {letter.payload for letter in dead(database)} == {"28", "29"}


def test_a_sketch_that_cannot_be_calculated_with(database: Database, writer: Writer) -> None:
    """It is refused alone; what other devices sent beside it is stored."""
    good = summary()
    assert good.latency_us is not None
    poison = msgspec.structs.replace(good, latency_us=msgspec.structs.replace(good.latency_us, accuracy=1.0))
    written = writer.write(
        [message([envelope(poison, 1)]), message([envelope(anomaly(7), 1, device=OTHER)], device=OTHER)]
    )
    assert (written.records, written.refused) == (1, 1)
    assert acked(written)["e1", "summary"] == (1, ())


@pytest.mark.parametrize("together", [False, True])
def test_the_newest_report_wins_whatever_comes_last(
    database: Database, writer: Writer, *, together: bool
) -> None:
    messages = [message([envelope(Reported(revision=seq), seq)]) for seq in (2, 5, 3)]
    for batch in [messages] if together else [[one] for one in messages]:
        writer.write(batch)
    with database.reading() as tx:
        reported = devices.device(tx, DEVICE).reported
    assert reported is not None
    assert reported.revision == 5


def test_a_new_epoch_begins_again(database: Database, writer: Writer) -> None:
    writer.write([message([envelope(Reported(revision=7), 9)])])
    writer.write([message([envelope(Reported(revision=8), 1, epoch="e2")])])
    with database.reading() as tx:
        reported = devices.device(tx, DEVICE).reported
    assert reported is not None
    assert reported.revision == 8


def test_presence(database: Database, writer: Writer) -> None:
    for online in (True, False):
        status = Status(v=1, device=DEVICE, online=online, boot_id="b", t_wall=NOW)
        writer.write([Inbound(topics.status(DEVICE), codec.encode(status), None, NOW)])
        with database.reading() as tx:
            assert devices.device(tx, DEVICE).online is online
    forged = Status(v=1, device=OTHER, online=True, boot_id="b", t_wall=NOW)
    writer.write([Inbound(topics.status(DEVICE), codec.encode(forged), None, NOW)])
    with database.reading() as tx:
        assert not devices.device(tx, OTHER).online
    assert dead(database)[0].code == "message.wrong_device"
    writer.write([Inbound(topics.status(DEVICE), b"", None, NOW)])


def test_what_a_device_gave_up_leaves_no_gap(writer: Writer) -> None:
    first = writer.write([message([envelope(anomaly(), 10)])])
    assert acked(first) == {("e1", "anomaly"): (0, ((10, 10),))}
    second = writer.write([message([envelope(anomaly(), 12, oldest=11)])])
    assert acked(second) == {("e1", "anomaly"): (10, ((12, 12),))}
    third = writer.write([message([envelope(anomaly(), 13, oldest=2**60)])])
    assert acked(third) == {("e1", "anomaly"): (13, ())}


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([None, JSON_ZSTD, "application/json", "x"]), st.text(max_size=60)
)
def test_no_bytes_make_the_decoder_raise(payload: bytes, content_type: str | None, topic: str) -> None:
    for where in (topics.records(DEVICE, PriorityClass.RAW), topics.status(DEVICE), topic):
        decode(Inbound(where, payload, content_type, NOW))
