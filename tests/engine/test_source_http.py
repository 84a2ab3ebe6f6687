"""The http source, pushed to over real connections."""

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.serve import tokens
from agent.engine.sources import check, open_source
from agent.engine.sources.base import Source
from agent.engine.sources.http import Order, Refused, Row, decoded
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.certificates import Identity
from tests.engine.conftest import CHANNELS, Engine, free_port, make_package, until
from tests.engine.test_mqtt import CLOCK

NOW = 1_800_000_000_000_000


def pipeline(rate_hz: float | None = None) -> Pipeline:
    channels = tuple(Channel(n) for n in CHANNELS)
    return Pipeline(channels, 1, 1, (0.0,) * 3, (1.0,) * 3, sample_rate_hz=rate_hz)


class Pusher:
    """A source, and a client beside it."""

    def __init__(self, rate_hz: float | None = None, **table: Any) -> None:
        self.port = free_port()
        self.source: Source = open_source(
            {"kind": "http", "port": self.port} | table, pipeline(rate_hz), CLOCK
        )
        until(lambda: self.source.poll(1), "it listens")

    def send(
        self, body: bytes, *, method: str = "POST", path: str = "/samples", **headers: str
    ) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            client.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            answer = client.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers
        finally:
            client.close()

    def push(self, rows: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        status, answer, _ = self.send(json.dumps(rows).encode(), **headers)
        return status, answer


@pytest.fixture
def pusher() -> Iterator[Callable[..., Pusher]]:
    held: list[Pusher] = []

    def make(rate_hz: float | None = None, **table: Any) -> Pusher:
        held.append(Pusher(rate_hz, **table))
        return held[-1]

    yield make
    for one in held:
        one.source.close()
        one.source.close()


def test_a_row_a_batch_and_lines(pusher: Callable[..., Pusher]):
    at, now = pusher(), CLOCK.wall()
    when = datetime.fromtimestamp(now / 1e6, UTC).isoformat()
    assert at.push({"t": when, "values": {"a": 1, "b": 2.5, "c": True, "x": "y"}}) == (
        202,
        {"accepted": 1, "late": 0},
    )
    assert at.push([{"t": now + 10, "values": [4, None, 6]}, {"t": now + 20, "values": {"b": 7}}])[0] == 202
    lines = b'{"values": [8, 8, 8]}\n\n{"values": [9, 9, 9]}\n'
    assert at.send(lines, content_type="application/x-ndjson; charset=utf-8")[1] == {"accepted": 2, "late": 0}
    batch = at.source.poll(100)
    assert batch is not None
    nan = np.nan
    rows = [[1, 2.5, 1], [4, nan, 6], [nan, 7, nan], [8, 8, 8], [9, 9, 9]]
    assert np.array_equal(batch.values, rows, equal_nan=True)
    assert (np.abs(batch.t[:3] - [now, now + 10, now + 20]) <= 1).all()
    assert (np.diff(batch.t) > 0).all()
    assert batch.lost == 0


def test_a_batch_that_is_sent_again_is_late_and_changes_nothing(pusher: Callable[..., Pusher]):
    at, now = pusher(), CLOCK.wall()
    rows = [{"t": now + i, "values": [i, i, i]} for i in range(3)]
    assert at.push(rows) == (202, {"accepted": 3, "late": 0})
    assert at.push(rows) == (202, {"accepted": 0, "late": 3})
    batch = at.source.poll(100)
    assert batch is not None
    assert (len(batch.values), batch.lost) == (3, 3)


def test_rows_that_should_have_come_between_are_lost_and_break_the_window(pusher: Callable[..., Pusher]):
    at, now = pusher(10.0), CLOCK.wall() - 10_000_000
    times = [0, 100_500, 199_000, 600_000, 700_000]
    assert at.push([{"t": now + t, "values": [1, 2, 3]} for t in times])[0] == 202
    first, second = at.source.poll(100), at.source.poll(100)
    assert first is not None
    assert second is not None
    assert (len(first.values), first.continues) == (3, True)
    assert (len(second.values), second.continues) == (2, False)
    assert first.lost + second.lost == 3


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "a row is"),
        (b"not json", "a row is"),
        (b"\xff\xfe", "a row is"),
        (b"[" * 100_000, "a row is"),
        (b'{"value": 1}', "value"),
        (b'{"t": 1}', "values"),
        (b'[{"values": [1,2,3]}, 5]', "$[1]"),
        (b'{"values": [1,2]}', "row 0: 2 values for 3 channels"),
        (b'[{"values": [1,2,3]}, {"values": {"a": 1, "b": "x", "c": 2}}]', "row 1: channel 'b': 'x'"),
        (b'{"values": {"A": 1}}', "row 0: none of the channels a, b, c"),
        (b'{"values": {"a": NaN}}', "a row is"),
        (b'{"values": {"a": 1' + b"0" * 400 + b"}}", "is not a number"),
        (b'{"t": 1700000000, "values": [1,2,3]}', "count microseconds since 1970"),
        (b'{"t": 4102444800000000, "values": [1,2,3]}', "s ahead of this device's clock"),
        (b'{"t": 1' + b"0" * 400 + b', "values": [1,2,3]}', "s ahead of this device's clock"),
        (b'{"t": "yesterday", "values": [1,2,3]}', "is not RFC 3339"),
        (b'{"t": "2026-01-01T00:00:00", "values": [1,2,3]}', "has no time zone"),
        (b'{"t": [], "values": [1,2,3]}', "`$.t`"),
    ],
)
def test_what_cannot_be_taken_is_a_400_that_says_why(pusher: Callable[..., Pusher], body: bytes, words: str):
    at = pusher()
    status, answer, _ = at.send(body)
    assert status == 400
    assert words in answer["error"]
    assert len(answer["error"]) < 400
    batch = at.source.poll(10)
    assert batch is not None
    assert not len(batch.values), "a request is taken whole or not at all"


