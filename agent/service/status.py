"""What runs where and why, read from the disk; works whether or not a supervisor runs."""

import contextlib
import fcntl
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from msgspec import Struct

from agent.core import slots as slot
from agent.core.layout import Layout
from agent.core.plan import Goal, Observed, goals
from agent.core.slots import Installed, Slots
from agent.core.standing import standing
from agent.identity import record
from agent.ports import LaneState, ServeState, SinkState
from agent.service.bypass import Bypass
from agent.service.bypass import read as read_bypass
from agent.service.bypass import render as render_bypass
from agent.service.snapshot import Snapshot, read_snapshot
from agent.service.world import DESIRED
from agent.store import slots as slot_store
from contract.messages import Desired, ErrorCode, ModelAssignment, Name, Version


class Place(Struct, frozen=True):
    """A version in a slot."""

    version: Version
    variant: Name
    accelerator: str
    activation: int | None = None


class Wanted(Struct, frozen=True, omit_defaults=True):
    """An order of the fleet, and how far the device is with it."""

    version: Version
    role: str
    state: str
    rollout: str | None = None
    code: ErrorCode | None = None
    detail: str = ""


class ModelStatus(Struct, frozen=True, omit_defaults=True):
    """One model."""

    model: Name
    serving: Place | None = None
    trial: bool = False
    active: Place | None = None
    standby: Place | None = None
    last_good: Place | None = None
    wanted: tuple[Wanted, ...] = ()
    lanes: tuple[LaneState, ...] = ()
    served: LaneState | None = None


class Status(Struct, frozen=True, omit_defaults=True):
    """The whole device."""

    device: str | None
    name: str
    hardware: str
    server: str | None
    broker: str | None
    supervisor_running: bool
    engine_pid: int | None
    revision: int | None
    models: tuple[ModelStatus, ...]
    outbox_records: int | None = None
    outbox_bytes: int | None = None
    outbox_lost: dict[str, int] = {}
    server_state: str | None = None
    broker_state: str | None = None
    update_code: ErrorCode | None = None
    update_detail: str = ""
    serve: ServeState | None = None
    bypass: Bypass | None = None
    """Set while nothing is written to any control of the plant."""
    problems: tuple[str, ...] = ()
    """What could not be read, so that nothing is taken for absent that is only hidden."""


def gather(layout: Layout, problems: Sequence[str] = ()) -> Status:
    """Read everything. Raises ``storage.*`` when the identity is damaged.

    ``problems`` are those that the caller knows. The databases belong to a
    supervisor while it runs, so then its snapshot says what is in them.
    """
    found_problems = list(problems)
    identity = record.load(layout.identity_file)
    running = is_locked(layout.supervisor_lock)
    live = read_snapshot(layout.status) if running else None
    if running and live is None:
        found_problems.append(f"{layout.status}: the supervisor has not written it yet")
    desired = live.desired if live is not None else None
    records, size, lost = None, None, {}
    if live is not None:
        records, size, lost = live.outbox.records, live.outbox.bytes, dict(live.outbox.lost)
    elif not running:
        desired = _desired(layout.state, found_problems)
        records, size, lost = _outbox(layout.outbox, found_problems)
    found = slot_store.read_all(layout.slots)
    unread = {p.name for p in slot_store.files(layout.slots)} - {f"{n}{slot_store.SUFFIX}" for n in found}
    found_problems += [f"{layout.slots / name}: cannot be read" for name in sorted(unread)]
    wanted = goals(desired) if desired is not None else {}
    return Status(
        device=None if identity is None else identity.device,
        name="" if identity is None else identity.name,
        hardware="" if identity is None else identity.hardware,
        server=None if identity is None else identity.server,
        broker=None if identity is None else f"{identity.broker_host}:{identity.broker_port}",
        supervisor_running=running,
        engine_pid=None if live is None else live.engine_pid,
        revision=None if desired is None else desired.revision,
        models=tuple(
            _model(found.get(name, Slots(name)), wanted.get(name, Goal()), live)
            for name in sorted({*found, *wanted})
        ),
        outbox_records=records,
        outbox_bytes=size,
        outbox_lost=lost,
        server_state=None if live is None else live.server,
        broker_state=None if live is None else live.broker,
        update_code=None if live is None else live.reported.update_code,
        update_detail="" if live is None else live.reported.update_detail,
        serve=None if live is None else live.serve,
        bypass=read_bypass(layout.bypass),
        problems=tuple(found_problems),
    )


def render(status: Status) -> str:
    """Return the status as text for a person."""
    if status.device is None:
        return "This device is not enrolled: pithead-agent enroll --server URL --token TOKEN\n"
    name = f" ({status.name})" if status.name else ""
    lines = [f"problem     {problem}" for problem in status.problems]
    lines += [
        f"device      {status.device}{name}, hardware {status.hardware}",
        f"supervisor  {'running' if status.supervisor_running else 'not running'}"
        + (f", engine {status.engine_pid}" if status.engine_pid else ""),
        f"server      {status.server}  {status.server_state or ''}".rstrip(),
        f"broker      {status.broker}  {status.broker_state or ''}".rstrip(),
        f"desired     {'none yet' if status.revision is None else f'revision {status.revision}'}",
    ]
    if status.update_code:
        lines.append(f"            refused: {status.update_code}: {status.update_detail}")
    if status.outbox_records is not None:
        lost = "".join(f", {n} {kind} lost" for kind, n in status.outbox_lost.items())
        lines.append(f"outbox      {status.outbox_records} records, {status.outbox_bytes} bytes{lost}")
    if status.bypass is not None:
        lines.append(f"bypass      {render_bypass(status.bypass)}")
    if status.serve is not None:
        lines += _render_serve(status.serve)
    for model in status.models:
        lines += ["", *_render_model(model)]
    return "\n".join(lines) + "\n"


