"""A real engine process that serves what slots hold, beside its lanes."""

import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest

from agent.core.serve_models import ServedModel
from agent.core.settings import Serve
from agent.engine.serve.tokens import new
from agent.ports import LaneState, ModelSpec, ServeSpec, ServeState
from contract.messages import ModelSummary
from models.dense import Layer, Network
from tests.engine.certificates import Identity
from tests.engine.conftest import (
    CHANNELS,
    Engine,
    Package,
    Supervisor,
    free_port,
    make_package,
    nan_network,
    network,
    samples,
    until,
    write_csv,
)
from tests.serve.grpc_client import Client, array, message


def constant(value: float) -> Network:
    """A network that gives ``value`` for everything."""
    width = len(CHANNELS)
    return Network((Layer(weights=np.zeros((width, width)), bias=np.full(width, value), relu=False),))


def large(width: int = 100_000) -> Network:
    """A network of about 3 MB."""
    inputs = len(CHANNELS)
    first = Layer(weights=np.zeros((width, inputs)), bias=np.zeros(width), relu=True)
    return Network((first, Layer(weights=np.zeros((inputs, width)), bias=np.ones(inputs), relu=False)))


def slow(width: int = 4000) -> Network:
    """A network of 64 MB that takes some 30 million multiplications a row."""
    rng = np.random.default_rng(3)
    inputs = len(CHANNELS)
    shapes = ((width, inputs), (width, width), (inputs, width))
    return Network(
        tuple(Layer(rng.normal(0, 0.01, shape), np.zeros(shape[0]), relu=False) for shape in shapes)
    )


def package(directory: Path, version: str = "1.0.0", net: Network | None = None) -> Package:
    return make_package(directory, kind="float32.onnx", version=version, net=net or constant(1.0))


def model(made: Package, activation: int = 1, **changes: Any) -> ModelSpec:
    spec = made.spec({})
    fields = {name: getattr(spec, name) for name in ModelSpec.__struct_fields__}
    return ModelSpec(**fields | {"activation": activation} | changes)


def only_served(made: Package) -> ModelSpec:
    """The same without a pipeline: there can be no lane of it."""
    manifest = msgspec.structs.replace(made.manifest, pipeline=None, score=None)
    text = msgspec.json.encode(manifest)
    digest = hashlib.sha256(text).hexdigest()
    path = made.manifest_path.with_name(digest)
    path.write_bytes(text)
    return model(made, digest=digest, manifest=str(path))


def settings(**changes: Any) -> Serve:
    return Serve(enabled=True, **({"http_port": 0} | changes))


def lane(made: Package, directory: Path) -> Any:
    path = write_csv(directory / "rows.csv", samples())
    return made.spec({"kind": "replay", "path": str(path), "rate_hz": 200.0, "loop": True}, activation=1)


def until_serves(supervisor: Supervisor, *models: ModelSpec, **more: Any) -> ServeState:
    """Wait until just these activations serve."""
    wanted = {(m.model_name, m.digest, m.activation) for m in models}

    def there() -> ServeState | None:
        state = supervisor.serving
        if (
            state is None
            or state.state != "listening"
            or any(getattr(state, k) != v for k, v in more.items())
        ):
            return None
        serving = {(m.model_name, m.digest, m.activation) for m in state.models if m.state == "running"}
        return state if serving == wanted else None

    try:
        found = supervisor.until(there, "the models serve")
    except AssertionError as error:
        raise AssertionError(f"{error}; last: {supervisor.serving}") from None
    assert isinstance(found, ServeState)
    return found


def said_of(supervisor: Supervisor, name: str = "demo") -> LaneState:
    state = supervisor.serving
    assert state is not None
    return next(m for m in state.models if m.model_name == name)


def connect(url: str) -> http.client.HTTPConnection:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=20)


def call(
    url: str, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    connection = connect(url)
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers=headers or {})
        answer = connection.getresponse()
        text = answer.read()
        return answer.status, json.loads(text) if text.startswith((b"{", b"[")) else text
    finally:
        connection.close()


def runs(url: str) -> bool:
    """Whether a request is in the model's hands."""
    return any(
        line.startswith(b"pithead_model_in_flight{") and not line.endswith(b" 0")
        for line in call(url, "GET", "/metrics")[1].splitlines()
    )


