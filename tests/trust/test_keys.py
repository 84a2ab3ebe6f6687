"""The ceremony and the signer: what is made, what is never overwritten, what is never signed."""

import datetime as dt
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from tuf.api.metadata import Metadata
from typer.testing import CliRunner

from contract.errors import PitheadError
from contract.messages import Desired
from control_plane.signing import director, rules
from control_plane.signing.client import SignerClient
from control_plane.signing.metadata import canonical, head, next_version, timestamp
from control_plane.wiring.signer import SignerProcess
from provisioning import keys
from provisioning.cli import keys_app
from provisioning.keys import OFFLINE, ONLINE

DAY = dt.timedelta(days=1)


@pytest.fixture(scope="session")
def ceremony(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ceremony") / "site"
    environment = {"PITHEAD_KEY_PASSPHRASE": "correct horse"}
    done = CliRunner().invoke(keys_app, ["init", "--data-dir", str(directory)], env=environment)
    assert done.exit_code == 0, done.output
    assert "release-1.pem" in done.output
    return directory


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@pytest.fixture
def signer(ceremony: Path, tmp_path: Path) -> Iterator[tuple[SignerClient, Callable[[], None]]]:
    """Return a client of a real signer process, and how to start that process again."""
    path = tmp_path / "signer.sock"
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        for child in running:
            child.kill()
            child.wait()
        path.unlink(missing_ok=True)
        arguments = ["--socket", str(path), "--keys", str(ceremony / "signer")]
        running.append(subprocess.Popen([sys.executable, "-m", "control_plane.signing.signer", *arguments]))
        deadline = time.monotonic() + 20
        while not listens(path):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client = SignerClient(path)
    yield client, start
    client.close()
    running[-1].terminate()
    assert running[-1].wait(10) == 0
    assert not path.exists()


def test_thresholds_and_expiry(ceremony: Path) -> None:
    image = Metadata.from_bytes((ceremony / "tuf/image/1.root.json").read_bytes()).signed
    own = Metadata.from_bytes((ceremony / "tuf/director/1.root.json").read_bytes()).signed
    top = Metadata.from_bytes((ceremony / "tuf/image/1.targets.json").read_bytes()).signed
    shape = {name: (role.threshold, len(role.keyids)) for name, role in image.roles.items()}
    assert shape == {"root": (2, 3), "targets": (2, 3), "snapshot": (1, 1), "timestamp": (1, 1)}
    assert (own.roles["root"].threshold, len(own.roles["root"].keyids)) == (2, 3)
    assert top.delegations.roles["release"].threshold == 1
    every = [key for role in (*image.roles.values(), *own.roles.values()) for key in role.keyids]
    assert len(set(every)) == len(every), "no key has two roles"
    assert image.expires > dt.datetime.now(dt.UTC) + 300 * DAY


@pytest.mark.parametrize(
    ("path", "delegated"),
    [
        ("models/pump/1.0.0/model.onnx", True),
        ("models/pump/1.0.0/golden/a/model.npz", True),
        ("models/pump/floor", True),
        ("models/pump/other", False),
        ("devices/device-0001", False),
        ("agent/1.0.0/pithead.whl", False),
    ],
)
def test_what_a_release_may_sign(ceremony: Path, path: str, *, delegated: bool) -> None:
    top = Metadata.from_bytes((ceremony / "tuf/image/1.targets.json").read_bytes()).signed
    assert bool(list(top.delegations.get_roles_for_target(path))) is delegated


def test_offline_keys_are_encrypted_and_private(ceremony: Path) -> None:
    for name in OFFLINE:
        path = ceremony / "offline" / f"{name}.pem"
        assert keys.is_encrypted(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for name in ONLINE:
        assert stat.S_IMODE((ceremony / "signer" / f"{name}.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((ceremony / "offline").stat().st_mode) == 0o700
    path = ceremony / "offline" / "release-1.pem"
    assert keys.load_key(path, "correct horse").public_key.keytype == "ed25519"
    for wrong in ("battery staple", None):
        with pytest.raises(PitheadError, match="wrong passphrase"):
            keys.load_key(path, wrong)


def test_nothing_is_overwritten(ceremony: Path) -> None:
    files = [path for path in ceremony.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(PitheadError) as caught:
        keys.init(ceremony, ceremony / "offline", "correct horse", keys.utc_now())
    assert caught.value.code == "request.conflict"
    assert {path: path.read_bytes() for path in ceremony.rglob("*") if path.is_file()} == before


def test_a_short_passphrase_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(PitheadError, match="passphrase"):
        keys.init(tmp_path / "site", tmp_path / "offline", "short", keys.utc_now())
    assert list(tmp_path.iterdir()) == []


def test_status_names_what_is_missing(ceremony: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    here = runner.invoke(keys_app, ["status", "--data-dir", str(ceremony)])
    assert here.exit_code == 0
    assert "version 1, expires" in here.output
    nowhere = runner.invoke(keys_app, ["status", "--data-dir", str(tmp_path)])
    assert nowhere.exit_code == 1
    assert "pithead keys init" in nowhere.output


def test_the_signer_signs_what_devices_accept(
    ceremony: Path, signer: tuple[SignerClient, Callable[[], None]]
) -> None:
    client, restart = signer
    root = Metadata.from_bytes((ceremony / "tuf/director/1.root.json").read_bytes()).signed
    wanted = Desired(v=1, device="device-0001", revision=1)
    now = time.time_ns() // 1000
    built = director.build(wanted, 0, now, client)
    restart()
    again = director.build(wanted, built.version, now, client)
    assert again.version == built.version + 1
    for role in ("targets", "snapshot", "timestamp"):
        for files in (built, again):
            metadata = Metadata.from_bytes(getattr(files, role))
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)


def test_the_signer_refuses_roots_and_releases(
    ceremony: Path, signer: tuple[SignerClient, Callable[[], None]]
) -> None:
    client, _ = signer
    for name in ("director/1.root.json", "image/1.root.json", "image/1.targets.json", "image/1.release.json"):
        payload = Metadata.from_bytes((ceremony / "tuf" / name).read_bytes()).signed_bytes
        for role in (*ONLINE, "release-1", "image-root-1", "../offline/release-1"):
            with pytest.raises(PitheadError) as caught:
                client.sign(role, payload)
            assert caught.value.code == "signing.refused"


def test_an_interrupted_ceremony_says_what_to_delete(tmp_path: Path) -> None:
    offline = tmp_path / "offline"
    keys.init(tmp_path, offline, "long enough", keys.utc_now())
    left = tmp_path / "tuf" / "director" / "1.root.json"
    left.unlink()
    with pytest.raises(PitheadError, match="did not end") as caught:
        keys.init(tmp_path, offline, "long enough", keys.utc_now())
    assert str(offline / "release-1.pem") in caught.value.detail
    for path in keys.expected_files(tmp_path, offline):
        path.unlink(missing_ok=True)
    keys.init(tmp_path, offline, "long enough", keys.utc_now())


def test_the_status_shows_the_newest_release_and_what_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.init(tmp_path, tmp_path / "offline", "long enough", keys.utc_now())
    plain = CliRunner().invoke(keys_app, ["status", "--data-dir", str(tmp_path)])
    assert plain.exit_code == 0
    assert "SIGN AGAIN" not in plain.output
    newest = tmp_path / "tuf" / keys.NEWEST_RELEASE
    newest.write_bytes((tmp_path / "tuf" / "image" / "1.release.json").read_bytes())
    later = keys.utc_now() + (keys.RELEASE_DAYS - 30) * DAY
    monkeypatch.setattr(keys, "utc_now", lambda: later)
    shown = CliRunner().invoke(keys_app, ["status", "--data-dir", str(tmp_path)]).output
    (line,) = [line for line in shown.splitlines() if "newest" in line]
    assert "SIGN AGAIN: 30 days left" in line or "SIGN AGAIN: 29 days left" in line
    assert "1.release.json" not in shown


def test_a_signer_that_ends_late_leaves_its_successor_alone(ceremony: Path, tmp_path: Path) -> None:
    path = tmp_path / "signer.sock"
    old, new = (SignerProcess(path, ceremony / "signer") for _ in range(2))
    client = SignerClient(path)
    assert not client.answers()
    old.start()
    assert client.answers()
    new.start()
    try:
        old.stop()
        assert client.answers()
        path.unlink()  # whoever did that: it is noticed, and mended
        client.close()
        assert not client.answers()
        new.keep()
        assert client.answers()
    finally:
        client.close()
        new.stop()
    assert not path.exists()


def test_no_signer(tmp_path: Path) -> None:
    with pytest.raises(PitheadError) as caught:
        SignerClient(tmp_path / "signer.sock").sign("director-targets", b"{}")
    assert caught.value.code == "signing.unavailable"


def test_the_signer_refuses_keys_that_others_can_read(ceremony: Path, tmp_path: Path) -> None:
    for name in ONLINE:
        (tmp_path / f"{name}.pem").write_bytes((ceremony / "signer" / f"{name}.pem").read_bytes())
        (tmp_path / f"{name}.pem").chmod(0o600)
    (tmp_path / "director-targets.pem").chmod(0o644)
    arguments = ["--socket", str(tmp_path / "s"), "--keys", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "-m", "control_plane.signing.signer", *arguments],
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert ended.returncode == 1
    assert b"director-targets.pem can be read by others" in ended.stderr


NOW = 1_800_000_000 * 1_000_000


def good(role: str) -> dict[str, object]:
    target = {"length": 1, "hashes": {"sha256": "0" * 64}}
    kind, _, _ = rules.RULES[role]
    own: dict[str, object] = {
        "director-targets": {"targets": {"devices/device-0001": target}},
        "director-snapshot": {"meta": {"targets.json": {"version": 1}}},
        "image-snapshot": {"meta": {"targets.json": {"version": 1}, "release.json": {"version": 1}}},
    }.get(role) or timestamp(1, NOW, DAY, (1, b""))
    return head(kind, 1, NOW, DAY) | own


@pytest.mark.parametrize("role", ONLINE)
def test_the_rules_let_each_role_sign_its_own(role: str) -> None:
    rules.check(role, canonical(good(role)), NOW)
    for other in ONLINE:
        if other.partition("-")[2] != role.partition("-")[2]:
            with pytest.raises(PitheadError):
                rules.check(other, canonical(good(role)), NOW)


@pytest.mark.parametrize(
    ("role", "change"),
    [
        ("director-targets", {"targets": {}}),
        ("director-targets", {"targets": {"models/pump/1.0.0/manifest.json": {}}}),
        ("director-targets", {"targets": {"devices/device-0001": {}, "devices/device-0002": {}}}),
        ("director-targets", {"delegations": {"keys": {}, "roles": []}}),
        ("director-snapshot", {"meta": {"targets.json": {}, "root.json": {}}}),
        ("image-timestamp", {"signed_at": NOW + 3600 * 1_000_000}),
        ("image-timestamp", {"expires": "2099-01-01T00:00:00Z"}),
        ("image-timestamp", {"expires": "tomorrow"}),
        ("image-timestamp", {"version": 0}),
        ("image-timestamp", {"version": "1"}),
        ("image-timestamp", {"_type": "root"}),
    ],
)
def test_the_rules_refuse(role: str, change: dict[str, object]) -> None:
    with pytest.raises(PitheadError) as caught:
        rules.check(role, canonical(good(role) | change), NOW)
    assert caught.value.code == "signing.refused"


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b"\xff", b'{ "_type": "timestamp" }'])
def test_the_rules_refuse_what_is_no_canonical_metadata(payload: bytes) -> None:
    with pytest.raises(PitheadError) as caught:
        rules.check("image-timestamp", payload, NOW)
    assert caught.value.code == "signing.refused"


def test_versions_survive_a_lost_database() -> None:
    now = 1_800_000_000 * 1_000_000
    assert next_version(0, now) == 1_800_000_000
    assert next_version(1_800_000_000, now) == 1_800_000_001
    assert next_version(1_900_000_000, now) == 1_900_000_001


def test_a_signed_document_is_the_desired_document() -> None:
    wanted = Desired(v=1, device="device-0001", revision=3)
    assert msgspec.json.decode(director.document(wanted), type=Desired) == wanted
