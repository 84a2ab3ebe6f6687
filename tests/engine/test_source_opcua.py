"""The opcua source against a real server of asyncua."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asyncua import Server, ua
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.crypto.truststore import TrustStore
from asyncua.crypto.validator import CertificateValidator, CertificateValidatorOptions

from agent.engine.sources import check, open_source
from agent.engine.sources.base import Source
from agent.engine.sources.marks import Marks, Texts
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.certificates import Identity
from tests.engine.conftest import Engine, free_port, make_package, until
from tests.engine.test_mqtt import CLOCK

URI = "urn:plant:press"
NAMES = ("a", "b", "c")
SECURE = {"security_policy": "Basic256Sha256", "key_file": "k", "server_certificate_file": "s"}


class Users:
    """One user, no guests."""

    def get_user(self, _server: Any, username: Any = None, password: Any = None, **_: Any) -> Any:
        good = username == "plant" and password == "secret"
        return User(role=UserRole.User, name="plant") if good else None


class Machine:
    """A server with variables a, b, c (numbers) and label (text)."""

    def __init__(
        self, port: int | None = None, setup: Callable[[Server], Any] | None = None, **more: Any
    ) -> None:
        self.port = port or free_port()
        self.url = f"opc.tcp://127.0.0.1:{self.port}/press"
        self._setup, self._more = setup, more
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._nodes: dict[str, Any] = {}
        self.server: Server = self._call(self._start())

    async def _start(self) -> Server:
        server = Server(**self._more)
        await server.init()
        server.set_endpoint(self.url)
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        if self._setup is not None:
            await self._setup(server)
        await server.register_namespace("urn:something:else")
        space = await server.register_namespace(URI)
        for name in NAMES:
            node = ua.NodeId(name, space)
            self._nodes[name] = await server.nodes.objects.add_variable(node, name, 0.0)
        label = ua.NodeId("label", space)
        self._nodes["label"] = await server.nodes.objects.add_variable(label, "label", "x")
        await server.start()
        return server

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def write(self, name: str, value: float, *, t: datetime | None = None, status: int = 0) -> None:
        data = ua.DataValue(
            ua.Variant(value, ua.VariantType.Double),
            StatusCode=ua.StatusCode(ua.UInt32(status)),
            SourceTimestamp=t or datetime.now(UTC),
        )
        self._call(self.server.write_attribute_value(self._nodes[name].nodeid, data))

    def end(self) -> None:
        self._call(self.server.stop())
        self._call(self._settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _settle(self) -> None:
        tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.end()


@pytest.fixture
def opened() -> Iterator[Callable[..., Source]]:
    held: list[Source] = []

    def opening(
        machine: Machine, *, rate_hz: float = 20.0, names: tuple[str, ...] = NAMES, **table: Any
    ) -> Source:
        pipeline = Pipeline(
            tuple(Channel(n) for n in names),
            1,
            1,
            (0.0,) * len(names),
            (1.0,) * len(names),
            sample_rate_hz=rate_hz,
        )
        given = {
            "kind": "opcua",
            "url": machine.url,
            "tags": [{"channel": n, "address": f"nsu={URI};s={n}"} for n in names],
            "publishing_ms": 20.0,
            "timeout_s": 2.0,
        }
        held.append(open_source(given | table, pipeline, CLOCK))
        return held[-1]

    yield opening
    for one in held:
        one.close()
        one.close()


class Seen:
    """What a source has given so far."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rows: list[list[float]] = []
        self.times: list[int] = []
        self.lost = 0

    def until(self, condition: Callable[[list[float]], Any], what: str) -> None:
        def there() -> bool:
            batch = self.source.poll(1000)
            if batch is not None:
                self.rows += batch.values.tolist()
                self.times += batch.t.tolist()
                self.lost += batch.lost
            return bool(self.rows) and bool(condition(self.rows[-1]))

        until(there, what)


def failure(source: Source) -> str:
    with pytest.raises(PitheadError) as caught:
        until(lambda: source.poll(1) and None, "never")
    assert caught.value.code == "source.failed"
    return caught.value.detail


def test_values_become_rows_at_the_rate(machine: Machine, opened: Callable[..., Source]):
    for i, name in enumerate(NAMES):
        machine.write(name, i + 1.0)
    seen = Seen(opened(machine))
    seen.until(lambda row: row == [1, 2, 3], "the first values")
    machine.write("b", 20.0)
    seen.until(lambda row: row == [1, 20, 3], "the new value")
    more = len(seen.times) + 30
    seen.until(lambda _: len(seen.times) >= more, "30 rows")
    assert set(np.diff(seen.times).tolist()) == {50_000}
    assert abs(CLOCK.wall() - seen.times[-1]) < 5_000_000