def test_other_paths_methods_and_encodings(pusher: Callable[..., Pusher]):
    at = pusher()
    assert at.send(b"{}", path="/")[0] == 404
    status, _, headers = at.send(b"", method="GET")
    assert (status, headers["allow"]) == (405, "POST")
    assert at.send(b"{}", content_encoding="gzip")[0] == 415


def test_a_body_that_is_too_large_is_413(pusher: Callable[..., Pusher]):
    at = pusher(max_body_bytes=1024)
    status, answer, _ = at.send(b"[" + b" " * 2000 + b"]")
    assert status == 413
    assert "1024" in answer["error"]


def test_more_rows_than_could_ever_wait_are_413(
    pusher: Callable[..., Pusher], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agent.engine.sources.http.MAX_WAITING", 5)
    at = pusher()
    assert at.push([{"values": [1, 2, 3]}] * 6)[0] == 413


def test_a_lane_that_does_not_follow_is_a_429_and_nothing_is_lost(pusher: Callable[..., Pusher]):
    at = pusher(max_body_bytes=8 * 1024 * 1024)
    batch = [{"values": [1, 2, 3]}] * 9000
    assert at.push(batch)[0] == 202
    assert at.push(batch)[0] == 202
    status, answer, headers = at.send(json.dumps(batch).encode())
    assert (status, headers["retry-after"]) == (429, "1")
    assert answer["error"].startswith("9000 rows, there is room for 2000")
    assert at.source.backlog() == 18_000
    taken = 0
    while (found := at.source.poll(1000)) is not None and len(found.values):
        taken += len(found.values)
        assert found.lost == 0
    assert taken == 18_000
    assert at.push(batch)[0] == 202


def test_slow_clients_and_open_connections_hold_nobody(pusher: Callable[..., Pusher]):
    at = pusher()
    slow = [socket.create_connection(("127.0.0.1", at.port)) for _ in range(40)]
    try:
        for one in slow:
            one.sendall(b"POST /samples HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        assert at.push({"values": [1, 2, 3]})[0] == 202
        began = CLOCK.mono()
        at.source.close()
        assert CLOCK.mono() - began < 2_000_000
    finally:
        for one in slow:
            one.close()


def test_beyond_loopback_a_token_is_needed(pusher: Callable[..., Pusher], tmp_path: Path):
    with pytest.raises(PitheadError, match=r"tokens_file is missing: 0\.0\.0\.0 can be reached") as caught:
        open_source({"kind": "http", "port": 1, "host": "0.0.0.0"}, pipeline(), CLOCK)  # noqa: S104
    assert caught.value.code == "config.invalid"
    token, line = tokens.new("plc", "infer")
    (tmp_path / "tokens").write_text(line + "\n")
    at = pusher(host="0.0.0.0", tokens_file=str(tmp_path / "tokens"))  # noqa: S104
    row = {"values": [1, 2, 3]}
    status, _, headers = at.send(json.dumps(row).encode())
    assert (status, headers["www-authenticate"]) == (401, "Bearer")
    assert at.push(row, authorization="Bearer ps1.guess")[0] == 401
    assert at.push(row, authorization=f"Bearer {token}")[0] == 202


def test_tls(pusher: Callable[..., Pusher], tmp_path: Path):
    own = Identity(tmp_path, "push")
    at = pusher(**own.files)
    context = ssl.create_default_context(cafile=own.certificate)
    client = http.client.HTTPSConnection("localhost", at.port, context=context, timeout=10)
    client.request("POST", "/samples", b'{"values": [1, 2, 3]}')
    assert client.getresponse().status == 202
    client.close()


def test_a_port_that_is_taken_is_a_failed_source(pusher: Callable[..., Pusher]):
    at = pusher()
    second = open_source({"kind": "http", "port": at.port}, pipeline(), CLOCK)
    try:
        with pytest.raises(PitheadError, match="address already in use") as caught:
            until(lambda: second.poll(1) and None, "never")
        assert caught.value.code == "source.failed"
    finally:
        second.close()


def test_a_lane_scores_what_is_pushed(tmp_path: Path, engine: Engine):
    package = make_package(tmp_path / "p")
    port = free_port()
    supervisor = engine.connect()
    supervisor.configure(package.spec({"kind": "http", "port": port, "rate_hz": 1000.0}))
    supervisor.until_state(state="running", code=None)
    now = CLOCK.wall()
    rows = [{"t": now + 1000 * i, "values": {"a": 20, "b": 20, "c": 20}} for i in range(500)]

    def pushed() -> bool:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            client.request("POST", "/samples", json.dumps(rows))
            return client.getresponse().status == 202
        except ConnectionError:
            return False
        finally:
            client.close()

    until(pushed, "the lane listens")
    supervisor.until(lambda: sum(s.count for s in supervisor.summaries) >= 500, "all rows are scored")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"port": 0}, "port"),
        ({"port": 1, "host": "::"}, "tokens_file"),
        ({"port": 1, "prot": 1}, "prot"),
        ({"port": 1, "tokens_file": "/no/such"}, "lanes.source.tokens_file /no/such"),
        ({"port": 1, "tokens_file": __file__}, "lanes.source.tokens_file"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], words: str):
    with pytest.raises(PitheadError) as caught:
        open_source({"kind": "http"} | changes, pipeline(), CLOCK)
    assert caught.value.code == "config.invalid"
    assert words in caught.value.detail


def test_settings_can_be_checked_without_listening():
    check({"kind": "http", "port": 8090})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abctx"), inner, max_size=4),
    max_leaves=12,
)


@given(json_values | st.lists(st.fixed_dictionaries({"values": json_values, "t": json_values}), max_size=4))
def test_no_body_breaks_it(body: Any):
    order = Order(CHANNELS, 10.0)
    try:
        rows = decoded(json.dumps(body).encode(), b"application/json")
        stretches, late = order.sort(rows, NOW)
    except Refused:
        return
    taken = [row for stretch in stretches for row in stretch.rows]
    assert len(taken) + late == len(rows)
    assert all(len(values) == 3 for _, values in taken)


@given(st.lists(st.integers(-1000, 1000), max_size=40))
def test_times_only_rise(steps: list[int]):
    order, t, taken = Order(("a",), 10.0), NOW, []
    for step in steps:
        t += step * 1000
        t = min(t, NOW + 50_000_000)
        stretches, _ = order.sort([Row([1.0], t)], NOW)
        taken += [when for stretch in stretches for when, _ in stretch.rows]
    assert all(b > a for a, b in pairwise(taken))
