"""The server over gRPC as a client sees it: statuses, limits, access, streams; a real process each time."""

import gzip
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.engine.serve import tokens
from agent.engine.serve.proto.messages import CALLS, CLASSES, SERVICE, health
from tests.serve import models
from tests.serve.conftest import Served, start, until
from tests.serve.grpc_client import ONE, Client, array, client, message
from tests.serve.test_grpc_codec import flips

pytestmark = [pytest.mark.xdist_group("serve-grpc")]

Code = grpc.StatusCode
ADDED_MIB = 10


@pytest.fixture(scope="module")
def served(model_directory: Path, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("grpc") / "serve.log"
    running = start(model_directory, log, "--grpc-port", "0", "--max-body-mb", "2", cache=cache)
    until(running.ready, "all models are loaded")
    yield running
    assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def c(served: Served) -> Iterator[Client]:
    with client(served.grpc_port) as made:
        yield made


def test_the_same_answer_as_over_rest(served: Served, c: Client):
    body = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 64], "data": ONE.tolist()}]}
    answer = c.infer(message(id="seven"))
    assert np.array_equal(array(answer), served.infer("autoencoder", body).array())
    assert (answer.model_name, answer.model_version, answer.id) == ("autoencoder", "1", "seven")
    assert served.metric('pithead_grpc_responses_total{code="OK"}') >= 1


def test_health(served: Served, c: Client):
    assert c.ask("ServerLive").live
    assert c.ask("ServerReady").ready
    assert c.ask("ModelReady", name="add_sub", version="3").ready
    assert not c.ask("ModelReady", name="nothing").ready
    path, request, response = health()
    ask = c.channel.unary_unary(path, request.SerializeToString, response.FromString)
    found = [ask(request(service=name)).status for name in ("", "autoencoder", "nothing")]
    assert found == [1, 1, 3]


def test_kserves_form_of_load_and_unload(c: Client):
    # Its field 1 is the model's name, where Triton's is the repository's.
    done = c.ask("RepositoryModelUnload", repository_name="mean_over_rows")
    assert (done.model_name, done.isUnloaded) == ("mean_over_rows", True)
    assert not c.ask("ModelReady", name="mean_over_rows").ready
    assert c.ask("RepositoryModelLoad", repository_name="mean_over_rows").isLoaded
    assert c.ask("ModelReady", name="mean_over_rows").ready


def test_statuses(c: Client):
    c.refused(message(model="nothing"), Code.NOT_FOUND, "nothing")
    c.refused(message(model_version="9"), Code.NOT_FOUND, "version")
    c.refused(message(ONE[:, :5].copy()), Code.INVALID_ARGUMENT, "input 'input': shape")
    c.refused(message(name="x"), Code.INVALID_ARGUMENT, "inputs")
    c.refused(message(model=""), Code.INVALID_ARGUMENT, "model_name")
    c.refused(b"\xff\xff", Code.INVALID_ARGUMENT, "no ModelInferRequest")
    c.refused(b"\xff\xff", Code.INVALID_ARGUMENT, "no ModelReadyRequest", call="ModelReady")
    index = CLASSES["ModelInferRequest"](model_name="gather")
    index.inputs.add(name="i", datatype="INT64", shape=[1]).contents.int64_contents.append(99)
    c.refused(index, Code.INVALID_ARGUMENT, "run_failed")
    for name in ("Status", "Register", "Unregister"):
        c.refused(b"", Code.UNIMPLEMENTED, "CUDA", call=f"CudaSharedMemory{name}")
    c.refused(b"", Code.INVALID_ARGUMENT, "model_name", call="RepositoryModelLoad")
    load = CLASSES["RepositoryModelLoadRequest"](model_name="autoencoder")
    load.parameters["file:1/model.onnx"].bytes_param = b"x"
    c.refused(load, Code.INVALID_ARGUMENT, "parameters.file", call="RepositoryModelLoad")
    trace = CLASSES["TraceSettingRequest"]()
    trace.settings["trace_rate"].value.append("often")
    c.refused(trace, Code.INVALID_ARGUMENT, "trace_rate", call="TraceSetting")
    with pytest.raises(grpc.RpcError) as caught:
        c.channel.unary_unary(f"/{SERVICE}/Nothing")(b"", timeout=10)
    assert caught.value.code() is Code.UNIMPLEMENTED


