"""Attacks on the update channel: each is refused with its own code, and leaves the device as it was.

The attacker of most tests holds *every online key* and the network.
"""

import datetime as dt
import hashlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata

from agent.update.marks import MarkStore
from agent.update.refresh import MAX_BUNDLE
from contract.bundle import Bundle, RepositoryMetadata
from contract.errors import PitheadError
from contract.messages import Desired, ModelAssignment, Role
from control_plane.signing import director, image
from control_plane.signing.director import DirectorMetadata
from control_plane.signing.image import ImageMetadata
from provisioning.keys import ONLINE, Keys, sign, sign_metadata, utc_now
from tests.trust.conftest import FakeDevice, Plant

SECOND = 1_000_000
DAY = 86_400 * SECOND


class OnlineKeys:
    """All online keys, without the signer's rules."""

    def __init__(self, keys: Keys) -> None:
        self.keys = keys

    def sign(self, role: str, payload: bytes) -> tuple[str, str]:
        signature = self.keys[role].sign(payload)
        return signature.keyid, signature.signature


@pytest.fixture
def thief(keys: Keys):
    return OnlineKeys(keys)


def direct(plant: Plant, signer: OnlineKeys, wanted: Desired, *, now: int | None = None) -> Bundle:
    """Return the bundle of a director that wants something else than the control plane."""
    bundle = plant.bundle(wanted.device)
    version = Metadata.from_bytes(bundle.director.timestamp).signed.version
    built = director.build(wanted, version, plant.clock() if now is None else now, signer)
    return replace(bundle, director=with_director(bundle.director, built))


def with_director(files: RepositoryMetadata, built: DirectorMetadata) -> RepositoryMetadata:
    return replace(files, targets=built.targets, snapshot=built.snapshot, timestamp=built.timestamp)


def publish(
    plant: Plant, signer: OnlineKeys, found: ImageMetadata, now: int | None = None
) -> RepositoryMetadata:
    """Return the image repository's part of a bundle, signed again by whoever holds the online keys."""
    return image.publish(found, plant.clock() if now is None else now, signer).for_device()


