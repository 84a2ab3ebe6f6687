"""Confine this process before it opens a model that nobody has opened before.

Called once, in the probe process, after the runtime was imported: what is
loaded stays usable, and nothing new can be opened, started or sent. Each
layer is used where the kernel offers it; the report says which were.

Landlock by its three system calls (``linux/landlock.h``), seccomp by
libseccomp, the rest by ``setrlimit`` and ``prctl``.
"""

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

from contract.errors import PitheadError
from inference.reports import SandboxReport

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_LANDLOCK_CREATE_RULESET: Final = 444
_LANDLOCK_ADD_RULE: Final = 445
_LANDLOCK_RESTRICT_SELF: Final = 446
_LANDLOCK_PATH_BENEATH: Final = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _IOCTL_DEV = 1, 2, 4, 8, 1 << 15
_IOCTL_FROM_ABI: Final = 5
_LANDLOCK_VERSION: Final = 1
_CLONE_THREAD: Final = 0x10000

_FS_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of file-system rights by Landlock ABI; 16 from ABI 5 on."""
_NET_FROM_ABI: Final = 4
_SCOPE_FROM_ABI: Final = 6
_SPARE_FILES: Final = 8
_DRIVER_FILES: Final = 128

ALLOWED_CALLS: Final = (
    # memory
    *("brk", "mmap", "munmap", "mremap", "mprotect", "madvise", "mlock", "munlock", "membarrier"),
    # what is open already
    *("read", "readv", "pread64", "write", "writev", "lseek", "fstat", "close", "poll", "ppoll"),
    # threads of this process
    *("futex", "set_robust_list", "rseq", "sched_yield", "sched_getaffinity", "gettid"),
    *("getpid", "exit", "exit_group", "get_mempolicy"),
    # signals, time, facts
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall"),
    *("clock_gettime", "clock_getres", "clock_nanosleep", "nanosleep", "gettimeofday", "getrandom"),
    *("getrusage", "getcpu", "uname", "sysinfo"),
)
"""All other system calls fail with EPERM, but for what ``_seccomp_filter`` allows with some arguments."""
READ_CALLS: Final = (
    *("openat", "open", "access", "faccessat", "faccessat2", "newfstatat", "stat", "lstat", "statx"),
    *("readlink", "readlinkat", "getdents64", "getcwd", "fcntl"),
)
"""Allowed too where files are to be read. Landlock, where there is one, says which."""
DRIVER_CALLS: Final = (
    *READ_CALLS,
    *("dup", "pipe2", "ioctl"),
    *("eventfd2", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "timerfd_create"),
    *("memfd_create", "ftruncate", "getuid", "geteuid", "getgid", "getegid", "prlimit64"),
)
"""Allowed too where a driver has devices to open."""
DRIVER_READS: Final = (
    *("/usr", "/lib", "/lib64", "/opt", "/sys", "/proc", "/vendor"),
    *("/etc/ld.so.cache", "/etc/OpenCL", "/etc/vulkan", "/etc/nvidia"),
)
"""What a driver may read."""
_PRCTL_ALLOWED: Final = (15, 16, 0x53564D41)
"""Set and read a thread's name, and name memory; nothing that a parent relies on."""
_PROGRAM_FORBIDDEN: Final = (
    "socket",
    "io_uring_setup",
    "ptrace",
    "process_vm_writev",
    "kill",
    "bpf",
    "keyctl",
)
_PROGRAM_DEVICES: Final = ("/dev/null", "/dev/zero", "/dev/full")
_LOW_32: Final = 0xFFFFFFFF


