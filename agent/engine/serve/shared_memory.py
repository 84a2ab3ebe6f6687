"""System shared memory: regions that a client on this machine has made, and named here.

Read and written through the file descriptor, never mapped: a client may
truncate its region at any moment, and touching a mapping of what is gone
kills the process (SIGBUS). A short read is only an error.
"""

import os
import pwd
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct

from agent.engine.serve.requests import Region
from contract.errors import PitheadError

DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - where POSIX shared memory is on Linux
MAX_REGIONS: Final = 1024
MAX_READ: Final = 512 * 1024 * 1024
"""Bytes of one input: a file may claim any size without having it."""


class Registered(Struct, frozen=True):
    """A region that a client has registered."""

    name: str
    key: str
    offset: int
    byte_size: int


class SharedMemory:
    """The regions. Blocks for a copy of memory only: may be called on the loop."""

    def __init__(self, directory: Path | None = DIRECTORY, owners: Collection[int] | None = None) -> None:
        """Take regions of the users ``owners``; None: of the user that this process runs as, alone.

        Whoever asks is not known by a connection to loopback, and could otherwise read and
        change through this process what it may not itself.
        """
        self._owners = frozenset((os.geteuid(),) if owners is None else owners)
        self._directory = directory
        """None where it is not allowed: clients of another machine have no business in it."""
        self._regions: dict[str, tuple[Registered, int]] = {}

    @property
    def allowed(self) -> bool:
        """Whether regions can be registered."""
        return self._directory is not None

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open the region ``key`` as shm_open names it; raises ``serve.bad_request``."""
        if self._directory is None:
            raise PitheadError(
                "serve.unsupported", "shared memory is for servers that listen on loopback only"
            )
        plain = key.removeprefix("/")
        if not plain or "/" in plain or "\0" in plain or plain in {".", ".."} or len(plain) > 255:  # noqa: PLR2004
            raise _refuse("key", f"{key[:100]!r} is no name of a region")
        if name in self._regions:
            raise PitheadError("serve.conflict", f"a region {name[:100]!r} is registered already")
        if len(self._regions) >= MAX_REGIONS:
            raise PitheadError("serve.conflict", f"{MAX_REGIONS} regions are registered")
        try:
            handle = os.open(
                self._directory / plain, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            )
        except (OSError, ValueError) as error:
            raise _refuse("key", f"{key[:100]!r}: {getattr(error, 'strerror', error)}") from error
        found = os.fstat(handle)
        if found.st_uid not in self._owners:
            os.close(handle)
            raise _refuse(
                "key",
                f"{key[:100]!r} is of user {found.st_uid}: see --shared-memory-user, shared_memory_users",
            )
        if (
            not stat.S_ISREG(found.st_mode)
            or offset < 0
            or byte_size < 0
            or offset + byte_size > found.st_size
        ):
            os.close(handle)
            raise _refuse("byte_size", f"{byte_size} from {offset}, the region has {found.st_size} bytes")
        self._regions[name] = (Registered(name, key, offset, byte_size), handle)

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all; one that is not registered is forgotten already."""
        for known in [name] if name else list(self._regions):
            held = self._regions.pop(known, None)
            if held is not None:
                os.close(held[1])

    def status(self, name: str = "") -> tuple[Registered, ...]:
        """Return the regions, or one; raises ``serve.not_found``."""
        if not name:
            return tuple(region for region, _ in self._regions.values())
        return (self._find(name)[0],)

    def read(self, region: Region) -> bytes:
        """Return a copy of what is there; raises ``serve.not_found``, ``serve.bad_request``."""
        if region.size > MAX_READ:
            raise _refuse(f"region {region.name!r}", f"at most {MAX_READ} bytes are read for an input")
        with self._place(region) as (handle, at):
            data = os.pread(handle, region.size, at)
        if len(data) != region.size:
            raise _refuse(f"region {region.name!r}", f"only {len(data)} of {region.size} bytes are there")
        return data

    def write(self, region: Region, data: bytes) -> None:
        """Write an output; raises ``serve.not_found``, ``serve.bad_request``."""
        if len(data) > region.size:
            raise _refuse(
                f"region {region.name!r}", f"the output has {len(data)} bytes, given are {region.size}"
            )
        with self._place(region) as (handle, at):
            if os.fstat(handle).st_size < at + len(data):
                raise _refuse(f"region {region.name!r}", "it has been made shorter")
            if os.pwrite(handle, data, at) != len(data):
                raise _refuse(f"region {region.name!r}", "it took a part of the output only")

    def close(self) -> None:
        """Forget all."""
        self.unregister()

    def _find(self, name: str) -> tuple[Registered, int]:
        held = self._regions.get(name)
        if held is None:
            raise PitheadError("serve.not_found", f"no region {name[:100]!r} is registered")
        return held

    @contextmanager
    def _place(self, region: Region) -> Iterator[tuple[int, int]]:
        registered, handle = self._find(region.name)
        if region.offset + region.size > registered.byte_size:
            raise _refuse(
                f"region {region.name!r}",
                f"{region.size} bytes from {region.offset} are beyond its {registered.byte_size}",
            )
        try:
            yield handle, registered.offset + region.offset
        except OSError as error:
            raise _refuse(f"region {region.name!r}", error.strerror or str(error)) from error


def owners(users: Iterable[str]) -> frozenset[int]:
    """Return the ids of this process's user and of others, by name or number; raises ``config.invalid``."""
    found = {os.geteuid()}
    for user in users:
        try:
            found.add(int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid)
        except KeyError as error:
            raise PitheadError(
                "config.invalid", f"--shared-memory-user: there is no user {user!r}"
            ) from error
    return frozenset(found)


def _refuse(field: str, why: str) -> PitheadError:
    return PitheadError("serve.bad_request", f"{field}: {why}", field=field)