def changed(data: bytes, edit: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(data)
    edit(document["signed"])
    return json.dumps(document).encode()


def raise_version(signed: dict[str, Any]) -> None:
    signed["version"] += 1


@pytest.mark.parametrize("repository", ["director", "image"])
@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_forged_metadata(plant: Plant, device: FakeDevice, repository: str, role: str):
    bundle = plant.bundle(device.id)
    files = getattr(bundle, repository)
    forged = replace(files, **{role: changed(getattr(files, role), raise_version)})
    codes = {"timestamp": "update.metadata_invalid"}
    with device.refusing(codes.get(role, "update.metadata_inconsistent")):
        device.refresh(replace(bundle, **{repository: forged}))


def test_keys_of_another_ceremony(plant: Plant, device: FakeDevice, thief: OnlineKeys):
    strangers = {name: CryptoSigner.generate_ed25519() for name in thief.keys}
    other = sign_metadata(strangers, utc_now())
    bundle = plant.bundle(device.id)
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    built = director.build(wanted, plant.clock() // SECOND, plant.clock(), OnlineKeys(strangers))
    with device.refusing("update.metadata_invalid"):
        device.refresh(replace(bundle, director=with_director(bundle.director, built)))
    roots = (other["director/1.root.json"],)
    with device.refusing("update.metadata_invalid"):
        device.refresh(replace(bundle, director=replace(with_director(bundle.director, built), roots=roots)))


def test_one_root_key_of_two_is_not_enough(plant: Plant, device: FakeDevice, keys: Keys):
    bundle = plant.bundle(device.id)
    root = Metadata.from_bytes(bundle.director.roots[0]).signed
    root.version = 2
    forged = sign(root, [keys["director-root-1"]])
    with device.refusing("update.metadata_invalid"):
        device.refresh(
            replace(bundle, director=replace(bundle.director, roots=(*bundle.director.roots, forged)))
        )


def test_another_devices_assignment(plant: Plant, device: FakeDevice):
    plant.want("device-0002", ("pump", "1.0.0"))
    with device.refusing("update.wrong_device"):
        device.refresh(plant.bundle("device-0002"))


def test_another_devices_document_under_our_path(
    plant: Plant, device: FakeDevice, thief: OnlineKeys, monkeypatch: pytest.MonkeyPatch
):
    other = plant.want("device-0002", ("pump", "1.0.0"))
    text = director.document(other)
    monkeypatch.setattr(director, "document", lambda _wanted: text)
    with device.refusing("update.wrong_device"):
        device.refresh(direct(plant, thief, replace(other, device=device.id)))


def test_older_metadata_after_newer(plant: Plant, device: FakeDevice):
    old = plant.bundle(device.id)
    plant.clock.offset += 60 * SECOND
    plant.want(device.id)
    device.refresh(plant.bundle(device.id))
    with device.refusing("update.metadata_rollback"):
        device.refresh(old)


@pytest.mark.parametrize("lost", [("verified",), ("marks.db",)])
def test_older_metadata_after_local_state_was_zeroed(plant: Plant, device: FakeDevice, lost: tuple[str, ...]):
    """Either witness is enough: the marks remember, and so do the stored metadata."""
    old = plant.bundle(device.id)
    plant.clock.offset += 60 * SECOND
    plant.want(device.id)
    newest = plant.bundle(device.id)
    device.refresh(newest)
    device.wipe(*lost)
    with device.refusing("update.metadata_rollback"):
        device.refresh(old)
    assert device.refresh(newest).desired.models == ()


def test_damaged_marks_are_rebuilt(plant: Plant, device: FakeDevice):
    old = plant.bundle(device.id)
    plant.clock.offset += 60 * SECOND
    plant.want(device.id)
    marks = device.layout.tuf / "marks.db"
    marks.write_bytes(b"not a database, but long enough to be taken for one" * 100)
    device.refresh(plant.bundle(device.id))
    assert MarkStore(marks).read()["director", "timestamp"].version
    with device.refusing("update.metadata_rollback"):
        device.refresh(old)


def test_older_releases_under_newer_signatures(plant: Plant, device: FakeDevice, thief: OnlineKeys):
    """With all online keys: a fresh snapshot that puts back release metadata from before a floor."""
    old = plant.releases.current()
    plant.release(version="1.1.0", counter=2, floor=2)
    plant.want(device.id, ("pump", "1.1.0"))
    device.refresh(plant.bundle(device.id))
    plant.clock.offset += 60 * SECOND
    bundle = plant.bundle(device.id)
    with device.refusing("update.metadata_rollback"):
        device.refresh(replace(bundle, image=publish(plant, thief, old)))


def test_expired_metadata(plant: Plant, device: FakeDevice, thief: OnlineKeys):
    wanted = plant.want(device.id)
    past = plant.clock() - 8 * DAY
    fresh = plant.device("device-0009")
    with device.refusing("update.metadata_expired"):
        device.refresh(direct(plant, thief, wanted, now=past))
    with fresh.refusing("update.metadata_expired"):
        fresh.refresh(direct(plant, thief, replace(wanted, device=fresh.id), now=past))


def test_a_frozen_repository_expires(plant: Plant, device: FakeDevice):
    """Whoever hands out the same bundle for ever stops changes, and only for as long as it is valid."""
    frozen = plant.bundle(device.id)
    device.refresh(frozen, now=plant.clock() + 6 * DAY)
    with device.refusing("update.metadata_expired"):
        device.refresh(frozen, now=plant.clock() + 8 * DAY)


def test_time_before_the_last_signed_time_is_not_believed(
    plant: Plant, device: FakeDevice, thief: OnlineKeys
):
    wanted = plant.want(device.id)
    plant.clock.offset += 10 * DAY
    ahead = direct(plant, thief, wanted)
    ahead = replace(ahead, image=publish(plant, thief, plant.releases.current()))
    outcome = device.refresh(ahead, now=0)
    assert outcome.time_floor > plant.clock() - DAY
    short = director.build(
        wanted, Metadata.from_bytes(ahead.director.timestamp).signed.version, plant.clock() - 8 * DAY, thief
    )
    with device.refusing("update.metadata_expired"):
        device.refresh(replace(ahead, director=with_director(ahead.director, short)), now=0)


def test_mix_and_match(plant: Plant, device: FakeDevice):
    old = plant.bundle(device.id)
    plant.clock.offset += 60 * SECOND
    plant.want(device.id)
    new = plant.bundle(device.id)
    for part in ("targets", "snapshot"):
        mixed = replace(new, director=replace(new.director, **{part: getattr(old.director, part)}))
        with device.refusing("update.metadata_inconsistent"):
            device.refresh(mixed)


def test_releases_of_another_time(plant: Plant, device: FakeDevice):
    old = plant.bundle(device.id)
    plant.release(version="1.1.0", counter=2)
    new = plant.bundle(device.id)
    with device.refusing("update.metadata_inconsistent"):
        device.refresh(replace(new, image=replace(new.image, delegated=old.image.delegated)))


def test_an_unreleased_model(plant: Plant, device: FakeDevice, thief: OnlineKeys):
    """The promise: all online keys together cannot make a device run what was not released."""
    evil = b"evil"
    wanted = Desired(
        v=1,
        device=device.id,
        revision=99,
        models=(
            ModelAssignment(
                model_name="pump",
                version="6.6.6",
                role=Role.ACTIVE,
                manifest_path="models/pump/6.6.6/manifest.json",
                manifest_sha256=hashlib.sha256(evil).hexdigest(),
                manifest_length=len(evil),
                release_counter=99,
            ),
        ),
    )
    with device.refusing("update.not_released"):
        device.refresh(direct(plant, thief, wanted))


def test_a_release_signed_with_online_keys(plant: Plant, device: FakeDevice, thief: OnlineKeys, keys: Keys):
    package = plant.package(version="6.6.6", counter=99)
    for online in ("image-snapshot", "image-timestamp", "director-targets"):
        forged = plant.sign_release(package, key=online)
        found = replace(plant.releases.current(), release=forged)
        bundle = replace(plant.bundle(device.id), image=publish(plant, thief, found))
        with device.refusing("update.metadata_invalid"):
            device.refresh(bundle)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("manifest_sha256", "0" * 64),
        ("manifest_length", 7),
        ("release_counter", 7),
        ("manifest_path", "models/other/1.0.0/manifest.json"),
    ],
)
def test_director_and_release_disagree(
    plant: Plant, device: FakeDevice, thief: OnlineKeys, field: Any, value: Any
):
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    lie = replace(wanted.models[0], **{field: value})
    with device.refusing("update.repositories_disagree") as caught:
        device.refresh(direct(plant, thief, replace(wanted, models=(lie,))))
    assert field.removeprefix("manifest_") in caught.value.detail


