"""Reading and checking packages: each mistake is named where it is."""

import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import package as package_rules
from contract.errors import PitheadError
from contract.manifest import Manifest
from models import package

Built = Callable[[str, str], tuple[Path, Manifest]]


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> tuple[Path, Manifest]:
    directory, manifest = built("host-health", "baseline")
    shutil.copytree(directory, tmp_path / "package")
    return tmp_path / "package", manifest


def tree(manifest: Manifest) -> dict:
    return msgspec.json.decode(msgspec.json.encode(manifest))


def put(document: dict, path: str, value: object) -> dict:
    """Set one field, named as in ``a.0.b``."""
    at: object = document
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for key in parents:
        at = at[key]  # type: ignore[index]
    at[last] = value  # type: ignore[index]
    return document


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("name", "Host Health", "$.name"),
        ("version", "1", "$.version"),
        ("release_counter", 0, "$.release_counter"),
        ("format", 2, "$.format"),
        ("variants", [], "$.variants"),
        ("variants.0.format", "pickle", "$.variants[0].format"),
        ("variants.0.file.path", "../model", "$.variants[0].file.path"),
        ("variants.0.file.path", "/etc/passwd", "$.variants[0].file.path"),
        ("variants.0.file.path", "manifest.json", "$.variants[0].file.path"),
        ("variants.0.file.sha256", "abc", "$.variants[0].file.sha256"),
        ("variants.1.name", "int8-tflite", "$.variants[1].name"),
        ("variants.1.file.path", "int8.tflite", "$.variants[1].file"),
        ("variants.0.inputs.0.datatype", "COMPLEX", "$.variants[0].inputs[0].datatype"),
        ("variants.0.inputs.0.shape", [-1, 35], "$.variants[0].inputs[0].shape"),
        ("variants.0.inputs.0.scale", -1.0, "$.variants[0].inputs[0].scale"),
        ("variants.0.golden.vectors", 0, "$.variants[0].golden.vectors"),
        ("variants.0.golden.tolerance", {"outptu": {"atol": 1.0}}, "$.variants[0].golden.tolerance"),
        ("variants.0.golden.tolerance", {"output": {"atol": -1.0}}, "$.variants[0].golden.tolerance"),
        ("variants.0.accelerators", [], "$.variants[0].accelerators"),
        ("pipeline.mean", [0.0], "$.pipeline.mean"),
        ("pipeline.scale.3", 0.0, "$.pipeline.scale[3]"),
        ("pipeline.window", 5, "$.variants[0].inputs[0].shape"),
        ("pipeline.clip", 0.0, "$.pipeline.clip"),
        ("pipeline.channels.1.name", "cpu_percent", "$.pipeline.channels"),
        ("pipeline.fit.mean_range", [[0.0, 1.0]], "$.pipeline.fit.mean_range"),
        ("pipeline.fit.scale_range.2", [2.0, 1.0], "$.pipeline.fit.scale_range[2]"),
        ("pipeline.fit.samples", 1, "$.pipeline.fit.samples"),
        ("pipeline.fit.threshold_range", [2.0, 1.0], "$.pipeline.fit.threshold_range"),
        ("reference.channels", {"fan": {"values": [0.0]}}, "$.reference.channels"),
        ("score", None, "$.score"),
        ("score.method", "guess", "$.score.method"),
        ("budget.latency_ms", "soon", "$.budget.latency_ms"),
        ("budget.latency_ms", -1.0, "$.budget.latency_ms"),
        ("name", "host-health\n", "$.name"),
        ("version", "\uff11.0.0", "$.version"),
        ("variants.0.file.path", "int8.tflite\n", "$.variants[0].file.path"),
        ("release_counter", 2**63, "$.release_counter"),
        ("variants.0.file.path", "int8.onnx/model", "$.variants"),
        ("variants.0.file.path", "manifest.json/model", "$.variants"),
        ("variants.0.accelerators", ["cpu", "cpu"], "$.variants[0].accelerators[1]"),
        ("variants.0.accelerators", ["cpu"] * 10_000, "$.variants[0].accelerators"),
        ("variants.0.inputs.0.shape", [36, -1], "$.variants[0].inputs[0].shape"),
        ("variants.0.inputs.0.shape", [-1, 0], "$.variants[0].inputs[0].shape"),
        ("variants.0.outputs.0.shape", [-1, 35], "$.variants[0].outputs[0].shape"),
        ("variants.0.outputs.0.shape", [2**80], "$.variants[0].outputs[0].shape[0]"),
        ("variants.0.inputs.0.zero_point", 2**90, "$.variants[0].inputs[0].zero_point"),
        ("variants.0.golden.vectors", 2**60, "$.variants[0].golden.vectors"),
        (
            "variants.0.golden.tolerance",
            {"output": {"atol": 1e300}},
            "$.variants[0].golden.tolerance[...].atol",
        ),
        ("pipeline.sample_rate_hz", -1.0, "$.pipeline.sample_rate_hz"),
        ("pipeline.sample_rate_hz", 0.0, "$.pipeline.sample_rate_hz"),
        ("pipeline.sample_rate_hz", 1e300, "$.pipeline.sample_rate_hz"),
        ("pipeline.scale.3", 1e-300, "$.pipeline.scale[3]"),
        ("pipeline.channels.1.minimum", 101.0, "$.pipeline.channels[1].minimum"),
        ("pipeline.fit.samples", 2**60, "$.pipeline.fit.samples"),
        ("pipeline.fit.margin", 1e300, "$.pipeline.fit.margin"),
        ("score.method", "output", "$.variants[0].outputs[0].shape"),
        ("score.debounce", 2**40, "$.score.debounce"),
        ("reference.score.values", [], "$.reference.score.values"),
    ],
)
def test_a_wrong_field_is_named(copy: tuple[Path, Manifest], path: str, value: object, named: str):
    """Each of these is refused before any file is opened, here, in admission and on the device."""
    directory, manifest = copy
    document = put(tree(manifest), path, value)
    (directory / "manifest.json").write_bytes(msgspec.json.encode(document))
    result = package.validate(directory)
    assert not result.valid
    assert result.code == "package.manifest_invalid"
    assert f"`{named}" in result.detail, result.detail


