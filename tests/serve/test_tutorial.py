"""The tutorial's commands and programs work as they stand in ``docs/serving.md``."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import shipped
from tests.serve.environments import environment

pytestmark = [pytest.mark.xdist_group("serve-clients"), pytest.mark.timeout(600)]

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
TUTORIAL = PAGE[PAGE.index("## Five minutes") : PAGE.index("## On a device")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL, re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def shell(place: Path, commands: str) -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=place,
        env={"PATH": f"{tools}:/usr/local/bin:/usr/bin:/bin", "HOME": str(place)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the page is read: with the packages that ``make setup`` builds."""
    directory = tmp_path_factory.mktemp("tutorial")
    shipped.build_apart(shipped.order("shuttle"), directory / "build" / "packages")
    return directory


@pytest.fixture(scope="module")
def port(place: Path) -> Iterator[int]:
    """The first command, on a port that is free."""
    number = free_port()
    command = blocks("bash")[0].removesuffix(" &\n").split()
    assert command[0] == "pithead-agent"
    with subprocess.Popen(
        [str(Path(sys.executable).with_name(command[0])), *command[1:], "--http-port", str(number)],
        cwd=place,
        env={"HOME": str(place), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        end = time.monotonic() + 60
        while shell(place, f"curl -sf localhost:{number}/v2/health/ready").returncode:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        yield number
        process.terminate()


def here(text: str, port: int) -> str:
    assert "localhost:8000" in text
    return text.replace("localhost:8000", f"localhost:{port}").replace("curl ", "curl -sSf ")


def test_asking_with_curl(place: Path, port: int):
    done = shell(place, here(blocks("bash")[1], port))
    assert done.returncode == 0, done.stderr
    assert '"ready":true' in done.stdout
    assert '"datatype":"FP32","shape":[1,9]' in done.stdout
    assert 'outcome="success"} 1' in done.stdout


def test_loading_again(place: Path, port: int):
    done = shell(place, here(blocks("bash")[2], port))
    assert (done.returncode, done.stdout) == (0, "{}"), done.stderr


def test_asking_from_python(port: int):
    done = subprocess.run(
        [str(environment("client-triton")), "-I", "-c", here(blocks("python")[0], port)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[[")


def test_making_tokens(place: Path):
    done = shell(place, blocks("bash")[3].partition("\npithead-agent serve build")[0])
    assert done.returncode == 0, done.stderr
    lines = (place / "tokens").read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [["line-3", "infer"], ["boss", "admin"]]
