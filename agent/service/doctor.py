"""Check whether this device can do its work, and say what to do where it cannot."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from msgspec import Struct

from agent.core.layout import Layout
from agent.core.settings import AgentSettings
from agent.identity import certificates, record
from agent.identity.record import Identity
from agent.link.https import UpdateServer
from agent.service import bypass
from agent.service.exposed import exposed, missing
from agent.service.status import is_locked
from contract.errors import PitheadError
from inference import registry

SANE: Final = datetime(2025, 1, 1, tzinfo=UTC)
"""No honest clock stands before this."""
DISK_BYTES: Final = 200 * 1024 * 1024
NO_DISK_BYTES: Final = 10 * 1024 * 1024
EXPIRY: Final = timedelta(days=5)
CONNECT_S: Final = 5.0
TRY_SANDBOX: Final = (
    "from inference.sandbox import confine; print(confine(memory_bytes=2**28, cpu_s=5).level, flush=True)"
)


class Finding(Struct, frozen=True):
    """One check and how it ended."""

    check: str
    result: Literal["ok", "warning", "failed"]
    detail: str
    remedy: str = ""


class Surroundings(Struct, frozen=True):
    """What the checks need to know; ``wiring`` makes it."""

    layout: Layout
    settings: AgentSettings
    now: datetime
    tls: Callable[[], ssl.SSLContext]
    server: Callable[[Identity], UpdateServer]


def examine(around: Surroundings) -> Iterator[Finding]:
    """Yield one finding after the other; none of the checks changes anything."""
    yield _runtimes()
    yield _sandbox(around.settings)
    yield from _lanes(around.settings)
    for detail in missing(around.settings):
        yield Finding("files", "failed", detail, "put it there, or correct its name in agent.toml")
    for detail, remedy in exposed(around.settings):
        yield Finding("secrets", "warning", detail, remedy)
    if (found := bypass.read(around.layout.bypass)) is not None:
        yield Finding("bypass", "warning", bypass.render(found), "pithead-agent bypass off")
    yield _clock(around.now)
    yield _disk(around.layout)
    yield _supervisor(around.layout)
    try:
        identity = record.load(around.layout.identity_file)
    except PitheadError as error:
        yield Finding("identity", "failed", str(error), error.remedy)
        return
    if identity is None:
        yield Finding("identity", "failed", "not enrolled", "pithead-agent enroll --server URL --token TOKEN")
        return
    yield _key(around.layout, identity)
    yield _certificate(around)
    yield _server(around, identity)
    yield _broker(around, identity)


def _runtimes() -> Finding:
    found = registry.installed()
    if not found:
        return Finding("runtimes", "failed", "none is installed", "pip install ai-edge-litert or onnxruntime")
    listed = ", ".join(f"{package} {version}" for package, version in found.items())
    return Finding("runtimes", "ok", f"{listed}; accelerators {', '.join(registry.accelerators())}")


def _lanes(settings: AgentSettings) -> Iterator[Finding]:
    """Check the sources' settings as far as it can be done without opening them."""
    from agent.engine import machine as marks  # noqa: PLC0415 - numpy stays out of the supervisor
    from agent.engine import sinks  # noqa: PLC0415 - numpy stays out of the supervisor

    for lane in settings.lanes:
        try:
            marks.check(lane.source, lane.machine)
        except PitheadError as error:
            yield Finding("lane", "failed", f"{lane.name}: {error.detail}", error.remedy)
        else:
            yield Finding("lane", "ok", f"{lane.name}: {lane.source['kind']} for {lane.model}")
        for place, sink in enumerate(lane.sinks):
            where = f"{lane.name}: sinks[{place}]"
            try:
                sinks.check(sink)
            except PitheadError as error:
                yield Finding("sink", "failed", f"{where}: {error.detail}", error.remedy)
            else:
                yield Finding("sink", "ok", f"{where}: {sink['kind']}")


def _sandbox(settings: AgentSettings) -> Finding:
    """Try it in a process that may then be thrown away."""
    command = [sys.executable, "-I", "-c", TRY_SANDBOX]
    try:
        tried = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, cwd="/")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("sandbox", "failed", f"it cannot be tried: {error}", "see docs/security.md")
    level = tried.stdout.strip()
    if level != "full":
        required = settings.probe.require == "full"
        means = (
            "every new model is refused" if required else "new models are opened with fewer walls around them"
        )
        return Finding(
            "sandbox",
            "failed" if required else "warning",
            f"level {level}: {means}",
            "use a kernel with Landlock, and install libseccomp",
        )
    return Finding("sandbox", "ok", "level full")


def _clock(now: datetime) -> Finding:
    if now < SANE:
        return Finding(
            "clock", "failed", f"it says {now.isoformat()}", "set the clock, or start a time service"
        )
    return Finding("clock", "ok", now.isoformat(timespec="seconds"))


def _disk(layout: Layout) -> Finding:
    path = next(p for p in (layout.state_dir, *layout.state_dir.parents) if p.exists())
    free = shutil.disk_usage(path).free
    detail = f"{free // (1024 * 1024)} MB free at {path}"
    if not os.access(path, os.W_OK):
        return Finding("disk", "failed", f"{path} cannot be written", "run as the user that owns it")
    if free < NO_DISK_BYTES:
        return Finding("disk", "failed", detail, "free some space: hardly anything can be written")
    if free < DISK_BYTES:
        return Finding("disk", "warning", detail, "free some space: updates need room")
    return Finding("disk", "ok", detail)


def _supervisor(layout: Layout) -> Finding:
    if is_locked(layout.supervisor_lock):
        return Finding("supervisor", "ok", "running")
    return Finding("supervisor", "warning", "not running", "pithead-agent run")


def _key(layout: Layout, identity: Identity) -> Finding:
    try:
        mode = layout.key.stat().st_mode & 0o777
    except OSError as error:
        return Finding("identity", "failed", f"{layout.key}: {error.strerror}", "enrol the device again")
    if mode & 0o077:
        return Finding("identity", "failed", f"{layout.key} has mode {mode:o}", f"chmod 600 {layout.key}")
    return Finding("identity", "ok", f"{identity.device}, enrolled with {identity.server}")


def _certificate(around: Surroundings) -> Finding:
    try:
        until = certificates.valid_until(around.layout.certificate)
    except PitheadError as error:
        return Finding("certificate", "failed", str(error), error.remedy)
    detail = f"valid until {until.isoformat(timespec='minutes')}"
    if until < around.now:
        return Finding("certificate", "failed", detail, "enrol the device again")
    if until - around.now < EXPIRY:
        return Finding("certificate", "warning", detail, "it should have been renewed by now")
    return Finding("certificate", "ok", detail)


def _server(around: Surroundings, identity: Identity) -> Finding:
    try:
        around.server(identity).bundle(None)
    except PitheadError as error:
        return Finding("server", "failed", str(error), error.remedy)
    return Finding("server", "ok", identity.server)


def _broker(around: Surroundings, identity: Identity) -> Finding:
    """Shake hands only: a second connection under the device's name would throw out the first."""
    host = around.settings.broker.host or identity.broker_host
    port = around.settings.broker.port or identity.broker_port
    try:
        tls = around.tls()
        with (
            socket.create_connection((host, port), timeout=CONNECT_S) as plain,
            tls.wrap_socket(plain, server_hostname=host) as secure,
        ):
            return Finding("broker", "ok", f"{host}:{port}, {secure.version()}")
    except (OSError, UnicodeError, PitheadError) as error:
        return Finding(
            "broker", "failed", f"{host}:{port}: {error}", "check the address, the network, the broker"
        )
