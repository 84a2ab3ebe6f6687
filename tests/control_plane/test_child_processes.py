"""No child process takes its code from the directory in which somebody happened to start us."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from contract.errors import PitheadError
from control_plane.services import admission
from control_plane.wiring.signer import SignerProcess

ROOT = Path(__file__).parents[2]
UNSAFE = re.compile(r"sys\.executable,\s*\"-m\"")


def start_signer(directory: Path) -> None:
    SignerProcess(directory / "signer.sock", directory / "keys").start()


def admit(directory: Path) -> None:
    admission.validate(directory)


@pytest.mark.parametrize("start", [start_signer, admit])
def test_a_module_in_the_working_directory_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[[Path], None]
) -> None:
    marker = tmp_path / "run"
    for name in ("msgspec", "argparse", "typer"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PitheadError):
        start(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("package", ["agent", "control_plane", "inference", "models", "provisioning"])
def test_no_program_of_ours_is_started_with_the_working_directory_on_its_path(package: str) -> None:
    found = [path for path in (ROOT / package).rglob("*.py") if UNSAFE.search(path.read_text())]
    assert found == []
