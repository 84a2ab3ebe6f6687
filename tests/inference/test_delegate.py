"""External delegates through LiteRT's own loading path, with a small one in C that this builds."""

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from contract.errors import PitheadError
from contract.manifest import Budget, Manifest
from inference import probing
from inference.accelerators import Custom, find, for_format
from inference.circumstances import circumstances, differences
from inference.probing import Limits, choose, probe, probe_file
from inference.registry import open_session
from models.assemble import Assembled

Package = tuple[Manifest, dict[str, Path]]


def settings(library: Path, **options: str | float) -> dict[str, Custom]:
    """The table ``[accelerators.dense]`` of a device."""
    return {"dense": Custom("tflite", str(library), options=options)}


@pytest.fixture
def package(good: Package) -> Package:
    """The float variant alone, made for the delegate and for the CPU."""
    manifest, files = good
    variant = next(v for v in manifest.variants if v.name == "float32-tflite")
    variant = msgspec.structs.replace(variant, accelerators=("dense", "xnnpack", "cpu"))
    return msgspec.structs.replace(manifest, variants=(variant,)), files


@pytest.mark.parametrize(("take", "nodes"), [(64, 4), (2, 2), (1, 1)])
def test_a_delegate_takes_nodes_and_says_which(assembled: Assembled, library: Path, take: int, nodes: int):
    content = assembled.contents["float32.tflite"]
    session = open_session(content, "tflite", find("tflite", "dense", settings(library, take=take)))
    plain = open_session(content, "tflite", "cpu")
    assert session.accelerator == "dense"
    assert session.placement.nodes_on("dense") == nodes
    assert session.placement.nodes == {"dense": {"FULLY_CONNECTED": nodes}} | (
        {"cpu": {"FULLY_CONNECTED": 4 - nodes}} if nodes < 4 else {}
    )
    for rows in (1, 7, 2):
        x = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
        got, want = (s.run({"input": x})["output"] for s in (session, plain))
        np.testing.assert_allclose(got, want, atol=1e-5)
    session.close()


def test_a_delegate_that_takes_nothing_is_not_used(assembled: Assembled, library: Path):
    for name, options in (("float32.tflite", {"take": 0}), ("int8.tflite", {})):
        session = open_session(
            assembled.contents[name], "tflite", find("tflite", "dense", settings(library, **options))
        )
        assert session.accelerator == "cpu"
        assert session.placement.nodes_on("dense") == 0


@pytest.mark.parametrize("options", [{"fail": "no board at the bus"}, {"fial": "x"}])
def test_a_driver_that_does_not_start_has_a_code_and_its_own_words(
    assembled: Assembled, library: Path, options: dict[str, str]
):
    for _ in range(3):  # its end must not call the driver with nothing
        with pytest.raises(PitheadError) as caught:
            open_session(
                assembled.contents["float32.tflite"],
                "tflite",
                find("tflite", "dense", settings(library, **options)),
            )
        assert caught.value.code == "inference.accelerator_missing"
        assert options.get("fail", "not known") in caught.value.detail


def test_what_is_no_delegate_has_a_code(assembled: Assembled, tmp_path: Path):
    text = tmp_path / "libtext.so"
    text.write_text("no library")
    for path in (str(text), str(tmp_path / "none.so"), "libm.so.6"):
        with pytest.raises(PitheadError) as caught:
            open_session(
                assembled.contents["float32.tflite"],
                "tflite",
                find("tflite", "dense", {"dense": Custom("tflite", path)}),
            )
        assert caught.value.code == "inference.accelerator_missing"


def test_the_probe_runs_it_in_the_sandbox_and_shows_its_nodes(package: Package, library: Path):
    manifest, files = package
    reports = probe(manifest, files, custom=settings(library, take=3))
    assert [(r.accelerator, r.code) for r in reports] == [("dense", None), ("xnnpack", None), ("cpu", None)]
    first = reports[0]
    assert (first.placement.nodes_on("dense"), first.placement.total) == (3, 4)
    assert first.sandbox is not None
    assert first.sandbox.opened == ()
    assert first.vectors == 8
    assert first.energy_uj is None or first.energy_uj > 0


def test_a_silent_fall_back_is_refused_and_the_next_is_taken(package: Package, library: Path):
    manifest, files = package
    for options, code, words in (
        ({"take": 0}, "inference.accelerator_missing", "none of the 4 nodes"),
        ({"fail": "no board"}, "inference.accelerator_missing", "no board"),
        ({"gain": 1.5}, "probe.golden_mismatch", "wanted"),
        ({"crash": 1}, "probe.crashed", "SIGABRT"),
    ):
        reports = probe(manifest, files, custom=settings(library, **options), until_settled=True)
        assert reports[0].code == code
        assert words in reports[0].detail
        assert [r.accelerator for r in reports] == ["dense", "xnnpack"]
        assert choose(reports, manifest).accelerator == "xnnpack"


