"""What a process cannot do any more once it is confined. Each attempt runs in a real child."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PREAMBLE = """
import ctypes, json, os, platform, socket, sys, threading, mmap, signal, resource
from inference.sandbox import confine
report = confine(memory_bytes=256 * 1024 * 1024, cpu_s=1, parent=os.getppid())
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    numbers = {"tgkill": (234, 131), "sched_setaffinity": (203, 122)}
    answer = libc.syscall(numbers[name][platform.machine() == "aarch64"], *arguments)
    if answer < 0:
        raise OSError(ctypes.get_errno(), name)
def prctl(*arguments):
    if libc.prctl(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "prctl")
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
        "call('tgkill', os.getppid(), os.getppid(), 0)",
        "call('sched_setaffinity', os.getppid(), 8, (ctypes.c_ulong * 1)(1))",
        "prctl(1, 0, 0, 0, 0)",  # live on without the parent
        "prctl(4, 1, 0, 0, 0)",  # be open to debuggers again
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
    # To itself: what `abort` does, so that a crash is a crash.
    assert attempt("call('tgkill', os.getpid(), threading.get_native_id(), 0)") == ["done", "None"]
    assert attempt("call('sched_setaffinity', 0, 8, (ctypes.c_ulong * 1)(1))") == ["done", "None"]
    assert attempt("prctl(15, b'name', 0, 0, 0)") == ["done", "None"]
    thread = "[t := threading.Thread(target=lambda: None), t.start(), t.join()] and 'joined'"
    assert attempt(thread) == ["done", "joined"]


def test_a_crash_is_still_a_crash():
    assert confined("\nos.abort()").returncode == -signal.SIGABRT


def test_landlock_or_not_the_filter_holds():
    """Where the kernel scopes no signals, the filter alone keeps other processes safe."""
    body = """
import ctypes, os, sys
from inference import sandbox
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
sandbox._seccomp_filter().load()
libc.syscall.restype = ctypes.c_long
number = 234 if os.uname().machine == "x86_64" else 131
print(libc.syscall(number, os.getppid(), os.getppid(), 0), libc.prctl(1, 0, 0, 0, 0))
"""
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-1", "-1"]


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
