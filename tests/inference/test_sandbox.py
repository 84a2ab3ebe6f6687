"""What a process cannot do any more once it is confined. Each attempt runs in a real child."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

PREAMBLE = """
import ctypes, json, os, socket, sys, threading, mmap, signal, resource
from inference.sandbox import confine
report = confine(memory_bytes=256 * 1024 * 1024, cpu_s=1, parent=os.getppid())
def outcome(attempt):
    try:
        return ["done", str(attempt())]
    except BaseException as error:
        return ["refused", type(error).__name__]
"""


def confined(body: str, timeout: float = 20.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + body], capture_output=True, text=True, timeout=timeout, check=False
    )


def attempt(expression: str) -> list[str]:
    done = confined(f"print(json.dumps(outcome(lambda: {expression})))")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_reports_what_holds():
    done = confined("print(report.level, report.landlock_abi, report.seccomp)")
    assert done.stdout.split()[0] in {"full", "partial", "limits"}


def needs_full() -> None:
    done = confined("print(report.level)")
    if done.stdout.strip() != "full":
        pytest.skip(f"this machine's sandbox is only {done.stdout.strip()!r}")


@pytest.mark.parametrize(
    "expression",
    [
        "open('/etc/hostname').read()",
        "open('/proc/self/status').read()",
        "os.listdir('/')",
        "os.stat('/')",
        "open('/tmp/pithead-sandbox-test', 'w')",
        "os.unlink('/tmp/pithead-sandbox-test')",
        "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)",
        "socket.socketpair()",
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.pipe()",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "bytearray(1 << 30)",
    ],
)
def test_a_confined_process_cannot(expression: str):
    needs_full()
    assert attempt(expression)[0] == "refused"


def test_landlock_alone_hides_the_files():
    body = """
print(json.dumps(outcome(lambda: open('/etc/hostname').read())))
"""
    without = PREAMBLE.replace(
        "from inference.sandbox import confine",
        "sys.modules['pyseccomp'] = None\nfrom inference.sandbox import confine",
    )
    done = subprocess.run([sys.executable, "-c", without + body], capture_output=True, text=True, check=False)
    reported = subprocess.run(
        [sys.executable, "-c", without + "print(report.landlock_abi, report.seccomp, report.level)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert reported[1] == "False"
    if reported[0] == "0":
        pytest.skip("this kernel has no Landlock")
    assert reported[2] == "partial"
    assert json.loads(done.stdout) == ["refused", "PermissionError"]


def test_require_refuses_a_partial_sandbox():
    body = PREAMBLE.replace(
        "from inference.sandbox import confine",
        "sys.modules['pyseccomp'] = None\nfrom inference.sandbox import confine",
    ).replace("parent=os.getppid()", "parent=os.getppid(), require=True")
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert "probe.unconfined" in done.stderr


def test_what_it_needs_still_works():
    assert attempt("sum(bytearray(1 << 20))") == ["done", "0"]
    thread = "[t := threading.Thread(target=lambda: None), t.start(), t.join()] and 'joined'"
    assert attempt(thread) == ["done", "joined"]


def test_cpu_time_is_bounded():
    done = confined("\nwhile True: pass", timeout=30)
    assert done.returncode < 0


def test_it_dies_with_its_parent():
    """The parent is killed; the confined child must not live on."""
    child = PREAMBLE + "print('ready', os.getpid(), flush=True)\nthreading.Event().wait()"
    parent = f"""
import subprocess, sys, os
p = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
print(p.stdout.readline().split()[1], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", parent], capture_output=True, text=True, check=False, timeout=30
    )
    pid = int(done.stdout)
    end = time.monotonic() + 5
    while _alive(pid):
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
