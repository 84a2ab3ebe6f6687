"""Publishing: what the registry takes, what it refuses, and that a refusal leaves no trace."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from tuf.api.metadata import Metadata, TargetFile

from contract.bundle import Bundle
from contract.errors import PitheadError
from contract.messages import ModelAssignment, Role
from control_plane.cli.release import extend, trusted_release
from control_plane.services import admission, desired
from control_plane.services.releases import assignment
from control_plane.services.staging import FORGOTTEN_S, SPARE_S
from control_plane.signing import image
from control_plane.store import desired as desired_store
from control_plane.store import tuf
from provisioning.keys import ROOT_DAYS, TARGETS_DAYS, Keys, sign
from tests.services import wait_for
from tests.trust.conftest import DAY, SECOND, Plant

DEVICE = "device-0001"


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.xdist_group("postgres"))])
def either(request: pytest.FixtureRequest, make_plant: Callable[[str], Plant], tmp_path: Path) -> Plant:
    """Return a plant on each of the two databases."""
    if request.param == "sqlite":
        return make_plant(f"sqlite:///{tmp_path}/pithead.db")
    return make_plant(request.getfixturevalue("postgres_database"))


def refused(
    code: str, plant: Plant, metadata: bytes, name: str = "pump", version: str = "1.0.0"
) -> PitheadError:
    """Publish, expect a refusal, and check that nothing of it stands."""
    before = (plant.releases.models(), plant.releases.current())
    with pytest.raises(PitheadError) as caught:
        plant.releases.publish("tester", name, version, metadata)
    assert caught.value.code == code, caught.value
    assert (plant.releases.models(), plant.releases.current()) == before
    assert not list(plant.staging.directory.glob("admit-*"))
    return caught.value


def test_a_release_stands(either: Plant) -> None:
    package = either.release(floor=1)
    found = either.releases.version("pump", "1.0.0")
    assert found.record.release_counter == 1
    assert found.record.released_by == "tester"
    assert found.report == {"valid": True}
    assert {file.path: (file.length, file.sha256) for file in found.files} == package.files
    assert either.releases.model("pump").min_release_counter == 1
    for _, sha256 in package.files.values():
        assert hashlib.sha256((either.releases.objects / sha256).read_bytes()).hexdigest() == sha256
    assert not [path for path in either.staging.directory.iterdir() if path.is_file()]
    assert len(either.admitted) == 1


def test_a_wrong_key(plant: Plant) -> None:
    package = plant.package()
    plant.upload(package)
    for key in ("image-targets-1", "image-root-1", "image-snapshot", "director-targets"):
        refused("release.signature_invalid", plant, plant.sign_release(package, key=key))
    assert plant.admitted == [], "nothing is opened before the signature holds"


def test_a_changed_signature(plant: Plant) -> None:
    package = plant.package()
    plant.upload(package)
    metadata = plant.sign_release(package)
    assert metadata.count(b'"version":1') == 1
    refused("release.signature_invalid", plant, metadata.replace(b'"version":1', b'"version":2'))
    refused("request.invalid", plant, b"{}")
    refused("request.invalid", plant, plant.releases.current().roots[0])


def test_a_file_that_was_not_uploaded(plant: Plant) -> None:
    package = plant.package()
    refused("package.file_missing", plant, plant.sign_release(package))


def test_a_file_that_changed_after_its_upload(plant: Plant) -> None:
    package = plant.package()
    plant.upload(package)
    _, sha256 = package.files["model.onnx"]
    plant.staging.path(sha256).write_bytes(b"something else")
    refused("package.file_mismatch", plant, plant.sign_release(package))


def test_an_upload_with_another_hash(plant: Plant) -> None:
    with plant.releases.stage("0" * 64) as upload:
        upload.write(b"data")
        with pytest.raises(PitheadError) as caught:
            upload.finish()
    assert caught.value.code == "package.file_mismatch"
    assert list(plant.staging.directory.iterdir()) == []


def test_the_quota(plant: Plant) -> None:
    plant.staging.quota_bytes = 1000
    with plant.releases.stage("0" * 64) as upload:
        upload.write(b"x" * 900)
        with pytest.raises(PitheadError) as caught:
            upload.write(b"x" * 101)
    assert caught.value.code == "request.too_large"
    content = b"y" * 900
    with plant.releases.stage(hashlib.sha256(content).hexdigest()) as upload:
        upload.write(content)
        upload.finish()


def test_forgotten_uploads_go(plant: Plant) -> None:
    """By themselves after a day, and as soon as their room is needed after an hour; never while new."""
    plant.staging.quota_bytes = 1000
    old, new = (hashlib.sha256(content).hexdigest() for content in (b"o" * 600, b"n" * 600))

    def put(sha256: str, content: bytes) -> None:
        with plant.releases.stage(sha256) as upload:
            upload.write(content)
            upload.finish()

    def age(sha256: str, seconds: float) -> None:
        path = plant.staging.path(sha256)
        os.utime(path, (time.time() - seconds, time.time() - seconds))

    put(old, b"o" * 600)
    with pytest.raises(PitheadError, match="gives way after 60 minutes") as caught:
        put(new, b"n" * 600)
    assert "quota_bytes" in caught.value.detail
    age(old, SPARE_S + 1)
    assert plant.releases.sweep() == 0
    put(new, b"n" * 600)
    assert [path.name for path in plant.staging.directory.iterdir()] == [new]
    age(new, FORGOTTEN_S + 1)
    assert plant.releases.sweep() == 1
    assert list(plant.staging.directory.iterdir()) == []


def test_a_version_never_changes(plant: Plant) -> None:
    plant.release()
    package = plant.package(counter=2, payload=b"other weights")
    plant.upload(package)
    metadata = plant.sign_release(package)
    refused("release.exists", plant, metadata)


def test_release_counters_rise(plant: Plant) -> None:
    plant.release(counter=5)
    package = plant.package(version="1.1.0", counter=5)
    plant.upload(package)
    refused("release.counter_not_rising", plant, plant.sign_release(package), version="1.1.0")
    plant.release("other", "1.0.0", 1)
    plant.release(version="1.2.0", counter=6)


def test_of_two_releasers_one_must_sign_again(either: Plant) -> None:
    first, second = either.package("first"), either.package("second")
    for package in (first, second):
        either.upload(package)
    metadata = {package.manifest.name: either.sign_release(package) for package in (first, second)}
    either.releases.publish("tester", "first", "1.0.0", metadata["first"])
    refused("request.conflict", either, metadata["second"], "second")
    either.releases.publish("tester", "second", "1.0.0", either.sign_release(second))


def test_metadata_must_be_about_the_version_that_is_named(plant: Plant) -> None:
    package = plant.package()
    plant.upload(package)
    refused("request.invalid", plant, plant.sign_release(package), version="1.0.1")


def test_released_files_stay_as_they_are(plant: Plant, keys: Keys) -> None:
    plant.release()
    package = plant.package(version="1.1.0", counter=2)
    plant.upload(package)
    for change, code in (("drop", "request.conflict"), ("alter", "request.invalid")):
        current = trusted_release(
            plant.releases.current().release, [keys["release-1"]], roots=[], targets=b"", root=None
        )
        extend(current, package, None)
        path = "models/pump/1.0.0/model.onnx"
        if change == "drop":
            del current.targets[path]
        else:
            current.targets[path] = current.targets["models/pump/1.1.0/model.onnx"]
        refused(code, plant, sign(current, [keys["release-1"]]), version="1.1.0")


def test_no_version_of_the_release_metadata_comes_again_after_a_restored_database(plant: Plant) -> None:
    """Versions are times: what is signed on an older state is above all that the lost one has given out."""
    package = plant.package()
    plant.upload(package)
    before = int(time.time())
    lost = Metadata[Any].from_bytes(plant.sign_release(package)).signed.version  # devices have seen it
    assert lost >= before
    wait_for(lambda: int(time.time()) > lost, "the next second")
    package = plant.package(payload=b"other weights")
    plant.upload(package)
    plant.releases.publish("tester", "pump", "1.0.0", plant.sign_release(package))
    assert image.version_of(plant.releases.current().release) > lost


def test_a_releaser_whose_clock_is_years_ahead_is_refused(plant: Plant, keys: Keys) -> None:
    """All later versions would have to be above it."""
    package = plant.package()
    plant.upload(package)
    current = trusted_release(
        plant.releases.current().release, [keys["release-1"]], roots=[], targets=b"", root=None
    )
    extend(current, package, None)
    current.version += 10 * 365 * 86_400
    error = refused("request.invalid", plant, sign(current, [keys["release-1"]]))
    assert "clock" in error.detail


def test_release_metadata_that_no_device_takes_are_refused(plant: Plant, keys: Keys) -> None:
    package = plant.package()
    plant.upload(package)
    current = trusted_release(
        plant.releases.current().release, [keys["release-1"]], roots=[], targets=b"", root=None
    )
    extend(current, package, None)
    for number in range(25_000):
        path = f"models/pump/1.0.0/{number:064d}"
        current.targets[path] = TargetFile(1, {"sha256": "0" * 64}, path)
    refused("request.too_large", plant, sign(current, [keys["release-1"]]))


def test_the_floor_never_falls_nor_stands_above_the_newest(either: Plant) -> None:
    either.release(counter=3, floor=2)
    package = either.package(version="1.1.0", counter=4)
    either.upload(package)
    for floor in (1, 5):
        refused("request.invalid", either, either.sign_release(package, floor=floor), version="1.1.0")
    either.releases.publish("tester", "pump", "1.1.0", either.sign_release(package, floor=4))
    with either.database.reading() as tx, pytest.raises(PitheadError) as caught:
        assignment(tx, "pump", "1.0.0")
    assert caught.value.code == "update.below_floor"


def test_files_that_the_manifest_does_not_name(plant: Plant, keys: Keys) -> None:
    package = plant.package()
    plant.upload(package)
    extra = replace(package, files=package.files | {"../../../etc/cron": package.files["model.onnx"]})
    refused("package.file_mismatch", plant, plant.sign_release(extra))


def test_what_its_admission_refuses(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def admit(_directory: Path) -> dict[str, object]:
        raise PitheadError("release.not_admitted", "probe.crashed: signal 11")

    monkeypatch.setattr(plant.releases, "_admit", admit)
    package = plant.package()
    plant.upload(package)
    error = refused("release.not_admitted", plant, plant.sign_release(package))
    assert "probe.crashed" in error.detail
    assert list(plant.staging.directory.iterdir()) == []  # the room is there for a better one


def test_the_real_admission_refuses_a_file_that_is_no_model(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plant.releases, "_admit", admission.validate)
    package = plant.package()
    plant.upload(package)
    refused("release.not_admitted", plant, plant.sign_release(package))


def test_admission_may_insist_on_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models validate` is asked to refuse where it cannot confine what opens the model."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho "{\\"valid\\": true, \\"said\\": \\"$*\\"}"\n')
    program.chmod(0o755)
    monkeypatch.setattr(admission.sys, "executable", str(program))
    assert "--require-sandbox" in admission.validate(tmp_path, require_sandbox=True)["said"]
    assert "--require-sandbox" not in admission.validate(tmp_path)["said"]


def test_an_upload_mends_a_released_file(either: Plant) -> None:
    package = either.release()
    _, sha256 = package.files["model.onnx"]
    stored = either.releases.objects / sha256
    good = stored.read_bytes()
    stored.write_bytes(b"tampered")
    either.upload(package)
    assert stored.read_bytes() == good


def test_desired_documents(either: Plant) -> None:
    either.release()
    with either.database.reading() as tx:
        assert desired.read(tx, DEVICE).revision == 0
    first = either.want(DEVICE, ("pump", "1.0.0"))
    assert first.revision == 1
    assert either.want(DEVICE, ("pump", "1.0.0")) == first, "nothing changed, nothing rises"
    with either.database.transaction() as tx:
        assert desired.dirty(tx) == [(DEVICE, 1)]
    second = either.want(DEVICE)
    with either.database.transaction() as tx:
        desired.clear(tx, DEVICE, first.revision)
        assert desired.dirty(tx) == [(DEVICE, 2)], "an older revision does not clear a newer"
        desired.clear(tx, DEVICE, second.revision)
        assert desired.dirty(tx) == []
        assert desired_store.read_all(tx) == [second]


def test_the_director_signs_once_per_change_and_before_expiry(either: Plant) -> None:
    raw, etag = either.director.bundle(DEVICE)
    assert etag == hashlib.sha256(raw).hexdigest()
    assert either.director.bundle(DEVICE) == (raw, etag)
    assert either.director.unchanged(DEVICE, etag)
    assert either.director.hint(DEVICE).sha256 == etag
    either.want(DEVICE, model())
    assert not either.director.unchanged(DEVICE, etag)
    changed, _ = either.director.bundle(DEVICE)
    assert version(changed) > version(raw)
    either.clock.offset += 4 * DAY
    renewed, newer = either.director.bundle(DEVICE)
    assert version(renewed) > version(changed)
    assert either.director.hint(DEVICE).version == version(renewed)
    assert either.director.unchanged(DEVICE, newer)


def test_other_devices_do_not_change_a_bundle(plant: Plant) -> None:
    bundle = plant.director.bundle(DEVICE)
    plant.want("device-0002", model())
    plant.director.bundle("device-0002")
    assert plant.director.bundle(DEVICE) == bundle


def test_versions_rise_within_one_second_and_after_a_lost_database(either: Plant) -> None:
    versions = []
    for revision in range(4):
        either.want(DEVICE, model(revision))
        versions.append(version(either.director.bundle(DEVICE)[0]))
    assert versions == sorted(set(versions))
    with either.database.transaction() as tx:
        tx.connection().exec_driver_sql("DELETE FROM director_files")
    either.clock.offset += 10 * SECOND
    assert version(either.director.bundle(DEVICE)[0]) > versions[-1]


def test_one_version_never_gets_two_contents(either: Plant) -> None:
    content = either.releases.current().timestamp
    assert content is not None
    number = image.version_of(content)
    with either.database.transaction() as tx:
        assert tuf.put(tx, "image", "timestamp", number, content, 0) is False
    with pytest.raises(PitheadError), either.database.transaction() as tx:
        tuf.put(tx, "image", "timestamp", number, content + b" ", 0)
    either.director.bundle(DEVICE)
    with either.database.reading() as tx:
        record = tuf.director(tx, DEVICE)
    assert record is not None
    with pytest.raises(PitheadError), either.database.transaction() as tx:
        tuf.put_director(tx, DEVICE, record)


def test_the_image_repository_is_renewed_before_it_expires(either: Plant) -> None:
    before = either.releases.current()
    assert either.images.renew() is False
    either.clock.offset += 4 * DAY
    assert either.images.renew() is True
    after = either.releases.current()
    assert image.version_of(after.timestamp) > image.version_of(before.timestamp)
    assert (after.targets, after.release, after.roots) == (before.targets, before.release, before.roots)
    for _ in range(12):
        either.clock.offset += 4 * DAY
        either.images.renew()
    with either.database.reading() as tx:
        assert len(tuf.all_versions(tx, "image", "timestamp")) == 8


def test_a_database_of_another_ceremony(plant: Plant) -> None:
    path = plant.tuf / "image/1.targets.json"
    path.write_bytes(path.read_bytes().replace(b'"sig":"', b'"sig":"00', 1))
    with pytest.raises(PitheadError) as caught:
        plant.images.prepare()
    assert caught.value.code == "config.invalid"
    assert "1.targets.json" in caught.value.detail


def test_what_people_must_sign_again_is_told_in_time(plant: Plant) -> None:
    assert plant.images.warn() == []
    plant.release()
    shown = plant.tuf / "image" / "newest.release.json"
    assert shown.read_bytes() == plant.releases.current().release
    plant.images.prepare()  # it is not taken for a file of the ceremony
    plant.clock.offset = (TARGETS_DAYS - 80) * DAY
    assert plant.images.warn() == ["image targets", "release metadata"]
    plant.clock.offset = (ROOT_DAYS - 80) * DAY
    assert len(plant.images.warn()) == 4


def test_a_new_release_follows_a_restart(plant: Plant) -> None:
    plant.release()
    plant.images.prepare()
    assert image.version_of(plant.releases.current().release) > 1


def test_a_releaser_believes_release_keys_only(plant: Plant, keys: Keys) -> None:
    """The server could slip in a target of its own, to be signed with the next release."""
    plant.release()
    current = plant.releases.current()
    signed = Metadata.from_bytes(current.release).signed
    forged = sign(signed, [keys["image-snapshot"]])
    arguments = {"roots": list(current.roots), "targets": current.targets}
    for root in (None, current.roots[0]):
        assert trusted_release(current.release, [keys["release-1"]], root=root, **arguments) == signed
        with pytest.raises(PitheadError) as caught:
            trusted_release(forged, [keys["release-1"]], root=root, **arguments)
        assert caught.value.code == "release.signature_invalid"
    with pytest.raises(PitheadError, match="--root"):
        trusted_release(current.release, [keys["director-root-1"]], root=None, **arguments)
    changed = current.release.replace(b'"release_counter":1', b'"release_counter":9')
    with pytest.raises(PitheadError, match="changed"):
        trusted_release(changed, [keys["release-1"]], root=None, **arguments)


def model(activation: int = 0) -> ModelAssignment:
    return ModelAssignment(
        model_name="pump",
        version="1.0.0",
        role=Role.ACTIVE,
        manifest_path="models/pump/1.0.0/manifest.json",
        manifest_sha256="0" * 64,
        manifest_length=1,
        release_counter=1,
        activation=activation,
    )


def version(raw: bytes) -> int:
    bundle = msgspec.msgpack.decode(raw, type=Bundle)
    return image.version_of(bundle.director.timestamp)
