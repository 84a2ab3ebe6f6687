"""Requests by a real broker, answered by a real engine process."""

import asyncio
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.core.serve_models import Client, ServedModel
from agent.core.settings import Serve, ServeMqtt
from agent.engine.serve import codec
from agent.engine.serve.catalogue import Limits
from agent.engine.serve.exchange import Counts, usable
from agent.engine.serve.messages import Responder
from agent.engine.serve.requests import InferRequest, InferResponse
from agent.engine.serve.served import Done
from agent.engine.serve.service import Service
from agent.ports import ServeSpec, ServeState
from tests.engine.conftest import Engine, Package, Supervisor, until
from tests.engine.test_mqtt import CLOCK, MOSQUITTO, Broker
from tests.engine.test_serving_slots import ask, model, package, question, said_of, until_serves

pytestmark = pytest.mark.skipif(not MOSQUITTO.exists(), reason="mosquitto is not installed (make system)")


class Asker:
    """An application that asks by MQTT 5."""

    def __init__(self, broker: Broker, setup: Callable[[paho.Client], Any] = lambda _: None) -> None:
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.answers: Queue[paho.MQTTMessage] = Queue()
        self.client.on_message = lambda _c, _u, message: self.answers.put(message)
        granted: Queue[int] = Queue()
        self.client.on_subscribe = lambda *arguments: granted.put(arguments[2])
        setup(self.client)

        def connected() -> bool:
            try:
                self.client.connect("127.0.0.1", broker.port)
            except OSError:
                return False
            return True

        until(connected, "the broker answers")
        self.client.loop_start()
        until(self.client.is_connected, "the asker is connected")
        self.client.subscribe("answers/#", qos=2)
        granted.get(timeout=10)

    def ask(
        self,
        body: bytes,
        topic: str = "pithead/infer/demo",
        to: str | None = "answers/a",
        correlation: bytes = b"7",
        qos: int = 1,
        expiry: int | None = None,
        user: tuple[str, str] | None = None,
        *,
        retain: bool = False,
    ) -> None:
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if to is not None:
            properties.ResponseTopic = to
        properties.CorrelationData = correlation
        if expiry is not None:
            properties.MessageExpiryInterval = expiry
        if user is not None:
            properties.UserProperty = user
        self.client.publish(topic, body, qos=qos, retain=retain, properties=properties)

    def answer(self, timeout_s: float = 10.0) -> paho.MQTTMessage:
        try:
            return self.answers.get(timeout=timeout_s)
        except Empty:
            raise AssertionError("no answer") from None

    def end(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    started = Broker(tmp_path)
    yield started
    started.end()


@pytest.fixture
def asker(broker: Broker) -> Iterator[Asker]:
    one = Asker(broker)
    yield one
    one.end()


@pytest.fixture
def made(tmp_path: Path) -> Package:
    return package(tmp_path)


def spec(made: Package, broker: Broker, **changes: Any) -> ServeSpec:
    mqtt = ServeMqtt(port=broker.port, **changes)
    return ServeSpec(Serve(enabled=True, http_port=0, mqtt=mqtt), (model(made),))


def serving(engine: Engine, made: Package, broker: Broker, **changes: Any) -> Supervisor:
    """Return a supervisor whose engine answers by MQTT."""
    supervisor = engine.connect()
    supervisor.configure(serve=spec(made, broker, **changes))
    until_serves(supervisor, model(made), mqtt="connected")
    return supervisor


def body(made: Package) -> bytes:
    return json.dumps(question(made)).encode()


def users(message: paho.MQTTMessage) -> dict[str, str]:
    return dict(getattr(message.properties, "UserProperty", ()))


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_question_is_answered_where_it_says(
    engine: Engine, made: Package, broker: Broker, asker: Asker, qos: int
):
    serving(engine, made, broker, qos=qos)
    asker.ask(body(made), qos=qos, correlation=b"\x00\xff", expiry=60)
    found = asker.answer()
    assert (found.topic, found.qos) == ("answers/a", qos)
    assert found.properties is not None
    assert found.properties.CorrelationData == b"\x00\xff"
    assert found.properties.ContentType == "application/json"
    assert 0 < found.properties.MessageExpiryInterval <= 60
    said = json.loads(found.payload)
    assert (said["model_name"], said["model_version"]) == ("demo", "1.0.0")
    assert said["outputs"][0]["data"] == [1.0, 1.0, 1.0]


def test_tensors_come_and_go_in_binary(engine: Engine, made: Package, broker: Broker, asker: Asker):
    serving(engine, made, broker)
    raw = np.array([[0.5, 0.5, 0.5]], np.float32).tobytes()
    tensor = {"name": made.variant.inputs[0].name, "datatype": "FP32", "shape": [1, 3]}
    tensor["parameters"] = {"binary_data_size": len(raw)}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    asker.ask(head + raw, user=("Inference-Header-Content-Length", str(len(head))))
    found = asker.answer()
    assert found.properties is not None
    assert found.properties.ContentType == "application/octet-stream"
    length = int(users(found)["Inference-Header-Content-Length"])
    described = json.loads(found.payload[:length])["outputs"][0]
    assert described["parameters"] == {"binary_data_size": 12}
    assert np.frombuffer(found.payload[length:], np.float32).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("topic", "payload", "code"),
    [
        ("pithead/infer/demo", b"{", "serve.bad_request"),
        ("pithead/infer/demo", b"", "serve.bad_request"),
        ("pithead/infer/nobody", None, "serve.unknown_model"),
        ("pithead/infer/demo", b" " * (8 * 1024 * 1024 + 1), "serve.too_large"),
    ],
)
def test_what_cannot_be_answered_is_said_in_the_protocols_form(
    engine: Engine,
    made: Package,
    broker: Broker,
    asker: Asker,
    topic: str,
    payload: bytes | None,
    code: str,
):
    serving(engine, made, broker)
    asker.ask(body(made) if payload is None else payload, topic=topic)
    found = asker.answer(20)
    assert json.loads(found.payload)["error"].startswith(f"{code}: ")
    assert users(found)["error-code"] == code
    assert found.properties is not None
    assert found.properties.CorrelationData == b"7"