def question(made: Package, values: tuple[float, ...] = (0.5, 0.5, 0.5)) -> dict[str, Any]:
    (tensor,) = made.variant.inputs
    return {"inputs": [{"name": tensor.name, "datatype": "FP32", "shape": [1, 3], "data": list(values)}]}


def ask(url: str, made: Package, **more: Any) -> tuple[int, Any]:
    return call(url, "POST", "/v2/models/demo/infer", question(made), **more)


@dataclass
class Load:
    """Clients that ask all the time."""

    url: str
    body: bytes
    clients: int = 4
    seen: Counter[tuple[int, str, float]] = field(default_factory=Counter)
    by_grpc: Counter[tuple[int, str, float]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    grpc: str = ""
    """One more client asks there."""

    def start(self) -> "Load":
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.clients)]
        if self.grpc:
            self._threads.append(threading.Thread(target=self._ask_by_grpc))
        for thread in self._threads:
            thread.start()
        return self

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(20)

    def _ask(self) -> None:
        connection = connect(self.url)
        mine: Counter[tuple[int, str, float]] = Counter()
        try:
            while not self._end.is_set():
                connection.request("POST", "/v2/models/demo/infer", self.body)
                answer = connection.getresponse()
                said = json.loads(answer.read())
                value = said["outputs"][0]["data"][0] if answer.status == 200 else float("nan")
                mine[answer.status, said.get("model_version", str(said)), value] += 1
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.broken.append(repr(error))
        finally:
            connection.close()
            self.seen.update(mine)

    def _ask_by_grpc(self) -> None:
        (tensor,) = json.loads(self.body)["inputs"]
        said = message(np.array([tensor["data"]], np.float32), "demo", tensor["name"])
        try:
            with grpc.insecure_channel(self.grpc) as channel:
                client = Client(channel)
                while not self._end.is_set():
                    answer = client.infer(said)
                    self.by_grpc[200, answer.model_version, float(array(answer)[0, 0])] += 1
        except grpc.RpcError as error:
            self.broken.append(repr(error))


def test_swaps_in_both_directions_cost_no_request(engine: Engine, tmp_path: Path):
    old, fresh = package(tmp_path, "1.0.0", constant(1.0)), package(tmp_path, "2.0.0", constant(2.0))
    supervisor = engine.connect()
    first = model(old)
    both = settings(grpc_port=0)
    supervisor.configure(lane(old, tmp_path), serve=ServeSpec(both, (first,)))
    listening = until_serves(supervisor, first)
    load = Load(listening.url, json.dumps(question(old)).encode(), grpc=listening.grpc).start()
    try:
        for activation in range(2, 14):
            spec = model(fresh if activation % 2 == 0 else old, activation)
            supervisor.configure(lane(old, tmp_path), serve=ServeSpec(both, (spec,)))
            until_serves(supervisor, spec)
    finally:
        load.end()
    assert not load.broken, load.broken
    assert set(load.seen) == set(load.by_grpc) == {(200, "1.0.0", 1.0), (200, "2.0.0", 2.0)}
    asked = sum(load.seen.values()) + sum(load.by_grpc.values())
    assert asked > 500
    state = supervisor.state()
    assert state is not None
    assert (state.state, state.activation) == ("running", 1), "the lane was left alone"
    supervisor.until(lambda: sum(s.count for s in served(supervisor)) == asked, "all are counted")
    by_version = {(s.version, s.activation) for s in served(supervisor) if s.count}
    assert {v for v, _ in by_version} == {"1.0.0", "2.0.0"}
    assert len(by_version) > 2


def served(supervisor: Supervisor) -> list[ModelSummary]:
    return [s for s in supervisor.summaries if s.source == "serve"]


