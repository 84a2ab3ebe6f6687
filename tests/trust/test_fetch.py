"""Files over real TLS with client certificates: whole, resumed, tampered with, cut off, on a full disk."""

import asyncio
import datetime as dt
import hashlib
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec

from agent.update.fetch import fetch
from agent.update.verified import VerifiedFile
from contract.errors import PitheadError
from control_plane.api import bundle
from control_plane.api.app import devices_app
from control_plane.api.mtls import device_config, server_context
from provisioning import pki
from tests.trust.conftest import DAY, FakeDevice, Plant

SIZE = 3_000_000
MODEL = "models/pump/2.0.0/model.onnx"


class Identities:
    """Every certificate of the device authority is good."""

    def identify(self, certificate: bytes) -> str:
        return pki.device_of(certificate)[0]


@dataclass
class Faults:
    """The server's app, with a network that delays and cuts."""

    app: Any
    delay_s: float = 0.0
    cut_after: int | None = None
    ranges: list[str] = field(default_factory=list)
    sent: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        if b"range" in headers:
            self.ranges.append(headers[b"range"].decode())

        async def slow(message: Any) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                await asyncio.sleep(self.delay_s)
                self.sent += len(message["body"])
                if self.cut_after is not None and self.sent > self.cut_after:
                    raise ConnectionError("cut")
            await send(message)

        await self.app(scope, receive, slow)


@dataclass
class Site:
    """A device with a certificate, the server that knows it, and the network between them."""

    plant: Plant
    device: FakeDevice
    faults: Faults
    content: bytes
    file: VerifiedFile
    url: str

    @property
    def stored(self) -> Path:
        return self.plant.releases.objects / self.file.sha256

    @property
    def place(self) -> Path:
        return self.device.layout.object(self.file.sha256)

    @property
    def part(self) -> Path:
        return self.place.with_name(f"{self.file.sha256}.part")

    def fetch(self, path: str = MODEL, file: VerifiedFile | None = None, deadline_s: float = 20) -> None:
        fetch(
            self.device.layout,
            path,
            file or self.file,
            server=self.url,
            now=time.time_ns() // 1000,
            deadline_s=deadline_s,
        )

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "agent.update", "fetch", "--root", str(self.device.layout.root)),
            *("--sha256", self.file.sha256, "--length", str(self.file.length), "--target", MODEL),
            *("--server", self.url),
        ]


