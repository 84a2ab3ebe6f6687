"""Put the agent together: the only reader of the clock, the environment, the configuration and chance."""

import contextlib
import ctypes
import faulthandler
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import random
import signal
import ssl
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from agent.core.layout import Layout
from agent.core.memory import limit
from agent.core.settings import AgentSettings, Lane, overridden, parse
from agent.core.trusted_time import clock_is_right
from agent.engine import memory, plugins
from agent.engine.clock import Clock as EngineClock
from agent.errors import from_os
from agent.identity import record
from agent.identity.record import Identity
from agent.link import https
from agent.link.mqtt import BrokerAddress, MqttLink
from agent.link.tls import DeviceContext
from agent.service import bypass as bypass_file
from agent.service.children import Children
from agent.service.configured_files import with_files
from agent.service.engine_process import EngineKeeper
from agent.service.lane_pipeline import lane_pipeline
from agent.service.loop import Parts, Supervisor, inbox
from agent.service.reporting import Clock
from agent.service.updates import Poller
from agent.service.world import ETAG, Machine, World
from agent.store import durable
from agent.store.objects import ObjectStore
from agent.store.outbox import Outbox
from agent.store.slots import SlotStore
from agent.store.state import StateStore
from agent.update import verified
from contract.bundle import DeviceFacts
from contract.errors import PitheadError
from inference import registry
from inference.circumstances import circumstances

if TYPE_CHECKING:
    from agent.engine.check import SourceSeen
    from agent.service.doctor import Finding

ENROL_S: Final = 60.0
M_ARENA_MAX: Final = -8