def test_long_and_foreign_words_fit_into_a_header(c: Client):
    name = "é☃" * 5000
    error = c.refused(message(model=name), Code.NOT_FOUND, "é☃")
    assert len(error.details()) <= 500


def test_a_message_that_is_too_large(served: Served, c: Client):
    x = np.zeros((20_000, 64), np.float32)
    c.refused(message(x), Code.RESOURCE_EXHAUSTED)
    c.infer(message(x[:5000]))


def test_compression(c: Client):
    want = array(c.infer(message(np.zeros((50, 64), np.float32))))
    for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        got = c.infer(message(np.zeros((50, 64), np.float32)), compression=algorithm)
        assert np.array_equal(array(got), want)


def test_a_message_that_inflates_beyond_the_limit(served: Served, c: Client):
    before = served.metric("process_resident_memory_bytes")
    bomb = np.zeros((4_000_000, 64), np.float32)[:300_000]  # 77 MB, some 75 kB in gzip
    assert len(gzip.compress(bomb.tobytes())) < 200_000
    c.refused(message(bomb), Code.RESOURCE_EXHAUSTED, compression=grpc.Compression.Gzip)
    assert served.metric("process_resident_memory_bytes") - before < 40e6
    c.infer()


def test_deadline_of_the_call(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1024, layers=60))
    served = starts(tmp_path / "slow.onnx", "--max-batch", "1", "--grpc-port", "0")
    until(served.ready, "the model is loaded")
    said = message(np.ones((1, 4), np.float32), "slow", "x")
    with client(served.grpc_port) as c:
        c.infer(said)
        calls = [
            c.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(said.SerializeToString(), timeout=0.05)
            for _ in range(8)
        ]
        assert Code.DEADLINE_EXCEEDED in {call.code() for call in calls}
        said.parameters["timeout"].int64_param = 1
        calls = [
            c.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(said.SerializeToString(), timeout=20)
            for _ in range(4)
        ]
        codes = {call.code() for call in calls}
        assert codes <= {Code.OK, Code.DEADLINE_EXCEEDED}
        assert Code.DEADLINE_EXCEEDED in codes
        runs = served.metric('pithead_inference_runs_total{model="slow",version="1"}')
        assert runs < 13, "what nobody waits for is not run"


def test_overload_is_told(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1024, layers=40))
    served = starts(tmp_path / "slow.onnx", "--max-batch", "1", "--max-queue", "2", "--grpc-port", "0")
    until(served.ready, "the model is loaded")
    said = message(np.ones((1, 4), np.float32), "slow", "x").SerializeToString()
    with client(served.grpc_port) as c:
        ask = c.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        calls = [ask.future(said, timeout=20) for _ in range(20)]
        codes = [call.code() for call in calls]
        assert set(codes) == {Code.OK, Code.UNAVAILABLE}, codes
        refused = next(call for call in calls if call.code() is Code.UNAVAILABLE)
        assert "serve.overloaded" in refused.details()
        assert dict(refused.trailing_metadata())["grpc-retry-pushback-ms"]


def test_tokens(starts: Callable[..., Served], model_directory: Path, tmp_path: Path):
    (infer, first), (admin, second) = tokens.new("line", "infer"), tokens.new("boss", "admin")
    (tmp_path / "tokens").write_text(f"{first}\n{second}\n")
    arguments = ("--token-file", str(tmp_path / "tokens"), "--grpc-port", "0")
    served = starts(model_directory / "autoencoder.onnx", *arguments)
    line, boss = ([("authorization", f"Bearer {token}")] for token in (infer, admin))
    trace = CLASSES["TraceSettingRequest"]()
    trace.settings["trace_rate"].value.append("9")
    with client(served.grpc_port) as c:
        until(lambda: c.call("ServerReady", metadata=line).ready, "the model is loaded")
        assert array(c.infer(metadata=line)).shape == (1, 64)
        for call in CALLS:
            c.refused(b"", Code.UNAUTHENTICATED, "auth.missing", call=call)
        wrong = [("authorization", "Bearer ps1.wrong")]
        c.refused(message(), Code.UNAUTHENTICATED, "auth.invalid", metadata=wrong)
        with pytest.raises(grpc.RpcError) as caught:
            list(c.stream([message().SerializeToString()]))
        assert caught.value.code() is Code.UNAUTHENTICATED
        for said, call in ((trace, "TraceSetting"), (b"", "SystemSharedMemoryRegister")):
            c.refused(said, Code.PERMISSION_DENIED, "line", call=call, metadata=line)
        assert c.call("TraceSetting", metadata=line).settings["trace_rate"].value == ["1000"]
        assert c.call("TraceSetting", trace, metadata=boss).settings["trace_rate"].value == ["9"]