def test_a_value_stands_in_the_row_of_its_own_time(machine: Machine, opened: Callable[..., Source]):
    """Told 300 ms after it was taken, but less than two publishing intervals: in its row all the same."""
    machine.write("a", 1.0)
    seen = Seen(opened(machine, names=("a",), publishing_ms=500.0))
    seen.until(lambda row: row == [1], "the first value")
    taken = datetime.now(UTC) - timedelta(milliseconds=300)
    machine.write("a", 2.0, t=taken)
    seen.until(lambda row: row == [2], "the value")
    first = next(t for t, row in zip(seen.times, seen.rows, strict=True) if row == [2])
    assert 0 <= first - taken.timestamp() * 1e6 < 60_000
    assert seen.lost == 0
    machine.write("a", 3.0, t=datetime.now(UTC) - timedelta(seconds=5))
    machine.write("a", 4.0, t=datetime.now(UTC))
    seen.until(lambda row: row == [4], "the next")
    assert seen.lost == 1, "five seconds late"


@pytest.mark.parametrize(
    ("status", "more", "seen_as"),
    [
        (ua.StatusCodes.BadSensorFailure, {}, np.nan),
        (ua.StatusCodes.UncertainLastUsableValue, {}, np.nan),
        (ua.StatusCodes.UncertainLastUsableValue, {"accept_uncertain": True}, 2.0),
        (ua.StatusCodes.GoodClamped, {}, 2.0),
    ],
)
def test_a_bad_status_is_a_missing_sample(
    machine: Machine, opened: Callable[..., Source], status: int, more: dict[str, Any], seen_as: float
):
    machine.write("a", 1.0)
    seen = Seen(opened(machine, names=("a",), **more))
    seen.until(lambda row: row == [1], "the first value")
    machine.write("a", 2.0, status=status)
    seen.until(lambda row: np.array_equal(row, [seen_as], equal_nan=True), "the value")
    machine.write("a", 3.0)
    seen.until(lambda row: row == [3], "a good value")


def test_the_device_s_clock_may_be_the_only_one(machine: Machine, opened: Callable[..., Source]):
    machine.write("a", 1.0)
    seen = Seen(opened(machine, names=("a",), timestamps="arrival"))
    seen.until(lambda row: row == [1], "the first value")
    machine.write("a", 2.0, t=datetime.now(UTC) - timedelta(days=1))
    seen.until(lambda row: row == [2], "the value")
    assert seen.lost == 0


def test_a_value_that_is_not_renewed_is_missing_where_an_age_is_given(
    machine: Machine, opened: Callable[..., Source]
):
    machine.write("a", 1.0)
    seen = Seen(opened(machine, names=("a",), max_age_s=0.5))
    seen.until(lambda row: row == [1], "the first value")
    seen.until(lambda row: np.isnan(row[0]), "it is old")
    machine.write("a", 1.0)
    seen.until(lambda row: row == [1], "the same value, of now")


def test_units_and_factors(machine: Machine, opened: Callable[..., Source]):
    machine.write("a", 50.0)
    space = machine._nodes["a"].nodeid.NamespaceIndex
    tags = [{"channel": "a", "address": f"ns={space};s=a", "scale": 0.5, "offset": -5.0}]
    Seen(opened(machine, names=("a",), tags=tags)).until(lambda row: row == [20], "the value")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (f"nsu={URI};s=nothing", "channel 'a': nsu=urn:plant:press;s=nothing: BadNodeIdUnknown"),
        ("nsu=urn:nobody;s=a", "channel 'a': 'nsu=urn:nobody;s=a' is no node here"),
        ("temperature", "channel 'a': 'temperature' is no node here"),
        (f"nsu={URI};s=label", "holds a str, no number"),
    ],
)
def test_an_address_that_is_none_is_named(
    machine: Machine, opened: Callable[..., Source], address: str, words: str
):
    assert words in failure(opened(machine, names=("a",), tags=[{"channel": "a", "address": address}]))


def test_close_is_quick_and_the_server_is_told(machine: Machine, opened: Callable[..., Source]):
    source = opened(machine)
    until(lambda: source.poll(1), "it is subscribed")
    began = CLOCK.mono()
    source.close()
    assert CLOCK.mono() - began < 2_000_000
    subscriptions = machine.server.iserver.subscription_service.subscriptions
    until(lambda: not subscriptions, "no subscription is left")


def test_a_lane_lives_through_a_server_that_goes_and_comes(tmp_path: Path, engine: Engine):
    port = free_port()
    package = make_package(tmp_path / "p")
    supervisor = engine.connect()
    url = f"opc.tcp://127.0.0.1:{port}/press"
    tags = [{"channel": n, "address": f"nsu={URI};s={n}"} for n in NAMES]
    table = {"kind": "opcua", "url": url, "tags": tags, "publishing_ms": 50.0, "timeout_s": 2.0}
    supervisor.configure(package.spec(table))
    failed = supervisor.until_state(state="failed")
    assert failed.code == "source.failed"
    assert url in failed.detail
    for _ in range(2):
        machine = Machine(port)
        supervisor.until_state(state="running", code=None)
        seen = supervisor.state().windows
        supervisor.until(lambda seen=seen: supervisor.state().windows > seen + 10, "rows are scored")
        machine.end()
        supervisor.until_state(state="failed")


# ---- security