def test_what_an_old_version_answers_long_after_the_swap_is_counted(engine: Engine, tmp_path: Path):
    old, fresh = package(tmp_path, "1.0.0", slow()), package(tmp_path, "2.0.0")
    first, second = model(old), model(fresh, 2)
    supervisor = engine.connect()
    supervisor.configure(bucket_s=0.05, serve=ServeSpec(settings(), (first,)))
    url = until_serves(supervisor, first).url
    rows = 1000
    body = question(old, (0.5, 0.5, 0.5) * rows)
    body["inputs"][0]["shape"] = [rows, 3]
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(
        target=lambda: answers.append(call(url, "POST", "/v2/models/demo/infer", body)), daemon=True
    )
    asking.start()
    supervisor.until(lambda: runs(url), "it runs")
    supervisor.configure(bucket_s=0.05, serve=ServeSpec(settings(), (second,)))
    until_serves(supervisor, second)
    asking.join(20)
    assert [(status, said["model_version"]) for status, said in answers] == [(200, "1.0.0")]
    supervisor.until(lambda: [s.version for s in served(supervisor) if s.count] == ["1.0.0"], "it is counted")


def test_kept_answers_count_as_answers_but_not_as_latencies_and_end_with_their_activation(
    engine: Engine, tmp_path: Path
):
    kept = settings(models={"demo": ServedModel(cache_mb=1, max_batch=1)})
    old, new = package(tmp_path, "1.0.0"), package(tmp_path, "1.0.1", constant(2.0))
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(kept, (model(old),)), bucket_s=3600.0)
    url = until_serves(supervisor, model(old)).url
    answers = [ask(url, old) for _ in range(20)]
    supervisor.configure(serve=ServeSpec(kept, (model(new, 2),)), bucket_s=3600.0)
    until_serves(supervisor, model(new, 2))
    answers += [ask(url, new) for _ in range(5)]
    supervisor.configure(serve=ServeSpec(kept, (model(new, 3),)), bucket_s=3600.0)
    until_serves(supervisor, model(new, 3))
    answers += [ask(url, new) for _ in range(5)]
    assert [(status, said["outputs"][0]["data"][0]) for status, said in answers] == [(200, 1.0)] * 20 + [
        (200, 2.0)
    ] * 10
    supervisor.configure(serve=ServeSpec(kept, (model(new, 3),)), bucket_s=1800.0)
    supervisor.until(lambda: sum(s.count for s in served(supervisor)) == 30, "all are counted")
    found = {s.activation: s for s in served(supervisor) if s.count}
    assert {a: s.count for a, s in found.items()} == {1: 20, 2: 5, 3: 5}
    assert [s.latency_us.count for s in found.values() if s.latency_us is not None] == [1, 1, 1]
    assert not any(s.errors for s in found.values())


def test_a_model_without_a_pipeline_is_served_and_counted(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec = only_served(made)
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(), (spec,)))
    url = until_serves(supervisor, spec).url
    assert call(url, "GET", "/v2/health/ready")[0] == 200
    status, said = call(url, "GET", "/v2/models/demo")
    assert (status, said["versions"], said["platform"]) == (200, ["1.0.0"], "onnxruntime_onnx")
    assert ask(url, made)[0] == 200
    assert call(url, "POST", "/v2/models/demo/infer", {"inputs": []})[0] == 400
    found = supervisor.until(lambda: [s for s in served(supervisor) if s.count], "a summary")[0]
    assert (found.count, found.errors, found.version, found.activation) == (1, 0, "1.0.0", 1)
    assert (found.variant, found.accelerator, found.score) == ("v", "cpu", None)
    assert found.latency_us is not None
    assert found.latency_us.count == 1
    assert 0 < found.latency_us.maximum < 1e6
    supervisor.until(lambda: said_of(supervisor).windows == 1, "the state counts it")
    assert said_of(supervisor).errors == 0, "a bad request is not the model's fault"


def test_what_cannot_be_loaded_leaves_the_old_one_in_service(engine: Engine, tmp_path: Path):
    old, bad = package(tmp_path, "1.0.0"), package(tmp_path, "2.0.0", constant(2.0))
    Path(bad.files["model.onnx"]).write_bytes(b"not what was signed")
    supervisor = engine.connect()
    first, second = model(old), model(bad, 2)
    supervisor.configure(serve=ServeSpec(settings(), (first,)))
    url = until_serves(supervisor, first).url
    supervisor.configure(serve=ServeSpec(settings(), (second,)))
    supervisor.until(lambda: said_of(supervisor).state == "failed", "the new one fails")
    state = said_of(supervisor)
    assert state.code == "package.file_mismatch"
    assert (state.digest, state.activation) == (old.digest, 1)
    assert (state.wanted_digest, state.wanted_activation) == (bad.digest, 2)
    assert ask(url, old)[1]["model_version"] == "1.0.0"
    assert call(url, "GET", "/v2/health/ready")[0] == 200
    supervisor.configure(serve=ServeSpec(settings(), (first,)))
    until_serves(supervisor, first)
    supervisor.until(
        lambda: [v["state"] for v in call(url, "POST", "/v2/repository/index")[1]] == ["READY"],
        "nothing is left of the other",
    )