@pytest.fixture
def site(plant: Plant, device: FakeDevice, tmp_path: Path) -> Iterator[Site]:
    content = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(SIZE // 32))
    package = plant.package(version="2.0.0", counter=2, payload=content)
    plant.upload(package)
    plant.releases.publish("tester", "pump", "2.0.0", plant.sign_release(package))
    plant.want(device.id, ("pump", "2.0.0"))
    device.refresh(plant.bundle(device.id))
    length, sha256 = package.files["model.onnx"]

    now = dt.datetime.now(dt.UTC)
    servers, devices = pki.create_authority("servers", now), pki.create_authority("devices", now)
    certificate, key = pki.issue_server(servers, ["127.0.0.1"], now)
    for name, data in (("server.pem", certificate), ("server.key", key), ("device-ca.pem", devices.pem)):
        (tmp_path / name).write_bytes(data)
    private = ec.generate_private_key(ec.SECP256R1())
    device.layout.certificate.write_bytes(
        pki.issue_device(devices, private.public_key(), device.id, now, 30).pem
    )
    device.layout.key.write_bytes(pki.private_pem(private))
    device.layout.server_ca.write_bytes(servers.pem)

    routes = bundle.router(plant.director, plant.releases.objects)
    faults = Faults(devices_app("0", Identities(), [routes], max_body_bytes=1000))
    config = device_config(
        faults, server_context(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "device-ca.pem")
    )
    config.timeout_graceful_shutdown = 1
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield Site(
            plant,
            device,
            faults,
            (package.directory / "model.onnx").read_bytes(),
            VerifiedFile(sha256, length),
            f"https://127.0.0.1:{port}",
        )
        server.should_exit = True
        thread.join(10)
    assert not thread.is_alive()


def until(condition: Callable[[], bool], limit_s: float = 15) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_a_file_arrives_whole(site: Site) -> None:
    site.fetch()
    assert site.place.read_bytes() == site.content
    assert not site.part.exists()
    site.fetch()
    assert site.faults.sent == len(site.content), "the second time nothing is downloaded"


def test_a_damaged_object_is_fetched_again(site: Site) -> None:
    site.fetch()
    site.place.write_bytes(b"x" * len(site.content))
    site.fetch()
    assert site.place.read_bytes() == site.content


def test_killed_and_resumed(site: Site) -> None:
    site.faults.delay_s = 0.5
    with subprocess.Popen(site.command(), stdout=subprocess.PIPE) as child:
        until(lambda: site.part.exists() and site.part.stat().st_size > 0)
        child.send_signal(signal.SIGKILL)
    assert not site.place.exists()
    had = site.part.stat().st_size
    assert 0 < had < len(site.content)
    site.faults.delay_s = 0
    ended = subprocess.run(site.command(), capture_output=True, check=True)
    assert json.loads(ended.stdout) == {"ok": True}
    assert site.faults.ranges == [f"bytes={had}-"]
    assert site.place.read_bytes() == site.content
    assert not site.part.exists()


def test_a_cut_connection_is_resumed(site: Site) -> None:
    site.faults.cut_after = 2_000_000
    with site.device.refusing_but("update.unreachable", site.part):
        site.fetch()
    had = site.part.stat().st_size
    assert had > 0
    site.faults.cut_after = None
    site.fetch()
    assert site.faults.ranges == [f"bytes={had}-"]
    assert site.place.read_bytes() == site.content


def test_tampered_in_storage(site: Site) -> None:
    changed = bytearray(site.content)
    changed[1000] ^= 1
    site.stored.write_bytes(changed)
    with site.device.refusing("update.hash_mismatch"):
        site.fetch()
    site.stored.write_bytes(site.content)
    site.fetch()


@pytest.mark.parametrize("length", [10, SIZE * 2])
def test_another_length_in_storage(site: Site, length: int) -> None:
    site.stored.write_bytes(b"x" * length)
    with site.device.refusing("update.length_mismatch"):
        site.fetch()


def test_a_shorter_file_than_what_is_here_already(site: Site) -> None:
    site.part.parent.mkdir(exist_ok=True)
    site.part.write_bytes(site.content[:1000])
    site.stored.write_bytes(site.content[:500])
    with pytest.raises(Exception, match=r"update\.length_mismatch"):
        site.fetch()
    assert not site.part.exists()


@pytest.mark.parametrize("damaged", [1000, 3_000_000])
def test_a_part_that_was_damaged_does_not_count_against_the_file(site: Site, damaged: int) -> None:
    """A power cut may leave zeros where bytes were written: the file itself is fetched from its beginning."""
    site.part.parent.mkdir(exist_ok=True)
    site.part.write_bytes(bytes(min(damaged, len(site.content))))
    site.fetch()
    assert site.place.read_bytes() == site.content
    assert not site.part.exists()


def test_a_damaged_part_of_a_file_that_is_wrong_on_the_server_too(site: Site) -> None:
    site.part.parent.mkdir(exist_ok=True)
    site.part.write_bytes(bytes(1000))
    changed = bytearray(site.content)
    changed[-1] ^= 1
    site.stored.write_bytes(changed)
    with pytest.raises(PitheadError, match=r"update\.hash_mismatch"):
        site.fetch()
    assert not site.part.exists()


def test_missing_on_the_server(site: Site) -> None:
    site.stored.unlink()
    with site.device.refusing("update.not_found"):
        site.fetch()


def test_only_what_was_verified_is_fetched(site: Site) -> None:
    with site.device.refusing("update.not_released"):
        site.fetch("models/pump/9.9.9/model.onnx")
    with site.device.refusing("update.repositories_disagree"):
        site.fetch(file=VerifiedFile("0" * 64, site.file.length))
    with site.device.refusing("update.repositories_disagree"):
        site.fetch(file=VerifiedFile(site.file.sha256, 1))
    assert site.faults.sent == 0


def test_a_server_that_nobody_vouches_for(site: Site) -> None:
    other = pki.create_authority("strangers", dt.datetime.now(dt.UTC))
    site.device.layout.server_ca.write_bytes(other.pem)
    with site.device.refusing("update.unreachable"):
        site.fetch()


def test_a_deadline_holds_against_a_dripping_server(site: Site) -> None:
    site.faults.delay_s = 0.4
    began = time.monotonic()
    with site.device.refusing_but("update.unreachable", site.part):
        site.fetch(deadline_s=0.5)
    assert time.monotonic() - began < 5


def test_a_full_disk(site: Site) -> None:
    """A file-size limit stands for a full disk: the write fails in the same place."""
    limited = ["prlimit", "--fsize=1000000", *site.command()]
    before = site.device.state()
    ended = subprocess.run(limited, capture_output=True, check=False)
    answer = json.loads(ended.stdout)
    assert (ended.returncode, answer["ok"], answer["code"]) == (1, False, "update.disk_full")
    assert site.device.state() == before
    site.fetch()


def test_a_wrong_clock_does_not_stop_a_download(site: Site) -> None:
    """TLS refuses every certificate at 1970; below the floor of signed time it is asked without the time."""
    fetch(site.device.layout, MODEL, site.file, server=site.url, now=0, deadline_s=20)
    assert site.place.exists()


def test_the_bundle_by_etag(site: Site) -> None:
    tls = ssl.create_default_context(cafile=str(site.device.layout.server_ca))
    tls.load_cert_chain(site.device.layout.certificate, site.device.layout.key)
    address = site.url.removeprefix("https://")

    def get(etag: str | None = None) -> tuple[int, bytes, str | None]:
        connection = http.client.HTTPSConnection(address, context=tls, timeout=10)
        connection.request("GET", "/device/v1/bundle", headers={"If-None-Match": etag} if etag else {})
        response = connection.getresponse()
        answer = response.status, response.read(), response.getheader("ETag")
        connection.close()
        return answer

    status, raw, etag = get()
    assert (status, etag) == (200, f'"{hashlib.sha256(raw).hexdigest()}"')
    assert get(etag) == (304, b"", etag)
    site.plant.want(site.device.id)
    site.plant.clock.offset += DAY
    status, raw, newer = get(etag)
    assert status == 200
    assert newer != etag
    assert site.device.refresh(raw).desired.models == ()
