"""A plant in small: real keys, real repositories in a real database, and a device that trusts them."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psycopg
import pytest
from msgspec.structs import replace
from securesystemslib.signer import CryptoSigner

from agent.core.layout import Layout
from agent.update.refresh import refresh
from agent.update.verified import Verified
from contract.bundle import Bundle
from contract.errors import PitheadError
from contract.manifest import (
    MANIFEST_NAME,
    FileRef,
    Golden,
    Manifest,
    Provenance,
    TensorSpec,
    Tolerance,
    Variant,
)
from contract.messages import Desired, ModelAssignment, Role
from control_plane.cli.release import Package, extend, read_package, trusted_release
from control_plane.services import desired
from control_plane.services.director import Director
from control_plane.services.image_repository import ImageRepository
from control_plane.services.releases import Releases, assignment
from control_plane.services.staging import Staging
from control_plane.signing import rules
from control_plane.store.database import Database
from provisioning.keys import OFFLINE, ONLINE, Keys, sign, sign_metadata, utc_now

SECOND = 1_000_000
DAY = 86_400 * SECOND


@dataclass
class Clock:
    """A clock that only a test moves; it starts at the real time, since python-tuf reads that."""

    offset: int = 0

    def __call__(self) -> int:
        return time.time_ns() // 1000 + self.offset


@dataclass
class KeyedSigner:
    """The signer's rules and keys without its process."""

    keys: Keys
    clock: Clock

    def sign(self, role: str, payload: bytes) -> tuple[str, str]:
        rules.check(role, payload, self.clock())
        signature = self.keys[role].sign(payload)
        return signature.keyid, signature.signature