def test_tls(starts: Callable[..., Served], model_directory: Path, tmp_path: Path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "1", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        check=True,
        capture_output=True,
    )
    arguments = ("--tls-cert", str(certificate), "--tls-key", str(key), "--grpc-port", "0")
    served = starts(model_directory / "autoencoder.onnx", *arguments)
    with client(served.grpc_port, grpc.ssl_channel_credentials(certificate.read_bytes())) as c:
        until(lambda: c.ask("ServerReady").ready, "the model is loaded")
        assert array(c.infer()).shape == (1, 64)
    with client(served.grpc_port) as c:
        c.refused(message(), Code.UNAVAILABLE, timeout=10)


def test_a_port_that_is_taken(model_directory: Path, served: Served):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "agent", "serve", str(model_directory), "--http-port", "0"),
            *("--grpc-port", str(served.grpc_port)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert "gRPC cannot listen" in done.stderr


def test_memory_and_only_when_asked_for(starts: Callable[..., Served], model_directory: Path):
    def resident(served: Served) -> float:
        until(served.ready, "the model is loaded")
        return served.metric("process_resident_memory_bytes") / 2**20

    plain = starts(model_directory / "autoencoder.onnx")
    both = starts(model_directory / "autoencoder.onnx", "--grpc-port", "0")
    assert "cygrpc" not in Path(f"/proc/{plain.process.pid}/maps").read_text()
    until(both.ready, "the model is loaded")
    with client(both.grpc_port) as c:
        for _ in range(300):
            c.infer()
    assert resident(both) - resident(plain) <= ADDED_MIB


# ---- streams


def test_a_stream_answers_in_order_and_outlives_errors(c: Client):
    def said() -> Iterator[bytes]:
        for i in range(300):
            model = "nothing" if i == 7 else "autoencoder"
            made = message(ONE * i, model, id=str(i))
            made.parameters["triton_enable_empty_final_response"].bool_param = i % 2 == 0
            yield made.SerializeToString() if i != 9 else b"\xff\xff"

    answers = list(c.stream(said()))
    assert len(answers) == 300
    for i, answer in enumerate(answers):
        if i == 9:
            assert "no ModelInferRequest" in answer.error_message
            continue
        assert answer.infer_response.id == str(i)
        assert ("nothing" in answer.error_message) == (i == 7)
        if i != 7:
            final = answer.infer_response.parameters
            assert (final["triton_final_response"].bool_param if final else None) == (i % 2 == 0 or None)
    assert np.allclose(
        array(answers[3].infer_response), array(c.infer(message(ONE * 3))), rtol=1e-4, atol=1e-5
    )


def test_a_strict_stream_ends_with_the_status(c: Client):
    said = [message().SerializeToString(), message(model="nothing").SerializeToString()]
    got = c.stream([*said, said[0]], [("triton_grpc_error", "true")])
    assert array(next(got).infer_response).shape == (1, 64)
    with pytest.raises(grpc.RpcError) as caught:
        next(got)
    assert caught.value.code() is Code.NOT_FOUND


@pytest.mark.alone
def test_streams_that_are_not_read_hold_back_and_are_let_go(
    starts: Callable[..., Served], model_directory: Path
):
    arguments = ("--grpc-port", "0", "--client-timeout-s", "2", "--max-connections", "3")
    served = starts(model_directory / "autoencoder.onnx", *arguments)
    until(served.ready, "the model is loaded")
    sent = [0, 0, 0]
    data = message(np.zeros((400, 64), np.float32)).SerializeToString()

    def said(i: int) -> Iterator[bytes]:
        while True:
            sent[i] += 1
            yield data

    with client(served.grpc_port) as deaf, client(served.grpc_port) as c:
        ask = deaf.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
        held = [ask(said(i)) for i in range(3)]
        until(lambda: all(n > 1 for n in sent), "all send")
        c.refused(message(), Code.UNAVAILABLE, "calls are open")
        until(lambda: answered(c), "they are let go", 20)
        assert max(sent) < 2000
        for call in held:
            call.cancel()


def answered(c: Client) -> bool:
    try:
        c.infer()
    except grpc.RpcError as error:
        assert error.code() is Code.UNAVAILABLE  # noqa: PT017 - polled
        return False
    return True


# ---- clients that are slow, many or wrong


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def opening(port: int, path: str, streams: int) -> socket.socket:
    """Calls whose headers come, and whose messages never do."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    head = b"".join(
        literal(*pair)
        for pair in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", path.encode()),
            (b":authority", b"x"),
            (b"content-type", b"application/grpc"),
            (b"te", b"trailers"),
        )
    )
    sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b""))
    for i in range(streams):
        sock.sendall(frame(1, 4, 2 * i + 1, head))
    return sock


def test_calls_whose_message_never_comes_are_let_go(starts: Callable[..., Served], model_directory: Path):
    arguments = ("--grpc-port", "0", "--client-timeout-s", "2", "--max-connections", "20")
    served = starts(model_directory / "autoencoder.onnx", *arguments)
    until(served.ready, "the model is loaded")
    with opening(served.grpc_port, f"/{SERVICE}/ModelInfer", 20) as sock, client(served.grpc_port) as c:
        until(lambda: not answered(c), "all places are taken")
        until(lambda: answered(c), "the calls are let go", 15)
        sock.settimeout(10)
        seen = b""
        while b"did not arrive in time" not in seen:
            got = sock.recv(4096)
            assert got
            seen += got
    assert served.metric('pithead_grpc_responses_total{code="DEADLINE_EXCEEDED"}') == 20


def test_connections_beyond_the_limit(starts: Callable[..., Served], model_directory: Path):
    served = starts(model_directory / "autoencoder.onnx", "--grpc-port", "0", "--max-connections", "5")
    until(served.ready, "the model is loaded")
    held = [opening(served.grpc_port, "/x", 1) for _ in range(5)]
    with client(served.grpc_port) as c:
        c.refused(message(), Code.UNAVAILABLE, timeout=5)
    for sock in held:
        sock.close()

    def free() -> bool:
        with client(served.grpc_port) as c:
            try:
                return c.infer().model_name == "autoencoder"
            except grpc.RpcError:
                return False

    until(free, "others get in")


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    call=st.sampled_from([name for name in CALLS if "Load" not in name and "Unload" not in name]),
    base=st.booleans(),
    data=st.binary(max_size=120),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3),
)
def test_whatever_comes_is_never_an_internal_error(
    c: Client, call: str, base: Any, data: bytes, changes: list[tuple[int, int]]
):
    said = flips(message(id="x").SerializeToString(), changes) if base else data
    try:
        c.call(call, said)
    except grpc.RpcError as error:
        seen = error.code()
    else:
        seen = Code.OK
    assert seen in {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.ALREADY_EXISTS}
    if seen is not Code.OK:
        c.infer()


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.binary(max_size=200), st.booleans())
def test_bytes_that_are_not_http2(served: Served, data: bytes, preface: Any):
    start_ = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if preface else b""
    with socket.create_connection(("127.0.0.1", served.grpc_port), timeout=10) as sock:
        sock.sendall(start_ + data)
    assert served.ready()


def test_it_ends_after_the_calls_that_it_has_taken(starts: Callable[..., Served], tmp_path: Path):
    (tmp_path / "slow.onnx").write_bytes(models.slow(width=1024, layers=200))
    served = starts(tmp_path / "slow.onnx", "--grpc-port", "0")
    until(served.ready, "the model is loaded")
    said = message(np.ones((1, 4), np.float32), "slow", "x").SerializeToString()
    more = threading.Event()

    def streamed() -> Iterator[bytes]:
        yield said
        more.wait(20)

    with client(served.grpc_port) as c:
        got = c.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(streamed())
        call = c.channel.unary_unary(f"/{SERVICE}/ModelInfer").future(said, timeout=20)
        until(lambda: served.metric('pithead_model_in_flight{model="slow",version="1"}') >= 2, "both run")
        began = time.monotonic()
        served.process.terminate()
        assert call.code() is Code.OK
        assert CLASSES["ModelStreamInferResponse"].FromString(next(got)).infer_response.model_name == "slow"
        with pytest.raises(grpc.RpcError) as caught:
            next(got)
        assert caught.value.code() is Code.UNAVAILABLE
        more.set()
        assert served.stop() == 0
        assert time.monotonic() - began < 4, "an open stream does not hold it up"