def test_below_the_floor(plant: Plant, device: FakeDevice, thief: OnlineKeys):
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    plant.release(version="1.1.0", counter=2, floor=2)
    with device.refusing("update.below_floor"):
        device.refresh(direct(plant, thief, wanted))


def test_one_version_with_two_contents(plant: Plant, device: FakeDevice, thief: OnlineKeys):
    plant.want(device.id, ("pump", "1.0.0"))
    bundle = plant.bundle(device.id)
    device.refresh(bundle)
    version = Metadata.from_bytes(bundle.director.timestamp).signed.version
    other = director.build(
        Desired(v=1, device=device.id, revision=9), version - 1, (version - 1) * SECOND, thief
    )
    assert other.version == version
    with device.refusing("update.metadata_invalid") as caught:
        device.refresh(replace(bundle, director=with_director(bundle.director, other)))
    assert "another content" in caught.value.detail


def test_oversized(plant: Plant, device: FakeDevice):
    with device.refusing("update.metadata_too_large"):
        device.refresh(b"\0" * (MAX_BUNDLE + 1))
    bundle = plant.bundle(device.id)
    with device.refusing("update.metadata_too_large"):
        device.refresh(replace(bundle, director=replace(bundle.director, timestamp=b" " * 20_000)))


@pytest.mark.parametrize("raw", [b"", b"\xff" * 40, b"\x80", msgspec.msgpack.encode({"director": 1})])
def test_not_a_bundle(device: FakeDevice, raw: bytes):
    with device.refusing("update.metadata_invalid"):
        device.refresh(raw)