def test_the_listener_moves_and_ends_and_no_lane_notices(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    running, spec = lane(made, tmp_path), model(made)
    supervisor = engine.connect()
    supervisor.configure(running)
    supervisor.until_state(state="running")
    assert supervisor.serving is None
    supervisor.configure(running, serve=ServeSpec(settings(), (spec,)))
    first = until_serves(supervisor, spec).url
    port = free_port()
    supervisor.configure(running, serve=ServeSpec(settings(http_port=port), (spec,)))
    second = until_serves(supervisor, spec, url=f"http://127.0.0.1:{port}").url
    assert ask(second, made)[0] == 200
    with pytest.raises(OSError, match="refused"):
        ask(first, made)
    supervisor.configure(running)

    def gone() -> bool:
        try:
            call(second, "GET", "/v2")
        except OSError:
            return True
        return False

    until(gone, "the listener is gone")
    windows = supervisor.until_state(state="running").windows
    supervisor.until(lambda: (s := supervisor.state()) and s.windows > windows, "the lane goes on")
    states = [m for m in supervisor.messages if isinstance(m, LaneState) and m.lane == "one"]
    scored = [s.windows for s in states if s.state == "running"]
    assert scored == sorted(scored), "no session of the lane began anew"
    assert states[-1].state == "running"


def test_a_port_that_is_taken_is_said_and_tried_again(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec = model(made)
    supervisor = engine.connect()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wanted = ServeSpec(settings(http_port=port), (spec,))
        supervisor.configure(lane(made, tmp_path), serve=wanted)
        supervisor.until(lambda: (s := supervisor.serving) and s.state == "failed", "serving fails")
        state = supervisor.serving
        assert state is not None
        assert state.code == "config.invalid"
        assert str(port) in state.detail
        assert [m.state for m in state.models] == ["loading"]
        supervisor.until_state(state="running")
    assert ask(until_serves(supervisor, spec).url, made)[0] == 200


def test_a_lane_that_fails_leaves_serving_alone(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec = model(made)
    supervisor = engine.connect()
    broken = made.spec({"kind": "replay", "path": str(tmp_path / "nothing.csv")})
    supervisor.configure(broken, serve=ServeSpec(settings(), (spec,)))
    supervisor.until_state(state="failed")
    assert ask(until_serves(supervisor, spec).url, made)[0] == 200


def test_the_fleet_decides_what_is_served(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec = model(made)
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(), (spec,)))
    url = until_serves(supervisor, spec).url
    for act in ("load", "unload"):
        status, said = call(url, "POST", f"/v2/repository/models/demo/{act}", {})
        assert (status, said["error"].split(":")[0]) == (409, "serve.conflict")
    assert ask(url, made)[0] == 200
    supervisor.configure(serve=ServeSpec(settings()))
    until_serves(supervisor)
    assert ask(url, made)[0] == 404
    supervisor.configure(serve=ServeSpec(settings(), (spec,)))
    until_serves(supervisor, spec)
    assert ask(url, made)[0] == 200


def test_numbers_that_are_none_speak_against_a_model(engine: Engine, tmp_path: Path):
    made = package(tmp_path, net=nan_network(len(CHANNELS)))
    spec = model(made)
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(), (spec,)))
    url = until_serves(supervisor, spec).url
    for _ in range(3):
        ask(url, made)
    supervisor.until(lambda: said_of(supervisor).errors == 3, "errors")
    assert said_of(supervisor).windows == 0
    supervisor.until(lambda: sum(s.errors for s in served(supervisor)) == 3, "they are reported")