def is_locked(path: Path) -> bool:
    """Whether another process holds this lock."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _render_serve(serve: ServeState) -> list[str]:
    where = ", ".join(place for place in (serve.url, serve.grpc and f"gRPC {serve.grpc}") if place)
    why = f": {serve.code} {serve.detail}" if serve.code else ""
    lines = [f"serving     {serve.state} {where}".rstrip() + why]
    if serve.mqtt != "off":
        lines.append(f"            MQTT {serve.mqtt} {serve.mqtt_detail}".rstrip())
    for each in serve.pipelines:
        said = f"cannot be asked: {each.detail}" if each.detail else f"{each.requests} requests"
        lines.append(f"            pipeline {each.name} {said}, {each.errors} errors")
    return lines


def _render_model(model: ModelStatus) -> list[str]:
    lines = [f"model       {model.model}"]
    trial = " on trial" if model.trial else ""
    lines.append(f"  serving   {_place(model.serving)}{trial}")
    lines += [
        f"  {label:<9} {_place(place)}"
        for label, place in (
            ("active", model.active),
            ("standby", model.standby),
            ("last good", model.last_good),
        )
        if place is not None and not (label == "active" and not model.trial)
    ]
    for lane in model.lanes:
        why = f": {lane.code} {lane.detail}" if lane.code else ""
        muted = f", muted: {lane.muted}" if lane.muted else ""
        lines.append(
            f"  lane      {lane.lane} {lane.state}, {lane.windows} windows, {lane.errors} errors{muted}{why}"
        )
        lines += [_sink(sink) for sink in lane.sinks]
    if model.served is not None:
        s = model.served
        why = f": {s.code} {s.detail}" if s.code else ""
        lines.append(f"  served    {s.state}, {s.windows} requests, {s.errors} errors{why}")
    for wanted in model.wanted:
        rollout = f" (rollout {wanted.rollout})" if wanted.rollout else ""
        why = f": {wanted.code} {wanted.detail}" if wanted.code else ""
        lines.append(f"  wanted    {wanted.version} {wanted.role}{rollout}: {wanted.state}{why}")
    return lines


def _sink(sink: SinkState) -> str:
    why = f": {sink.code} {sink.detail}" if sink.code else ""
    lost = f", {sink.lost} lost" if sink.lost else ""
    return f"    sink    {sink.name} {sink.state}, {sink.sent} sent{lost}{why}"


def _place(place: Place | None) -> str:
    if place is None:
        return "nothing"
    activation = "" if place.activation is None else f", activation {place.activation}"
    return f"{place.version} ({place.variant} on {place.accelerator}{activation})"


def _model(found: Slots, goal: Goal, live: Snapshot | None) -> ModelStatus:
    lanes = () if live is None else tuple(s for s in live.lanes if s.model_name == found.model_name)
    return ModelStatus(
        model=found.model_name,
        serving=_serving(found.serving),
        trial=found.trial is not None,
        active=_serving(found.active),
        standby=_installed(found.standby),
        last_good=_installed(found.last_good),
        wanted=tuple(_wanted(a, found, live) for a in goal.assignments),
        lanes=lanes,
        served=_served(found.model_name, live),
    )


def _served(model_name: Name, live: Snapshot | None) -> LaneState | None:
    models = () if live is None or live.serve is None else live.serve.models
    return next((state for state in models if state.model_name == model_name), None)


def _wanted(wanted: ModelAssignment, found: Slots, live: Snapshot | None) -> Wanted:
    now = standing(wanted, Observed(found))
    code, detail = now.code, now.detail
    if code is None and live is not None:
        reported = {m.model_name: m for m in live.reported.models}.get(wanted.model_name)
        if reported is not None:
            code, detail = reported.code, reported.detail
    return Wanted(wanted.version, wanted.role.value, now.state.value, wanted.rollout, code, detail)


def _serving(serving: slot.Serving | None) -> Place | None:
    if serving is None:
        return None
    installed = serving.installed
    return Place(installed.version, installed.variant, installed.accelerator, serving.activation)


def _installed(installed: Installed | None) -> Place | None:
    return None if installed is None else Place(installed.version, installed.variant, installed.accelerator)


def _desired(path: Path, problems: list[str]) -> Desired | None:
    rows = _query(path, problems, "SELECT value FROM fact WHERE key = ?", (DESIRED,))
    try:
        return msgspec.json.decode(rows[0][0], type=Desired) if rows else None
    except msgspec.MsgspecError as error:
        problems.append(f"{path}: {error}")
        return None


def _outbox(path: Path, problems: list[str]) -> tuple[int | None, int | None, dict[str, int]]:
    rows = _query(path, problems, "SELECT COUNT(*), COALESCE(SUM(LENGTH(body)), 0) FROM record")
    if not rows:
        return None, None, {}
    lost = _query(path, problems, "SELECT class, lost FROM counter WHERE lost > 0")
    return rows[0][0], rows[0][1], dict(lost)


def _query(path: Path, problems: list[str], sql: str, arguments: tuple[object, ...] = ()) -> list[Any]:
    """Return the rows; none where the database is not there, or cannot be read, which is a problem."""
    if not path.exists():
        return []
    try:
        connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=2.0)
        with contextlib.closing(connection):
            return connection.execute(sql, arguments).fetchall()
    except sqlite3.Error as error:
        problems.append(f"{path}: {error}")
        return []
