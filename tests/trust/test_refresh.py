"""The chain of custody as it should be: what is released and wanted arrives, and nothing else changes."""

from msgspec.structs import replace

from contract.messages import Reporting
from control_plane.services import desired
from tests.trust.conftest import FakeDevice, Plant


def test_a_released_and_wanted_model_is_verified(plant: Plant):
    package = plant.release(floor=1)
    device = plant.device()
    wanted = plant.want(device.id, ("pump", "1.0.0"))
    outcome = device.refresh(plant.bundle(device.id))
    assert outcome.desired == wanted
    assert {
        path.removeprefix("models/pump/1.0.0/"): (f.length, f.sha256) for path, f in outcome.files.items()
    } == (package.files)


def test_a_device_without_models_verifies_too(plant: Plant):
    device = plant.device()
    assert device.refresh(plant.bundle(device.id)).desired.models == ()


def test_fractions_survive_the_canonical_form(plant: Plant, device: FakeDevice):
    with plant.database.transaction() as tx:
        desired.change(tx, device.id, lambda old: replace(old, reporting=Reporting(bucket_s=0.5)))
    assert device.refresh(plant.bundle(device.id)).desired.reporting.bucket_s == 0.5


def test_the_same_bundle_again_writes_nothing(plant: Plant, device: FakeDevice):
    before = {p: p.stat().st_mtime_ns for p in device.layout.tuf.iterdir()}
    device.refresh(plant.bundle(device.id))
    assert {p: p.stat().st_mtime_ns for p in device.layout.tuf.iterdir()} == before