def secured(directory: Path, trusts: Identity) -> tuple[Identity, Callable[[Server], Any]]:
    """Return a server's identity, and what makes a server speak with ``trusts`` alone."""
    own = Identity(directory, "server", uri="urn:freeopcua:python:server")
    trusted = directory / "trusted"
    trusted.mkdir()
    (trusted / "device.der").write_bytes(trusts.certificate.read_bytes())

    async def setup(server: Server) -> None:
        server.set_security_policy([ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt])
        await server.load_certificate(str(own.certificate))
        await server.load_private_key(str(own.key))
        store = TrustStore([trusted], [])
        await store.load()
        options = CertificateValidatorOptions.TRUSTED_VALIDATION | CertificateValidatorOptions.URI
        server.set_certificate_validator(CertificateValidator(options, store))

    return own, setup


def test_basic256sha256_with_certificates_and_a_password(tmp_path: Path, opened: Callable[..., Source]):
    other = Identity(tmp_path, "other", uri="urn:freeopcua:python:server")
    own = Identity(tmp_path, "device", uri="urn:pithead:device:7")
    stranger = Identity(tmp_path, "stranger", uri="urn:pithead:device:8")
    server, setup = secured(tmp_path, own)
    secret = tmp_path / "credentials.toml"
    secret.write_text('username = "plant"\npassword = "secret"\n')
    table = {
        "security_policy": "Basic256Sha256",
        **own.files,
        "server_certificate_file": str(server.certificate),
        "credentials_file": str(secret),
    }
    machine = Machine(setup=setup, user_manager=Users())
    try:
        machine.write("a", 4.0)
        Seen(opened(machine, names=("a",), **table)).until(lambda row: row == [4], "the value")

        wrong = tmp_path / "wrong.toml"
        wrong.write_text('username = "plant"\npassword = "guess"\n')
        words = failure(opened(machine, names=("a",), **table | {"credentials_file": str(wrong)}))
        assert "guess" not in words
        assert "access" in words.lower()
        failure(opened(machine, names=("a",), **table | {"credentials_file": None}))
        failure(opened(machine, names=("a",), **table | stranger.files))
        failure(opened(machine, names=("a",), **table | {"server_certificate_file": str(other.certificate)}))
        plain = dict.fromkeys(("certificate_file", "key_file", "server_certificate_file"))
        failure(opened(machine, names=("a",), **table | plain | {"security_policy": None}))
        assert secret.name not in failure(
            opened(machine, names=("a",), **table | {"key_file": str(server.certificate)})
        )
    finally:
        machine.end()


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"url": "http://x"}, "config.invalid", "url"),
        ({"url": "opc.tcp://plant:secret@host:4840"}, "config.invalid", "url"),
        ({"tags": None}, "config.invalid", "needs tags"),
        ({"timestamps": "mine"}, "config.invalid", "timestamps"),
        ({"security_policy": "None"}, "config.invalid", "security_policy"),
        ({"security_policy": "Basic256Sha256"}, "config.invalid", "certificate_file is missing"),
        ({"credentials_file": "/no/such"}, "source.failed", "credentials_file"),
        ({**SECURE, "certificate_file": "/no/such"}, "source.failed", "certificate_file"),
        ({**SECURE, "certificate_file": __file__}, "source.failed", "certificate_file"),
        ({"certificate_file": "/no/such"}, "config.invalid", "certificate_file stands without"),
        ({"sample_ms": 1}, "config.invalid", "sample_ms"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], code: str, words: str):
    table = {"kind": "opcua", "url": "opc.tcp://x:1", "tags": [{"channel": "a", "address": "i=1"}]} | changes
    pipeline = Pipeline((Channel("a"),), 1, 1, (0.0,), (1.0,), sample_rate_hz=1.0)
    with pytest.raises(PitheadError) as caught:
        open_source(table, pipeline, CLOCK)
    assert caught.value.code == code
    assert words in caught.value.detail
    assert "secret@" not in caught.value.detail


def test_settings_can_be_checked_without_a_server():
    check({"kind": "opcua", "url": "opc.tcp://x:1", "tags": [{"channel": "a", "address": "i=1"}]})


def test_a_text_may_be_the_state_of_the_machine(machine: Machine):
    machine.write("a", 4.0)
    table: dict[str, Any] = {
        "kind": "opcua",
        "url": machine.url,
        "tags": [{"channel": "a", "address": f"nsu={URI};s=a"}],
        "publishing_ms": 20.0,
    }
    texts = Texts()
    pipeline = Pipeline((Channel("a"),), 1, 1, (0.0,), (1.0,), sample_rate_hz=20.0)
    source = open_source(table, pipeline, CLOCK, Marks(((f"nsu={URI};s=label", ""),), texts))
    try:
        batch = until(
            lambda: (b := source.poll(100)) and len(b.t) and not np.isnan(b.marks[-1, 0]) and b, "a state"
        )
    finally:
        source.close()
    assert texts.text(batch.marks[-1, 0]) == "x"
    assert batch.values[-1].tolist() == [4.0]
