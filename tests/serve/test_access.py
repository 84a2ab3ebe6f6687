"""Who may ask: tokens, roles, TLS, and that nobody listens beyond loopback by accident."""

import http.client
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from agent.engine.serve import tokens
from contract.errors import PitheadError
from tests.serve import models
from tests.serve.conftest import Served, tensor, until

EVERYWHERE = "0.0.0.0"  # noqa: S104 - that it is not taken lightly is tested
BODY = {"inputs": [tensor("input", "FP32", np.ones((1, models.WIDTH), np.float32))]}


@pytest.fixture
def token_file(tmp_path: Path) -> tuple[Path, str, str]:
    (infer, first), (admin, second) = tokens.new("line", "infer"), tokens.new("boss", "admin")
    path = tmp_path / "tokens"
    path.write_text(f"# tokens\n\n{first}\n{second}\n")
    return path, infer, admin


def test_tokens_and_roles(
    starts: Callable[..., Served], model_directory: Path, token_file: tuple[Path, str, str]
):
    path, infer, admin = token_file
    served = starts(model_directory / "autoencoder.onnx", "--token-file", str(path))

    def ask(method: str, target: str, token: str | None, body: object = None) -> int:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return served.ask(method, target, body, headers).status

    until(lambda: ask("GET", "/v2/health/ready", infer) == 200, "the model is loaded")
    target = "/v2/models/autoencoder/infer"
    assert ask("POST", target, None, BODY) == 401
    assert ask("POST", target, "ps1.wrong", BODY) == 401
    assert served.ask("POST", target, BODY, {"Authorization": f"Basic {infer}"}).status == 401
    assert ask("POST", target, infer, BODY) == 200
    assert ask("GET", "/metrics", None) == 401
    assert ask("GET", "/v2/nothing", None) == 401
    load = "/v2/repository/models/autoencoder/load"
    assert ask("POST", load, infer) == 403
    assert ask("POST", load, admin) == 200
    assert ask("POST", "/v2/logging", infer, {}) == 403
    assert ask("POST", "/v2/systemsharedmemory/region/x/register", infer, {}) == 403
    assert ask("POST", "/v2/systemsharedmemory/unregister", admin) == 200


def test_beyond_loopback_tokens_are_required(model_directory: Path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "agent",
            "serve",
            str(model_directory),
            "--host",
            EVERYWHERE,
            "--http-port",
            "0",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, "--token-file" in done.stderr) == (2, True)


def test_beyond_loopback_there_is_no_shared_memory(
    starts: Callable[..., Served], model_directory: Path, token_file: tuple[Path, str, str]
):
    path, _, admin = token_file
    served = starts(model_directory / "autoencoder.onnx", "--host", EVERYWHERE, "--token-file", str(path))
    reply = served.ask(
        "POST",
        "/v2/systemsharedmemory/region/x/register",
        {"key": "/x", "byte_size": 1},
        {"Authorization": f"Bearer {admin}"},
    )
    assert (reply.status, "loopback" in reply.error) == (400, True)


def certify(folder: Path) -> tuple[Path, Path]:
    """Make a certificate and its key; those that are there are overwritten."""
    certificate, key = folder / "c.pem", folder / "k.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def test_tls(starts: Callable[..., Served], model_directory: Path, tmp_path: Path):
    certificate, key = certify(tmp_path)
    served = starts(
        model_directory / "autoencoder.onnx", "--tls-cert", str(certificate), "--tls-key", str(key)
    )
    context = ssl.create_default_context(cafile=str(certificate))

    def live() -> bool:
        connection = http.client.HTTPSConnection("localhost", served.port, timeout=10, context=context)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        finally:
            connection.close()

    until(live, "it is ready over TLS")
    plain = http.client.HTTPConnection("127.0.0.1", served.port, timeout=10)
    plain.request("GET", "/v2")
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.getresponse()
    plain.close()
    assert live()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no token"),
        ("abc name", "line 1"),
        ("ab name", "line 1"),
        ("0" * 64 + " name king", "line 1"),
        ("0" * 64, "line 1"),
    ],
)
def test_token_files_that_cannot_be_read(tmp_path: Path, text: str, words: str):
    path = tmp_path / "tokens"
    path.write_text(text)
    with pytest.raises(PitheadError, match=words):
        tokens.read(path)