def test_tokens_are_asked_for_and_may_change_meanwhile(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec, file = model(made), tmp_path / "tokens"
    (first, line), (second, other) = new("a", "infer"), new("b", "infer")
    file.write_text(line + "\n")
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(token_file=str(file)), (spec,)))
    url = until_serves(supervisor, spec).url

    def status(token: str | None) -> int:
        return ask(url, made, headers={} if token is None else {"Authorization": f"Bearer {token}"})[0]

    assert [status(t) for t in (None, first, second)] == [401, 200, 401]
    file.write_text(other + "\n")
    until(lambda: status(second) == 200, "the new token is known")
    assert status(first) == 401


def test_a_budget_lets_the_idle_model_leave_and_come_back(engine: Engine, tmp_path: Path):
    made = package(tmp_path, net=large())
    one, two = model(made), model(made, model_name="other")
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(), (one,)))
    until_serves(supervisor, one)
    supervisor.configure(serve=ServeSpec(settings(memory_budget_mb=1), (one, two)))
    url = until_serves(supervisor, one, two).url
    for _ in range(3):
        assert ask(url, made)[0] == 200
        assert call(url, "POST", "/v2/models/other/infer", question(made))[0] == 200
    assert call(url, "GET", "/v2/health/ready")[0] == 200
    figures = call(url, "GET", "/metrics")[1].decode().splitlines()
    loads = next(int(line.split()[1]) for line in figures if line.startswith("pithead_model_loads_total "))
    assert loads > 2, "one had left"


def test_the_last_counts_are_reported_when_the_engine_ends(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec = model(made)
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(), (spec,)), bucket_s=3600.0)
    url = until_serves(supervisor, spec).url
    assert [ask(url, made)[0] for _ in range(5)] == [200] * 5
    began = time.monotonic()
    engine.process.terminate()
    supervisor.until(lambda: served(supervisor), "a last summary")
    supervisor.stored(supervisor.products[-1].n)
    assert engine.process.wait(10) == 0
    assert time.monotonic() - began < 8
    assert sum(s.count for s in served(supervisor)) == 5


def test_an_engine_that_serves_nobody_holds_nothing_of_it(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    supervisor = engine.connect()
    supervisor.configure(lane(made, tmp_path))
    supervisor.until_state(state="running")

    def mapped() -> set[str]:
        maps = Path(f"/proc/{engine.process.pid}/maps").read_text()
        return {name for name in ("httptools", "uvloop", "grpc") if f"/{name}/" in maps}

    assert mapped() == set()
    supervisor.configure(lane(made, tmp_path), serve=ServeSpec(settings(), (spec := model(made),)))
    until_serves(supervisor, spec)
    assert "httptools" in mapped()
    assert "grpc" not in mapped()


def test_an_int8_model_takes_real_values(engine: Engine, tmp_path: Path):
    made = make_package(tmp_path, kind="int8.tflite", net=network(len(CHANNELS)))
    spec = model(made)
    supervisor = engine.connect()
    supervisor.configure(serve=ServeSpec(settings(), (spec,)))
    status, said = ask(until_serves(supervisor, spec).url, made)
    assert status == 200, said
    assert said["outputs"][0]["datatype"] == "FP32"


def test_a_certificate_that_is_renewed_is_shown_without_a_new_order(engine: Engine, tmp_path: Path):
    made = package(tmp_path)
    spec = model(made)
    own = Identity(tmp_path, "tls")
    cert, key = own.certificate, own.key
    renewed = tmp_path / "renewed"
    renewed.mkdir()
    other = Identity(renewed, "tls")
    later = other.certificate, other.key
    supervisor = engine.connect()
    tls = settings(http_port=free_port(), tls_certificate_file=str(cert), tls_key_file=str(key))
    supervisor.configure(serve=ServeSpec(tls, (spec,)))
    url = until_serves(supervisor, spec).url
    assert url.startswith("https://127.0.0.1:")

    def shown() -> str:
        try:
            return ssl.get_server_certificate(("127.0.0.1", tls.http_port), timeout=5)
        except OSError:
            return ""

    assert shown() == cert.read_text()
    for new_file, path in zip(later, (cert, key), strict=True):
        new_file.replace(path)
    until(lambda: shown() == cert.read_text(), "the new one is shown")