def test_limits_of_a_device_hold_for_its_broker_and_for_its_models(
    engine: Engine, made: Package, broker: Broker, asker: Asker
):
    rarely = {"rate": 0.001, "burst": 2}
    limits = {"clients": {"mqtt": Client(**rarely)}, "models": {"demo": ServedModel(**rarely | {"burst": 3})}}
    serve = Serve(enabled=True, http_port=0, mqtt=ServeMqtt(port=broker.port), **limits)
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(serve, (model(made),)))
    state = until_serves(supervisor, model(made), mqtt="connected")
    answers = []
    for _ in range(3):
        asker.ask(body(made))
        answers.append(asker.answer())
    assert [users(a).get("error-code", "") for a in answers] == ["", "", "serve.rate_limited"]
    assert json.loads(answers[2].payload)["error"].startswith("serve.rate_limited: client 'mqtt' may ask")
    assert [ask(state.url, made)[0] for _ in range(2)] == [200, 429]
    assert said_of(supervisor).errors == 0  # a limit says nothing of the model


def test_nobody_to_answer_to_is_counted(engine: Engine, made: Package, broker: Broker, asker: Asker):
    supervisor = serving(engine, made, broker)
    asker.ask(body(made), to=None)
    asker.ask(body(made), to="pithead/infer/demo")
    asker.ask(body(made))
    assert asker.answer().topic == "answers/a"

    def counted() -> bool:
        state = supervisor.serving
        return state is not None and state.mqtt_detail == "2 requests dropped"

    supervisor.until(counted, "both are counted")
    lines = [json.loads(line) for line in engine.log.splitlines()]
    told = [line for line in lines if line["event"] == "serving.message_dropped"]
    assert told[0]["why"] == "no response topic"
    assert told[0]["topic"] == "pithead/infer/demo"
    assert len(told) == 1, "a flood of them must not fill the log"