@dataclass
class FakeDevice:
    """The disk of a device, and the update process run on it."""

    id: str
    layout: Layout

    def refresh(self, bundle: bytes | Bundle, now: int | None = None) -> Verified:
        path = self.layout.root / "bundle"
        path.write_bytes(bundle if isinstance(bundle, bytes) else msgspec.msgpack.encode(bundle))
        try:
            return refresh(self.layout, path, time.time_ns() // 1000 if now is None else now)
        finally:
            path.unlink()

    def state(self) -> dict[str, str]:
        """Hash of every file that must survive, by name; SQLite's own bookkeeping excepted."""
        return {
            str(path.relative_to(self.layout.state_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.layout.state_dir.rglob("*"))
            if path.is_file()
        }

    @contextlib.contextmanager
    def refusing(self, code: str) -> Iterator[pytest.ExceptionInfo[PitheadError]]:
        """Expect a refusal with this code that leaves the disk as it was."""
        before = self.state()
        with pytest.raises(PitheadError) as caught:
            yield caught
        assert caught.value.code == code, caught.value
        assert self.state() == before
        assert not list(self.layout.run_dir.glob("update-work-*"))

    @contextlib.contextmanager
    def refusing_but(self, code: str, left: Path) -> Iterator[None]:
        """Expect a refusal that leaves one file more."""
        before = self.state()
        with pytest.raises(PitheadError) as caught:
            yield
        assert caught.value.code == code, caught.value
        after = self.state()
        after.pop(str(left.relative_to(self.layout.state_dir)), None)
        assert after == before

    def wipe(self, *names: str) -> None:
        for name in names:
            (self.layout.tuf / name).write_bytes(b"")


@dataclass
class Plant:
    """The control plane's half, with every key at hand."""

    directory: Path
    keys: Keys
    clock: Clock
    database: Database
    admitted: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.signer = KeyedSigner(self.keys, self.clock)
        self.tuf = self.directory / "tuf"
        self.images = ImageRepository(self.database, self.signer, self.tuf, self.clock)
        self.director = Director(self.database, self.signer, self.images, self.clock)
        self.staging = Staging(self.directory / "staging", 10_000_000)
        self.releases = Releases(
            self.database, self.images, self.directory / "objects", self.staging, self.clock, self.admit
        )

    def admit(self, directory: Path) -> dict[str, object]:
        self.admitted.append(directory)
        assert (directory / MANIFEST_NAME).is_file()
        return {"valid": True}

    def start(self) -> None:
        for name, content in sign_metadata(self.keys, utc_now()).items():
            path = self.tuf / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.database.migrate()
        self.images.prepare()
        self.releases.prepare()

    def package(
        self, name: str = "pump", version: str = "1.0.0", counter: int = 1, payload: bytes = b"weights"
    ) -> Package:
        directory = self.directory / "packages" / name / version
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        refs = []
        for path, content in (("model.onnx", payload + version.encode()), ("golden/model.npz", b"vectors")):
            (directory / path).parent.mkdir(exist_ok=True)
            (directory / path).write_bytes(content)
            refs.append(FileRef(path, hashlib.sha256(content).hexdigest(), len(content)))
        manifest = Manifest(
            format=1,
            name=name,
            version=version,
            release_counter=counter,
            summary="for tests",
            licence="Apache-2.0",
            variants=(
                Variant(
                    name="only",
                    file=refs[0],
                    format="onnx",
                    quantisation="int8",
                    inputs=(TensorSpec("x", "FP32", (1, 2)),),
                    outputs=(TensorSpec("y", "FP32", (1, 2)),),
                    golden=Golden(refs[1], 1, {"y": Tolerance()}),
                ),
            ),
            provenance=Provenance(source="tests", data="none"),
        )
        (directory / MANIFEST_NAME).write_bytes(msgspec.json.encode(manifest))
        return read_package(directory)

    def sign_release(self, package: Package, *, floor: int | None = None, key: str = "release-1") -> bytes:
        current = trusted_release(
            self.releases.current().release, [self.keys["release-1"]], roots=[], targets=b"", root=None
        )
        extend(current, package, floor)
        return sign(current, [self.keys[key]])

    def upload(self, package: Package) -> None:
        for path, (_, sha256) in package.files.items():
            with self.releases.stage(sha256) as upload:
                upload.write((package.directory / path).read_bytes())
                upload.finish()
            self.releases.staged(sha256)

    def release(
        self, name: str = "pump", version: str = "1.0.0", counter: int = 1, *, floor: int | None = None
    ) -> Package:
        package = self.package(name, version, counter)
        self.upload(package)
        self.releases.publish("tester", name, version, self.sign_release(package, floor=floor))
        return package

    def want(self, device: str, *wanted: ModelAssignment | tuple[str, str]) -> Desired:
        with self.database.transaction() as tx:
            models = tuple(
                assignment(tx, *item, role=Role.ACTIVE) if isinstance(item, tuple) else item
                for item in wanted
            )
            return desired.change(tx, device, lambda old: replace(old, models=models))

    def assignment(self, name: str = "pump", version: str = "1.0.0") -> ModelAssignment:
        with self.database.reading() as tx:
            return assignment(tx, name, version)

    def bundle(self, device: str) -> Bundle:
        return msgspec.msgpack.decode(self.director.bundle(device)[0], type=Bundle)

    def device(self, name: str = "device-0001") -> FakeDevice:
        layout = Layout(self.directory / "devices" / name)
        layout.identity.mkdir(parents=True)
        layout.run_dir.mkdir(parents=True)
        layout.tuf.mkdir()
        layout.identity_file.write_bytes(
            msgspec.json.encode({"device": name, "server": "https://127.0.0.1:1"})
        )
        layout.image_root.write_bytes((self.tuf / "image/1.root.json").read_bytes())
        layout.director_root.write_bytes((self.tuf / "director/1.root.json").read_bytes())
        return FakeDevice(name, layout)


@pytest.fixture(scope="session")
def keys() -> Keys:
    """Return one key for every role; making them is the slow part."""
    return {name: CryptoSigner.generate_ed25519() for name in (*OFFLINE, *ONLINE)}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a PostgreSQL server that listens on a Unix socket only."""
    initdb = shutil.which("initdb") or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    programs = Path(initdb).resolve().parent
    user = "postgres" if os.geteuid() == 0 else None
    base = Path(f"/tmp/pithead-trust-{os.getpid()}")
    base.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(base, user)

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, *arguments],
            check=True,
            user=user,
            group=user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )

    try:
        run("initdb", "-D", f"{base}/data", "-A", "trust", "-U", "pithead", "--no-sync", "-E", "UTF8")
        options = f"-k {base} -c listen_addresses='' -c fsync=off -c max_connections=20"
        run("pg_ctl", "-D", f"{base}/data", "-l", f"{base}/log", "-w", "-o", options, "start")
        try:
            yield f"postgresql://pithead@/postgres?host={base}"
        finally:
            run("pg_ctl", "-D", f"{base}/data", "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def postgres_database(postgres: str) -> Iterator[str]:
    """Return the address of an empty database."""
    name = f"t{time.monotonic_ns()}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    yield postgres.replace("/postgres?", f"/{name}?")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def make_plant(keys: Keys, clock: Clock, tmp_path: Path) -> Iterator[Callable[[str], Plant]]:
    plants: list[Plant] = []

    def make(url: str) -> Plant:
        plant = Plant(tmp_path, keys, clock, Database(url))
        plants.append(plant)
        plant.start()
        return plant

    yield make
    for plant in plants:
        plant.database.close()


@pytest.fixture
def plant(make_plant: Callable[[str], Plant], tmp_path: Path) -> Plant:
    return make_plant(f"sqlite:///{tmp_path}/pithead.db")


@pytest.fixture
def device(plant: Plant) -> FakeDevice:
    """Return a device that runs version 1 of the model `pump`, with all of it verified once."""
    plant.release()
    device = plant.device()
    plant.want(device.id, ("pump", "1.0.0"))
    device.refresh(plant.bundle(device.id))
    return device


def at(year: int) -> int:
    return int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * SECOND