def confine(
    *,
    memory_bytes: int,
    cpu_s: int,
    parent: int | None = None,
    require: bool = False,
    devices: Collection[str] = (),
    folders: Collection[str] = (),
) -> SandboxReport:
    """Confine this process, for ever; returns what holds.

    ``memory_bytes`` counts on top of the address space that is in use now;
    ``cpu_s`` likewise. ``parent`` is the process whose death ends this one.
    Those of ``devices`` that exist stay open to a driver, with the files and
    system calls that drivers use; what lies in ``folders`` can be read.
    Raises ``probe.unconfined`` when ``require`` and any layer is missing.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if parent is not None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
    found = tuple(path for path in devices if Path(path).exists())
    readable = (*folders, *(DRIVER_READS if found else ()))
    filters = _seccomp_filter(DRIVER_CALLS if found else READ_CALLS if folders else ())
    _limit(memory_bytes, cpu_s, _DRIVER_FILES if readable else _SPARE_FILES)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    privileges = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    abi = _landlock(libc, found, readable) if privileges else 0
    if filters is not None:
        filters.load()
    report = SandboxReport(
        no_new_privs=privileges,
        rlimits=True,
        landlock_abi=abi,
        seccomp=filters is not None,
        opened=(*found, *folders),
    )
    if require and report.level != "full":
        raise PitheadError("probe.unconfined", f"the sandbox is only {report.level!r}: {report}")
    return report


def confine_program(folder: str) -> tuple[str, ...]:
    """Confine this process and the program that it becomes: a converter of models, whose code is foreign.

    It may read and start what the user may, write in ``folder`` only, and reach neither a network nor
    another program's socket. Returns the layers that are missing here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing = []
    if not _landlock(libc, _PROGRAM_DEVICES, ["/"], [folder]):
        missing.append("landlock")
    try:
        import pyseccomp  # noqa: PLC0415 - it fails to import where libseccomp is missing

        rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
        for name in _PROGRAM_FORBIDDEN:
            rules.add_rule(pyseccomp.ERRNO(1), name)
        rules.load()
    except (ImportError, OSError, RuntimeError):
        missing.append("seccomp")
    return tuple(missing)


def _limit(memory_bytes: int, cpu_s: int, spare_files: int) -> None:
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
    files = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + spare_files
    for what, limit in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (value, value))


def _landlock(
    libc: ctypes.CDLL, devices: Collection[str], readable: Collection[str], whole: Collection[str] = ()
) -> int:
    """Forbid all other paths, TCP ports, foreign abstract sockets; returns the ABI, 0 where there is none."""
    abi: int = libc.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION)
    if abi < 1:
        return 0
    rights = (1 << _FS_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack("=Q", rights)
    if abi >= _NET_FROM_ABI:
        attributes += struct.pack("=Q", 0b11)
    if abi >= _SCOPE_FROM_ABI:
        attributes += struct.pack("=Q", 0b11)
    ruleset = libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return 0
    for path in readable:
        _allow(libc, ruleset, path, _READ_FILE | _READ_DIR | _EXECUTE)
    for path in whole:
        _allow(libc, ruleset, path, rights)
    for path in devices:
        use = _READ_FILE | _READ_DIR | _WRITE_FILE
        _allow(libc, ruleset, path, use | (_IOCTL_DEV if abi >= _IOCTL_FROM_ABI else 0))
    try:
        return abi if libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0 else 0
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Allow ``rights`` beneath ``path``; where there is no such path, nothing."""
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not Path(path).is_dir():
            rights &= ~_READ_DIR
        rule = struct.pack("=Qi", rights, parent)
        libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0)
    finally:
        os.close(parent)


def _seccomp_filter(more: Collection[str] = ()) -> Any:
    """Return the filter, ready to load, or None where libseccomp is missing."""
    try:
        import pyseccomp  # noqa: PLC0415 - it fails to import where libseccomp is missing
    except (ImportError, OSError, RuntimeError):
        return None
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    for name in (*ALLOWED_CALLS, *more):
        rules.add_rule(pyseccomp.ALLOW, name)
    allowed = (
        ("clone", _CLONE_THREAD, _CLONE_THREAD),  # new threads only
        ("tgkill", _LOW_32, os.getpid()),  # `abort` and `raise`, no other process
        ("sched_setaffinity", _LOW_32, 0),  # the calling thread
        *(("prctl", _LOW_32, option) for option in _PRCTL_ALLOWED),
    )
    for name, mask, value in allowed:
        rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(0, pyseccomp.MASKED_EQ, mask, value))
    # glibc then takes clone, whose flags a filter can read.
    rules.add_rule(pyseccomp.ERRNO(38), "clone3")
    return rules
