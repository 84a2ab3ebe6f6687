"""The wire: what goes out comes back, and what is wrong is refused with its path."""

import contextlib
import json

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from contract import codec
from contract.errors import PitheadError
from contract.messages import (
    Anomaly,
    AssignmentState,
    Envelope,
    Health,
    OutboxHealth,
    PriorityClass,
    Receipt,
)

DEVICE = "dev-00000001"

reals = st.floats(-1e300, 1e300)


def texts(max_size: int, min_size: int = 0) -> st.SearchStrategy[str]:
    return st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
        min_size=min_size,
        max_size=max_size,
    )


receipts = st.builds(
    Receipt,
    model_name=st.just("shuttle"),
    version=st.just("1.2.3"),
    state=st.sampled_from(AssignmentState),
    activation=st.integers(0, 2**40),
    detail=texts(200),
    facts=st.dictionaries(texts(10), st.none() | st.booleans() | st.integers(-(2**50), 2**50)),
)
anomalies = st.builds(
    Anomaly,
    model_name=st.just("shuttle"),
    version=st.just("1.2.3"),
    t=st.integers(0, 2**60),
    score=reals,
    threshold=reals,
    source_ref=st.none() | texts(10),
)
envelopes = st.builds(
    Envelope,
    v=st.just(1),
    device=st.just(DEVICE),
    priority=st.sampled_from(PriorityClass),
    epoch=texts(8, 1),
    seq=st.integers(1, 2**40),
    boot_id=texts(8),
    t_wall=st.integers(0, 2**60),
    t_mono=st.integers(0, 2**60),
    body=receipts | anomalies,
)


def receipt(**changes: object) -> Envelope:
    body = Receipt(model_name="shuttle", version="1.0.0", state=AssignmentState.READY)
    fields = {
        "v": 1, "device": DEVICE, "priority": PriorityClass.RECEIPT, "epoch": "e", "seq": 1,
        "boot_id": "b", "t_wall": 1, "t_mono": 1, "body": body,
    }  # fmt: skip
    return Envelope(**{**fields, **changes})  # type: ignore[arg-type]


@given(st.lists(envelopes, max_size=40))
def test_a_batch_comes_back_as_it_went(batch: list[Envelope]):
    assert codec.decode_batch(*codec.encode_batch(batch)) == batch


def test_a_large_batch_is_compressed_and_says_so():
    payload, content_type = codec.encode_batch([receipt(seq=n) for n in range(1, 200)])
    assert content_type == codec.JSON_ZSTD
    assert len(payload) < 4000
    assert len(codec.decode_batch(payload, content_type)) == 199


def test_the_priority_class_is_called_class_on_the_wire():
    (record,) = json.loads(codec.encode_batch([receipt()])[0])
    assert record["class"] == "receipt"
    assert record["body"]["type"] == "receipt"


def test_an_unknown_field_is_ignored():
    (record,) = json.loads(codec.encode_batch([receipt()])[0])
    record["invented_later"] = {"x": 1}
    record["body"]["also_later"] = [1]
    assert codec.decode_batch(json.dumps([record]).encode(), codec.JSON) == [receipt()]


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        ("seq", 0, "$[0].seq"),
        ("seq", "1", "$[0].seq"),
        ("device", "UPPER-CASE", "$[0].device"),
        ("class", "gossip", "$[0].class"),
        ("t_wall", -1, "$[0].t_wall"),
        ("body", {"type": "receipt", "model_name": "m", "version": "one"}, "$[0].body.version"),
        ("body", {"type": "telepathy"}, "$[0].body.type"),
        ("device", "dev-00000001\n", "$[0].device"),
        ("body", {"type": "receipt", "model_name": "m\n", "version": "1.0.0"}, "$[0].body.model_name"),
        ("body", {"type": "receipt", "model_name": "m", "version": "1.0.0\n"}, "$[0].body.version"),
        ("body", {"type": "receipt", "model_name": "m", "version": "\uff11.0.0"}, "$[0].body.version"),
        ("boot_id", "no database\0 takes this", "$[0].boot_id"),
        ("v", 10**30, "$[0].v"),
    ],
)
def test_a_wrong_field_is_refused_with_its_path(field: str, value: object, path: str):
    (record,) = json.loads(codec.encode_batch([receipt()])[0])
    record[field] = value
    with pytest.raises(PitheadError) as caught:
        codec.decode_batch(json.dumps([record]).encode(), codec.JSON)
    assert caught.value.code == "message.malformed"
    assert path in caught.value.detail


@pytest.mark.parametrize(
    ("payload", "content_type", "code"),
    [
        (b"", codec.JSON, "message.malformed"),
        (b"\xff\xfe", codec.JSON, "message.malformed"),
        (b"not zstd at all", codec.JSON_ZSTD, "message.malformed"),
        (b"[]", "application/x-pickle", "message.malformed"),
        (b" " * (codec.MAX_PAYLOAD + 1), codec.JSON, "message.too_large"),
        (zstandard.compress(b" " * (codec.MAX_DECODED + 1)), codec.JSON_ZSTD, "message.too_large"),
    ],
)
def test_a_bad_payload_is_refused(payload: bytes, content_type: str, code: str):
    with pytest.raises(PitheadError) as caught:
        codec.decode_batch(payload, content_type)
    assert caught.value.code == code


@given(st.binary(max_size=300), st.sampled_from([codec.JSON, codec.JSON_ZSTD, None]))
def test_noise_never_does_more_than_raise_our_error(payload: bytes, content_type: str | None):
    with contextlib.suppress(PitheadError):
        codec.decode_batch(payload, content_type)


def test_no_nan_leaves_the_house():
    health = Health(1.0, float("nan"), 1.0, 1, 1, OutboxHealth(0, 0))
    decoded = msgspec.json.decode(codec.encode(health))
    assert decoded["cpu_percent"] is None


def test_the_words_of_an_error_can_always_be_stored():
    assert PitheadError("internal.error", "a\0b").detail == "a\\0b"
