"""Small real packages."""

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from contract.manifest import Budget, Golden, Manifest, Provenance, Variant
from inference.registry import open_session
from models import assemble, dense, golden, package
from models.package import reference_to
from tests.inference.native.build import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def environment() -> Callable[[str], Path]:
    """Return the interpreter of an environment of its own, made on demand of ``requirements/NAME.txt``.

    It stays below ``.venvs`` and is used again while its requirements do not
    change. Python 3.11, for which these runtimes have wheels.
    """
    base = sys.executable if sys.version_info < (3, 12) else shutil.which("python3.11")

    def make(name: str) -> Path:
        if base is None:
            pytest.skip(f"{name} needs Python 3.11, and there is none")
        requirements, directory = ROOT / "requirements" / f"{name}.txt", ROOT / ".venvs" / name
        executable, stamp = directory / "bin" / "python", directory / ".installed"
        digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
        directory.parent.mkdir(exist_ok=True)
        with directory.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # only one test process makes it
            if stamp.is_file() and stamp.read_text() == digest:
                return executable
            shutil.rmtree(directory, ignore_errors=True)
            subprocess.run([base, "-m", "venv", str(directory)], check=True, capture_output=True)
            install = [str(executable), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            done = subprocess.run(
                [*install, "--only-binary=:all:", "--require-hashes", "-r", str(requirements)],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.skip(f"pip cannot install {name} here: {done.stderr.strip()[-300:]}")
            packages = next((directory / "lib").glob("python3*")) / "site-packages"
            (packages / "pithead.pth").write_text(f"{ROOT}\n")
            stamp.write_text(digest)
        return executable

    return make


@pytest.fixture(scope="session")
def network() -> dense.Network:
    rows = np.random.default_rng(3).standard_normal((512, 4))
    return dense.train_autoencoder(rows, dense.Training(hidden=(8, 3, 8), epochs=4, batch=64))


@pytest.fixture(scope="session")
def assembled(network: dense.Network) -> assemble.Assembled:
    rows = np.random.default_rng(4).standard_normal((200, 4))
    integers = dense.quantise_network(network, rows)
    return assemble.assemble(network, integers, rows.astype(np.float32), "test")


@pytest.fixture
def good(assembled: assemble.Assembled, tmp_path: Path) -> tuple[Manifest, dict[str, Path]]:
    """A package of three variants without a pipeline, written to disk."""
    manifest = Manifest(
        format=1,
        name="small",
        version="1.0.0",
        release_counter=1,
        summary="",
        licence="Apache-2.0",
        variants=assembled.variants,
        provenance=Provenance(source="tests", data="random"),
    )
    package.write(tmp_path / "good", manifest, assembled.contents)
    return manifest, package.check_files(tmp_path / "good", manifest)


@pytest.fixture
def single(tmp_path: Path) -> Callable[..., tuple[Manifest, dict[str, Path]]]:
    """Make a package of one model file, whose golden outputs may be given (what the model says, if not)."""

    def make(
        content: bytes,
        model_format: str,
        inputs: dict[str, np.ndarray],
        outputs: dict[str, np.ndarray] | None = None,
        like: Variant | None = None,
        budget: Budget | None = None,
    ) -> tuple[Manifest, dict[str, Path]]:
        if like is None:
            session = open_session(content, model_format)
            vectors = golden.record(session, [inputs])
            specs, results = session.inputs, session.outputs
        else:
            file = tmp_path / "golden.tmp.npz"
            arrays = {f"in:{k}": v[None] for k, v in inputs.items()}
            arrays |= {f"out:{k}": v[None] for k, v in (outputs or {}).items()}
            np.savez(file, allow_pickle=False, **arrays)
            vectors, specs, results = file.read_bytes(), like.inputs, like.outputs
        variant = Variant(
            name="only",
            file=reference_to("model.bin", content),
            format=model_format,  # type: ignore[arg-type]
            quantisation="float32",
            inputs=specs,
            outputs=results,
            golden=Golden(reference_to("golden.npz", vectors), 1, {}),
        )
        manifest = Manifest(
            format=1,
            name="single",
            version="1.0.0",
            release_counter=1,
            summary="",
            licence="Apache-2.0",
            variants=(variant,),
            provenance=Provenance(source="tests", data=""),
            budget=budget or Budget(),
        )
        package.write(tmp_path / "single", manifest, {"model.bin": content, "golden.npz": vectors})
        return manifest, {ref.path: tmp_path / "single" / ref.path for ref in manifest.files()}

    return make


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An external TFLite delegate, built here."""
    return build(tmp_path_factory.mktemp("native"))