@pytest.mark.parametrize(
    "field", [{"roots": ()}, {"delegated": {}}, {"timestamp": b"{}"}, {"snapshot": b"\xff\xfe"}]
)
def test_a_bundle_with_a_hole(plant: Plant, device: FakeDevice, field: Any):
    bundle = plant.bundle(device.id)
    with pytest.raises(PitheadError) as caught:
        device.refresh(replace(bundle, image=replace(bundle.image, **field)))
    assert caught.value.code in {"update.metadata_invalid", "update.metadata_inconsistent"}


def test_unknown_fields_are_ignored_and_wrong_ones_named(
    plant: Plant, device: FakeDevice, thief: OnlineKeys, monkeypatch: pytest.MonkeyPatch
):
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    original = director.document

    def extended(extra: dict[str, Any]) -> Callable[[Desired], bytes]:
        return lambda document: msgspec.json.encode(msgspec.to_builtins(document) | extra)

    monkeypatch.setattr(director, "document", extended({"from_the_future": {"a": [1]}}))
    assert device.refresh(direct(plant, thief, wanted)).desired == wanted
    plant.clock.offset += 60 * SECOND
    monkeypatch.setattr(director, "document", extended({"models": [{"model_name": 7}]}))
    with device.refusing("update.metadata_invalid") as caught:
        device.refresh(direct(plant, thief, wanted))
    assert "$.models[0]" in caught.value.detail
    monkeypatch.setattr(director, "document", extended({"v": 2}))
    with device.refusing("message.unsupported_version"):
        device.refresh(direct(plant, thief, wanted))
    monkeypatch.setattr(director, "document", original)


def test_stolen_online_keys_cannot_strand_the_fleet(
    plant: Plant, device: FakeDevice, thief: OnlineKeys, keys: Keys
):
    """Versions of 2^60 and times far ahead lose their force once the roots have replaced the stolen keys."""
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    bundle = plant.bundle(device.id)
    ahead = plant.clock() + 300 * DAY
    built = director.build(wanted, 2**60, ahead, thief)
    stolen = publish(plant, thief, plant.releases.current(), ahead)
    device.refresh(replace(bundle, director=with_director(bundle.director, built), image=stolen))
    with device.refusing("update.metadata_rollback"):
        device.refresh(bundle)

    new = keys | {name: CryptoSigner.generate_ed25519() for name in ONLINE}
    roots = {}
    for repository, files in (("director", bundle.director), ("image", bundle.image)):
        root = Metadata.from_bytes(sign_metadata(new, utc_now())[f"{repository}/1.root.json"]).signed
        root.version = 2
        second = sign(root, [keys[f"{repository}-root-1"], keys[f"{repository}-root-3"]])
        roots[repository] = (*files.roots, second)
    healed = replace(
        with_director(bundle.director, director.build(wanted, 0, plant.clock(), OnlineKeys(new))),
        roots=roots["director"],
    )
    released = replace(plant.releases.current(), roots=roots["image"], snapshot=None, timestamp=None)
    image_part = publish(plant, OnlineKeys(new), released)
    assert device.refresh(Bundle(director=healed, image=image_part)).desired == wanted
    with device.refusing("update.metadata_rollback"):
        device.refresh(bundle)


def test_an_expired_root_blocks_changes(plant: Plant, device: FakeDevice, thief: OnlineKeys, keys: Keys):
    root = Metadata.from_bytes(plant.bundle(device.id).image.roots[0]).signed
    root.version = 2
    root.expires = utc_now() - dt.timedelta(days=1)
    second = sign(root, [keys["image-root-1"], keys["image-root-2"]])
    bundle = plant.bundle(device.id)
    with device.refusing("update.metadata_expired"):
        device.refresh(replace(bundle, image=replace(bundle.image, roots=(*bundle.image.roots, second))))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(data=st.data())
def test_no_mutation_is_accepted_or_crashes(plant: Plant, device: FakeDevice, data: st.DataObject):
    """Any change of any bit ends in a code of ours, or changes nothing that was signed."""
    raw = bytearray(plant.director.bundle(device.id)[0])
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= 1 << data.draw(st.integers(0, 7))
    before = device.state()
    code = None
    try:
        outcome = device.refresh(bytes(raw))
    except PitheadError as error:
        code = error.code
    if code is None:
        assert outcome.desired == wanted
    else:
        assert code.startswith("update.")
        assert device.state() == before