def test_a_calibration_that_no_memory_holds_is_refused(built: Built):
    document = tree(built("host-health", "baseline")[1])
    values = len(document["pipeline"]["channels"]) * document["pipeline"]["window"]
    document["pipeline"]["fit"]["samples"] = package_rules.MAX_FIT_VALUES // values
    package.parse_manifest(msgspec.json.encode(document))
    document["pipeline"]["fit"]["samples"] += 1
    with pytest.raises(PitheadError, match=r"pipeline\.fit\.samples"):
        package.parse_manifest(msgspec.json.encode(document))


def test_an_unknown_field_is_ignored(copy: tuple[Path, Manifest]):
    directory, manifest = copy
    document = tree(manifest) | {"from_the_future": 1}
    (directory / "manifest.json").write_bytes(msgspec.json.encode(document))
    assert package.read_manifest(directory) == manifest


def test_what_is_no_json_is_invalid(tmp_path: Path):
    for content in (b"", b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "manifest.json").write_bytes(content)
        assert package.validate(tmp_path).code == "package.manifest_invalid"


def test_a_missing_manifest_or_directory_is_named(tmp_path: Path):
    assert package.validate(tmp_path).code == "package.file_missing"
    assert package.validate(tmp_path / "nowhere").code == "package.file_missing"


def test_a_huge_manifest_is_not_read(tmp_path: Path):
    (tmp_path / "manifest.json").write_bytes(b" " * (package.MAX_MANIFEST + 1))
    assert package.validate(tmp_path).code == "package.too_large"


def test_missing_and_changed_files_are_named(copy: tuple[Path, Manifest]):
    directory, manifest = copy
    for ref in manifest.files():
        path = directory / ref.path
        content = path.read_bytes()
        for broken in (content[:-1], content + b"x", bytes([content[0] ^ 1]) + content[1:]):
            path.write_bytes(broken)
            result = package.validate(directory)
            assert result.code == "package.file_mismatch"
            assert ref.path in result.detail
        path.unlink()
        assert package.validate(directory).code == "package.file_missing"
        path.write_bytes(content)
    assert package.validate(directory).valid


def test_a_link_out_of_the_package_is_not_followed(copy: tuple[Path, Manifest]):
    directory, manifest = copy
    path = directory / manifest.variants[0].file.path
    outside = directory.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    assert package.validate(directory).code == "package.file_missing"


def test_validation_names_variant_and_reason_of_a_bad_model(copy: tuple[Path, Manifest]):
    directory, manifest = copy
    first = manifest.variants[0]
    content = (directory / first.file.path).read_bytes()[:-200]
    cut = msgspec.structs.replace(first, file=package.reference_to(first.file.path, content))
    contents = {ref.path: (directory / ref.path).read_bytes() for ref in manifest.files()}
    contents[first.file.path] = content
    package.write(
        directory, msgspec.structs.replace(manifest, variants=(cut, *manifest.variants[1:])), contents
    )
    result = package.validate(directory)
    assert result.code == "inference.load_failed"
    assert "int8-tflite" in result.detail


def test_a_variant_that_cannot_be_tried_here_is_said(copy: tuple[Path, Manifest]):
    directory, manifest = copy
    first = msgspec.structs.replace(manifest.variants[0], accelerators=("edgetpu",))
    contents = {ref.path: (directory / ref.path).read_bytes() for ref in manifest.files()}
    package.write(
        directory, msgspec.structs.replace(manifest, variants=(first, *manifest.variants[1:])), contents
    )
    result = package.validate(directory)
    assert result.valid
    assert result.untried == ("int8-tflite",)


@given(data=st.data())
def test_no_manifest_fails_in_another_way(built: Built, data: st.DataObject):
    """Whatever stands in a field: a manifest, or one error that names a path."""
    document = tree(built("host-health", "baseline")[1])
    node: object = document
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        if data.draw(st.booleans()) or not isinstance(node[key], dict | list):
            strange = (
                st.none()
                | st.integers()
                | st.text()
                | st.floats(allow_nan=False, allow_infinity=False)
                | st.lists(st.integers(), max_size=2)
            )
            node[key] = data.draw(strange)
            break
        node = node[key]
    refusals = []
    try:
        package.parse_manifest(msgspec.json.encode(document))
    except PitheadError as error:
        refusals.append(error)
    assert all(e.code == "package.manifest_invalid" and "$" in e.detail for e in refusals), refusals