class Slow(Service):
    """A service whose model takes longer than a second."""

    def __init__(self) -> None:
        super().__init__([], Limits())
        self.timeouts: list[int] = []

    def submit(self, request: InferRequest, done: Done) -> None:
        self.timeouts.append(request.timeout_us)
        answer = InferResponse("demo", "1", {"y": np.zeros(1, np.float32)})
        asyncio.get_running_loop().call_later(1.2, done, answer)


def test_an_answer_that_comes_too_late_is_not_sent(made: Package, broker: Broker, asker: Asker):
    async def late() -> tuple[Counts, list[int]]:
        service, loop = Slow(), asyncio.get_running_loop()
        responder = Responder(ServeMqtt(port=broker.port), service, CLOCK)
        try:
            while responder.state != "connected":
                responder.tick(loop.time())
                await asyncio.sleep(0.01)
            asker.ask(body(made), expiry=1, correlation=b"late")
            asker.ask(body(made), expiry=60, correlation=b"in time")
            found = await loop.run_in_executor(None, asker.answer)
            assert found.properties is not None
            assert found.properties.CorrelationData == b"in time"
            assert found.properties.MessageExpiryInterval <= 59
            return responder.counts, service.timeouts
        finally:
            await responder.close()

    counts, timeouts = asyncio.run(late())
    assert (counts.expired, counts.dropped) == (1, 0)
    assert 0 < timeouts[0] <= 1_000_000, "it is not begun when it is too late"
    assert asker.answers.empty()


def test_more_than_may_be_under_way_is_refused_at_once(
    engine: Engine, made: Package, broker: Broker, asker: Asker
):
    serving(engine, made, broker, concurrency=1)
    for number in range(300):
        asker.ask(body(made), correlation=str(number).encode())
    found = [asker.answer() for _ in range(300)]
    codes = {users(message).get("error-code") for message in found}
    assert codes <= {None, "serve.overloaded"}
    assert None in codes, "some were answered"
    numbers = {m.properties.CorrelationData for m in found if m.properties is not None}
    assert numbers == {str(n).encode() for n in range(300)}, "each has its answer"
    asker.ask(body(made), correlation=b"after")
    assert users(asker.answer()) == {}, "its place is free again"


def test_many_are_answered_together(engine: Engine, made: Package, broker: Broker, asker: Asker):
    serving(engine, made, broker, concurrency=1000)
    for number in range(500):
        asker.ask(body(made), correlation=str(number).encode(), qos=number % 2)
    found = [asker.answer() for _ in range(500)]
    assert all(users(message) == {} for message in found)


def test_a_broker_that_goes_and_comes_is_found_again_and_rest_goes_on(
    engine: Engine, made: Package, tmp_path: Path
):
    broker = Broker(tmp_path)
    try:
        supervisor = serving(engine, made, broker)
    finally:
        broker.end()

    def failed() -> ServeState | None:
        state = supervisor.serving
        return state if state is not None and state.mqtt == "failed" else None

    state = supervisor.until(failed, "the broker is missed")
    assert str(broker.port) in state.mqtt_detail
    assert state.state == "listening"
    again = Broker(tmp_path, port=broker.port)
    try:
        until_serves(supervisor, model(made), mqtt="connected")
        asker = Asker(again)
        asker.ask(body(made))
        assert json.loads(asker.answer().payload)["model_name"] == "demo"
        asker.end()
    finally:
        again.end()