def test_new_tokens(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "agent", "serve", "--new-token", "line 3"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    path = tmp_path / "tokens"
    path.write_text(done.stdout)
    token = done.stderr.splitlines()[0]
    assert tokens.read(path).who(f"Bearer {token}".encode()) == tokens.Principal("line-3", admin=False)


def test_changed_tokens_and_certificates_hold_and_broken_ones_do_not(
    starts: Callable[..., Served], model_directory: Path, tmp_path: Path, token_file: tuple[Path, str, str]
):
    path, infer, _ = token_file
    certificate, key = certify(tmp_path)
    more = ("--token-file", str(path), "--tls-cert", str(certificate), "--tls-key", str(key))
    served = starts(model_directory / "autoencoder.onnx", *more)

    def shown() -> bytes:
        return ssl.get_server_certificate(("127.0.0.1", served.port)).encode()

    def ask(token: str) -> int:
        context = ssl._create_unverified_context()  # noqa: S323 - it changes meanwhile
        connection = http.client.HTTPSConnection("127.0.0.1", served.port, timeout=10, context=context)
        try:
            connection.request("GET", "/v2", headers={"Authorization": f"Bearer {token}"})
            return connection.getresponse().status
        finally:
            connection.close()

    def logged(words: str) -> bool:
        return words in served.log.read_text()

    first = shown()
    assert first.split() == certificate.read_bytes().split()
    assert ask(infer) == 200
    whole = path.read_text()
    path.write_text("no token\n")
    until(lambda: logged("serving.tokens_kept"), "a broken file is logged")
    assert ask(infer) == 200
    token, line = tokens.new("other", "infer")
    path.write_text(line + "\n")
    until(lambda: ask(token) == 200, "the new token holds")
    assert ask(infer) == 401, whole
    certificate.write_text("broken")
    until(lambda: logged("serving.certificate_kept"), "a broken certificate is logged")
    assert shown() == first
    certify(tmp_path)
    until(
        lambda: shown().split() == certificate.read_bytes().split() != first.split(), "the new one is shown"
    )
    assert ask(token) == 200


def test_handshakes_are_bounded_and_the_oldest_makes_room(
    starts: Callable[..., Served], model_directory: Path, tmp_path: Path
):
    certificate, key = certify(tmp_path)
    more = ("--tls-cert", str(certificate), "--tls-key", str(key), "--max-connections", "32")
    served = starts(model_directory / "autoencoder.onnx", *more, "--client-timeout-s", "2")
    context = ssl.create_default_context(cafile=str(certificate))

    def page() -> str:
        connection = http.client.HTTPSConnection("localhost", served.port, timeout=10, context=context)
        try:
            connection.request("GET", "/metrics")
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def under_way() -> int:
        return int(page().partition("\npithead_http_handshakes ")[2].split()[0])

    silent = [socket.create_connection(("127.0.0.1", served.port), timeout=10) for _ in range(50)]
    until(lambda: 1 <= under_way() <= 8, "a quarter of all connections is at a handshake")
    for sock in silent[:40]:
        assert sock.recv(1) == b"", "the oldest were let go"
    until(lambda: under_way() == 0, "the others had their time")
    for sock in silent:
        sock.close()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST.:8000", 200),
        ("app.localhost:1", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("192.168.0.9", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_a_name_that_leads_here_is_not_enough(shared: Served, host: str, status: int):
    reply = shared.ask("GET", "/v2/health/live", None, {"Host": host})
    assert reply.status == status
    assert status == 200 or "--allow-host" in reply.error


def test_names_that_are_given_are_answered(starts: Callable[..., Served], model_directory: Path):
    served = starts(model_directory / "autoencoder.onnx", "--allow-host", "Edge-7.plant.example")
    for host, status in (("edge-7.plant.example:80", 200), ("plant.example", 403), ("localhost", 200)):
        assert served.ask("GET", "/v2", None, {"Host": host}).status == status