class JsonLines(logging.Formatter):
    """One JSON object a line: the event's name, and its facts as fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return ``record`` as JSON."""
        line: dict[str, object] = {
            "t": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": "supervisor",
            "event": record.getMessage(),
        }
        line |= getattr(record, "facts", {})
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str) -> None:
    """Log JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def clock() -> Clock:
    """Return the machine's clocks."""
    return Clock(wall=lambda: time.time_ns() // 1000, mono=lambda: time.monotonic_ns() // 1000)


def read_settings(layout: Layout) -> AgentSettings:
    """Return the configuration; without a file all defaults hold. Raises ``config.invalid``."""
    table: dict[str, object] = {}
    try:
        table = tomllib.loads(layout.config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise PitheadError("config.invalid", f"{layout.config}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PitheadError("config.invalid", f"{layout.config}: {error}") from error
    return with_files(
        parse(overridden(table, os.environ), plugins.kinds, plugins.sink_kinds), layout.config.parent
    )


def recalibrate(layout: Layout, lane: str) -> None:
    """Ask durably for another calibration of a lane; the supervisor sees it at its next turn.

    Raises ``config.invalid`` for a lane that the configuration does not have, and ``storage.*``.
    """
    find_lane(layout, lane)
    durable.write(layout.calibration(lane), str(clock().wall()).encode())


def bypass(layout: Layout, *, on: bool, why: str) -> None:
    """Stop all writes to controls, or allow them again. Raises ``storage.*``."""
    if not on:
        bypass_file.switch_off(layout.bypass)
        return
    who = os.environ.get("SUDO_USER") or os.environ.get("USER") or f"uid {os.getuid()}"
    bypass_file.switch_on(layout.bypass, datetime.now(UTC), who, why)


def check_source(
    layout: Layout, name: str, seconds: float, manifest: Path | None, show: "Callable[[SourceSeen], None]"
) -> "SourceSeen":
    """Watch the source of a lane; see ``agent.engine.check``.

    Raises ``config.invalid`` for a lane or manifest that is not there or does not fit.
    """
    from agent.engine import check  # noqa: PLC0415 - numpy stays out of the supervisor

    lane = find_lane(layout, name)
    times = clock()
    return check.watch(
        name,
        lane.source,
        lane_pipeline(layout, lane, manifest),
        EngineClock(wall=times.wall, mono=times.mono),
        seconds=seconds,
        sleep=time.sleep,
        show=show,
        machine=lane.machine,
    )


def find_lane(layout: Layout, name: str) -> Lane:
    """Return a lane of the configuration, or raise ``config.invalid``."""
    lanes = {lane.name: lane for lane in read_settings(layout).lanes}
    if name not in lanes:
        said = f"there are {', '.join(lanes)}" if lanes else "it has none"
        raise PitheadError(
            "config.invalid", f"{layout.config}: no lane is named {name!r}; {said}", key="lanes"
        )
    return lanes[name]


def device_tls(layout: Layout) -> ssl.SSLContext:
    """Return TLS with the device's certificate, trusting the server's CA alone. Raises ``storage.*``."""
    missing = [p.name for p in (layout.server_ca, layout.certificate, layout.key) if not p.exists()]
    if missing:
        raise PitheadError(
            "storage.corrupt",
            f"{layout.identity} is not whole ({', '.join(missing)} missing); delete it and enrol again",
        )
    context = DeviceContext(lambda: clock_is_right(time.time_ns() // 1000, time_floor(layout)))
    try:
        context.load_verify_locations(layout.server_ca)
        context.load_cert_chain(layout.certificate, layout.key)
    except ssl.SSLError as error:
        raise PitheadError(
            "storage.corrupt", f"{layout.identity}: {error}; delete it and enrol again"
        ) from error
    except OSError as error:
        raise from_os(error, f"reading {layout.identity}") from error
    return context


def time_floor(layout: Layout) -> int:
    """Return the newest time that somebody has vouched for, microseconds UTC."""
    floor = 0
    with contextlib.suppress(PitheadError):
        known = verified.read(layout.tuf / "verified")
        floor = 0 if known is None else known.time_floor
    with contextlib.suppress(PitheadError):
        identity = record.load(layout.identity_file)
        floor = max(floor, 0 if identity is None else identity.enrolled_at)
    return floor


def update_server(layout: Layout, settings: AgentSettings, identity: Identity) -> https.UpdateServer:
    """Return the update server as the device reaches it."""
    return https.UpdateServer(https.parse_url(settings.server.url or identity.server), device_tls(layout))


def machine(settings: AgentSettings, identity: Identity) -> Machine:
    """Return what does not change while the supervisor runs."""
    found = registry.installed()
    return Machine(
        device=identity.device,
        boot_id=boot_id(),
        arch=registry.arch(),
        hardware=settings.hardware or identity.hardware,
        formats=frozenset(
            name for name, runtime in registry.RUNTIMES.items() if any(p in found for p in runtime.packages)
        ),
        accelerators=registry.accelerators(settings.accelerators),
        runtimes=found,
        agent_version=agent_version(),
        circumstances=circumstances(settings.accelerators, settings.engine),
    )


def boot_id() -> str:
    """Return what is new at each boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"unknown-{os.getpid()}"


def agent_version() -> str:
    """Return the version of this program."""
    return importlib.metadata.version("pithead")


@contextlib.contextmanager
def supervisor(layout: Layout) -> Iterator[Supervisor]:
    """Build the supervisor of this device; there is at most one.

    Raises ``config.invalid`` when the device is not enrolled or another
    supervisor runs, and ``storage.*``.
    """
    settings = read_settings(layout)
    identity = record.load(layout.identity_file)
    if identity is None:
        raise PitheadError(
            "config.invalid",
            f"this device is not enrolled ({layout.identity_file} is missing): "
            "pithead-agent enroll --server URL --token TOKEN",
        )
    with alone(layout):
        for directory in (layout.state_dir, layout.slots, layout.objects):
            durable.sweep(directory)
        yield build(layout, settings, identity)


def build(layout: Layout, settings: AgentSettings, identity: Identity) -> Supervisor:
    """Return the supervisor with all its real parts."""
    clocks, facts = clock(), machine(settings, identity)
    box, post = inbox()
    state = StateStore(layout.state)
    outbox = Outbox(
        layout.outbox, device=identity.device, boot_id=facts.boot_id, limit=settings.storage.outbox_bytes
    )
    world = World(
        layout,
        settings,
        facts,
        slot_store=SlotStore(layout.slots),
        objects=ObjectStore(layout.objects),
        state=state,
    )
    link = MqttLink(
        BrokerAddress(
            settings.broker.host or identity.broker_host, settings.broker.port or identity.broker_port
        ),
        device=identity.device,
        boot_id=facts.boot_id,
        tls=device_tls(layout),
        on_event=post,
        now=clocks.wall,
        fraction=random.random,
        keepalive_s=settings.broker.keepalive_s,
    )
    poller = Poller(
        update_server(layout, settings, identity),
        post,
        etag=state.get(ETAG, str),
        poll_s=settings.server.poll_s,
        fraction=random.random,
    )
    return Supervisor(
        Parts(
            layout=layout,
            clock=clocks,
            fraction=random.random,
            world=world,
            outbox=outbox,
            engine=EngineKeeper(
                layout,
                post,
                fraction=random.random,
                cpus=settings.engine.cpus,
                memory_bytes=limit(settings.memory.engine_mb, memory.machine_bytes()),
            ),
            children=Children(
                layout,
                post,
                server=settings.server.url or identity.server,
                require_sandbox=settings.probe.require == "full",
                custom=settings.accelerators,
                resources=settings.engine,
            ),
            poller=poller,
            link=link,
        ),
        box,
    )


@contextlib.contextmanager
def alone(layout: Layout) -> Iterator[None]:
    """Hold the supervisor's lock, or raise ``config.invalid``."""
    path = layout.supervisor_lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise from_os(error, f"locking {path}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise PitheadError("config.invalid", f"another supervisor runs for {layout.root}") from None
    try:
        yield
    finally:
        os.close(descriptor)


def spare_memory() -> None:
    """Let all threads share one heap: glibc otherwise keeps one for each, mostly empty."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def run(layout: Layout) -> None:
    """Run the supervisor until SIGTERM or SIGINT; SIGHUP ends it and leaves the engine in service."""
    spare_memory()
    faulthandler.enable()
    with supervisor(layout) as running:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: running.stop())
        signal.signal(signal.SIGHUP, lambda _number, _frame: running.stop(keep_engine=True))
        running.run()


def enrol(layout: Layout, *, server: str, token: str, name: str, hardware: str) -> tuple[Identity, bool]:
    """Enrol this device; see ``agent.identity.enrol``."""
    from agent.identity import enrol as enrolment  # noqa: PLC0415 - cryptography stays out of the supervisor

    address = https.parse_url(server)

    def call(tls: ssl.SSLContext, method: str, path: str, body: bytes | None) -> bytes:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        channel = https.Channel(address, tls)
        with contextlib.closing(channel):
            answer = channel.exchange(method, path, body=body, headers=headers, deadline_s=ENROL_S)
        if not 200 <= answer.status < 300:  # noqa: PLR2004 - HTTP's good answers
            raise https.problem(answer)
        return answer.body

    return enrolment.enrol(
        layout,
        server=server,
        token=token,
        facts=DeviceFacts(
            hardware=hardware,
            arch=platform.machine(),
            accelerators=registry.accelerators(),
            agent_version=agent_version(),
            name=name,
        ),
        call=call,
        check_time=clock_is_right(time.time_ns() // 1000, 0),
        write_directory=durable.write_directory,
    )


def doctor(layout: Layout) -> "Iterator[Finding]":
    """Check this device; see ``agent.service.doctor``."""
    from agent.service import doctor as surgery  # noqa: PLC0415 - cryptography stays out of the supervisor

    problem = None
    try:
        settings = read_settings(layout)
    except PitheadError as error:
        settings, problem = AgentSettings(), error
    if problem is not None:
        yield surgery.Finding("configuration", "failed", problem.detail, problem.remedy)
    else:
        yield surgery.Finding("configuration", "ok", f"{layout.config}, {len(settings.lanes)} lanes")
    yield from surgery.examine(
        surgery.Surroundings(
            layout=layout,
            settings=settings,
            now=datetime.now(UTC),
            tls=lambda: device_tls(layout),
            server=lambda identity: update_server(layout, settings, identity),
        )
    )