def test_a_slow_accelerator_loses_by_measurement(package: Package, library: Path):
    """It is preferred and right, but the CPU is cheaper; it is not measured longer than needed."""
    manifest, files = package
    reports = probe(manifest, files, custom=settings(library, slow_us=2000), until_settled=True)
    assert reports[0].passed
    assert reports[0].latency_p50_us > 2000
    choice = choose(reports, manifest)
    assert choice.accelerator == "xnnpack"
    assert [r.accelerator for r in reports] == ["dense", "xnnpack"], "nothing is better than XNNPACK here"
    backwards = msgspec.structs.replace(manifest.variants[0], accelerators=("xnnpack", "dense"))
    alone = msgspec.structs.replace(manifest, variants=(backwards,))
    reports = probe(alone, files, custom=settings(library, slow_us=2000))
    assert choose(reports, alone).accelerator == "xnnpack"


def test_a_candidate_that_is_far_behind_is_soon_given_up(package: Package, library: Path):
    manifest, files = package
    limits = Limits(enough_us=100.0)
    report = probe(
        manifest, files, accelerators=["dense"], custom=settings(library, slow_us=5000), limits=limits
    )[0]
    assert report.passed
    assert report.runs <= 10


def test_the_deadline_of_the_manifest_rules_it_out(package: Package, library: Path):
    manifest, files = package
    tight = msgspec.structs.replace(manifest, budget=Budget(latency_ms=1.5))
    reports = probe(tight, files, custom=settings(library, slow_us=2000))
    assert reports[0].code == "probe.over_budget"
    assert choose(reports, tight).accelerator == "xnnpack"


def test_a_manifest_sets_only_what_the_table_allows(package: Package, library: Path):
    manifest, files = package
    variant = msgspec.structs.replace(manifest.variants[0], accelerator_options={"dense": {"gain": "2"}})
    hinted = msgspec.structs.replace(manifest, variants=(variant,))
    report = probe(hinted, files, accelerators=["dense"], custom=settings(library))[0]
    assert report.code == "package.manifest_invalid"
    assert "accelerator_options.dense.gain" in report.detail
    edgetpu = find("tflite", "edgetpu", None, {"device": "usb:0"})
    assert edgetpu.options == {"device": "usb:0"}
    with pytest.raises(PitheadError, match=r"manifest may set \[\]"):
        find("onnx", "xnnpack", None, {"backend_path": "/tmp/evil.so"})


def test_a_bare_file_is_compared_with_the_cpu(assembled: Assembled, library: Path, tmp_path: Path):
    file = tmp_path / "m.tflite"
    file.write_bytes(assembled.contents["float32.tflite"])
    reports = probe_file(file, "tflite", custom=settings(library, gain=3))
    assert [(r.variant, r.accelerator, r.code) for r in reports] == [
        ("m.tflite", "dense", None),
        ("m.tflite", "xnnpack", None),
        ("m.tflite", "cpu", None),
    ]
    assert reports[0].worst["output"] > 0.01
    assert reports[1].worst["output"] < 0.001
    assert reports[2].worst["output"] == 0.0


def test_devices_that_a_driver_opens_stay_open_and_weaken_the_report(package: Package, library: Path):
    manifest, files = package
    custom = {"dense": Custom("tflite", str(library), devices=("/dev/null", "/dev/none-such"))}
    report = probe(manifest, files, accelerators=["dense"], custom=custom)[0]
    assert report.passed, report
    assert report.sandbox is not None
    assert report.sandbox.opened == ("/dev/null",)
    assert report.sandbox.level in {"partial", "limits"}
    strict = probe(manifest, files, accelerators=["dense"], custom=custom, require_sandbox=True)[0]
    assert strict.code == "probe.unconfined"
    absent = {"dense": Custom("tflite", str(library), devices=("/dev/none-such",))}
    assert "dense" not in for_format("tflite", "ai-edge-litert", absent)


def test_another_driver_or_setting_is_another_circumstance(library: Path, tmp_path: Path):
    before = circumstances(settings(library))
    assert circumstances(settings(library)) == before
    assert not differences(before, before)
    assert set(differences(before, circumstances(settings(library, take=1)))) == {"settings accelerators"}
    copy = tmp_path / "libcopy.so"
    copy.write_bytes(library.read_bytes())
    first = circumstances(settings(copy))
    os.utime(copy, (1, 1))
    changed = differences(first, circumstances(settings(copy)))
    assert list(changed) == [f"library {copy}"]
    assert " -> " in changed[f"library {copy}"]


def test_system_and_kernel_modules_count(tmp_path: Path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="x"\nID=debian\nVERSION_ID="12"\n')
    module = tmp_path / "sys/module/apex"
    module.mkdir(parents=True)
    (module / "version").write_text("1.2\n")
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/libedgetpu.so.1").write_bytes(b"abc")
    before = circumstances(root=tmp_path)
    assert before["system"] == "debian 12"
    (module / "version").write_text("1.3\n")
    (tmp_path / "usr/lib/libedgetpu.so.1").write_bytes(b"abcd")
    assert set(differences(before, circumstances(root=tmp_path))) == {
        "module apex",
        "library libedgetpu.so.1",
    }


def test_a_search_that_takes_too_long_ends(package: Package, library: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probing, "SEARCH_S", -1.0)
    manifest, files = package
    reports = probe(manifest, files, custom=settings(library, slow_us=200), until_settled=True)
    assert [r.accelerator for r in reports] == ["dense"]