def test_credentials_are_given_and_their_lack_is_said(engine: Engine, made: Package, tmp_path: Path):
    passwords, file = tmp_path / "passwords", tmp_path / "credentials.toml"
    passwords.touch(mode=0o600)
    subprocess.run(
        ["mosquitto_passwd", "-b", "-c", passwords, "agent", "secret"], check=True, capture_output=True
    )
    broker = Broker(tmp_path, f"allow_anonymous false\npassword_file {passwords}")
    try:
        supervisor = engine.connect()
        supervisor.configure(serve=spec(made, broker))
        supervisor.until(
            lambda: (s := supervisor.serving) and s.mqtt == "failed" and "refused" in s.mqtt_detail.lower(),
            "the broker refuses",
        )
        file.write_text('username = "agent"\npassword = "secret"\n')
        supervisor.configure(serve=spec(made, broker, credentials_file=str(file)))
        until_serves(supervisor, model(made), mqtt="connected")
        file.unlink()
        missing = str(tmp_path / "nothing.toml")
        supervisor.configure(serve=spec(made, broker, credentials_file=missing))
        supervisor.until(
            lambda: (s := supervisor.serving) and "serve.mqtt.credentials_file" in s.mqtt_detail,
            "the missing file is named",
        )
    finally:
        broker.end()


@pytest.mark.parametrize(
    ("topic", "fits"),
    [
        ("answers/1", True),
        ("", False),
        ("$SYS/x", False),
        ("a/+", False),
        ("a/#", False),
        ("pithead/infer/demo", False),
        ("pithead/inferno", True),
        ("pithead/v1/press-0001/up/alerts", False),
        ("pithead/v1/press-0001/down/desired", False),
        ("x" * 1025, False),
    ],
)
def test_where_an_answer_may_go(topic: str, fits: bool):  # noqa: FBT001 - a table's column
    assert usable(topic, "pithead/infer") is fits


def test_answers_can_be_kept_to_a_place():
    assert [usable(topic, "p", "answers") for topic in ("answers/1", "answers", "answers2/1", "plc/set")] == [
        *(True, False, False, False)
    ]


class Odd(Service):
    """Answers what its model's name says."""

    def __init__(self) -> None:
        super().__init__([], Limits())

    def submit(self, request: InferRequest, done: Done) -> None:
        values = np.zeros(40_000 if request.model == "long" else 1, np.float32)
        answer: Any = object() if request.model == "odd" else InferResponse("demo", "1", {"y": values})
        done(answer)


def test_one_request_costs_no_other_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is retained, too large for the broker, or breaks something, is dealt with: its place is free."""
    where: dict[int, str] = {}
    decode = codec.decode

    def seen(*arguments: Any, **more: Any) -> Any:
        decoded = decode(*arguments, **more)
        where[len(arguments[2])] = threading.current_thread().name
        return decoded

    monkeypatch.setattr(codec, "decode", seen)
    broker = Broker(tmp_path, "allow_anonymous true\nmax_packet_size 100000")
    one = Asker(broker)
    small = b'{"inputs": []}'
    large = small + b" " * 70_000

    async def test() -> None:
        loop = asyncio.get_running_loop()
        one.ask(small, retain=True, correlation=b"retained")
        responder = Responder(ServeMqtt(port=broker.port, concurrency=1), Odd(), CLOCK)
        try:
            while responder.state != "connected" or not responder.counts.dropped:
                responder.tick(loop.time())
                await asyncio.sleep(0.01)
            for model, body, code in (
                ("odd", small, "internal.error"),
                ("long", small, "serve.too_large"),
                ("demo", large, ""),
                ("demo", small, ""),
            ):
                one.ask(body, f"pithead/infer/{model}")
                found = await loop.run_in_executor(None, one.answer)
                assert users(found).get("error-code", "") == code
            assert responder.counts.dropped == 1
        finally:
            await responder.close()

    try:
        asyncio.run(test())
    finally:
        one.end()
        broker.end()
    assert where[len(small)] == threading.main_thread().name
    assert where[len(large)] != where[len(small)]
