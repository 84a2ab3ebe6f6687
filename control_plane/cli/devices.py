"""``pithead devices``: what runs where, and why."""

import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.text import Text

from contract.errors import ERRORS, PitheadError
from control_plane.cli.client import Client, ServerOption, TokenOption, connect
from control_plane.cli.output import Output, OutputOption, ago, labels, moment, print_json, print_table

devices_app = typer.Typer(
    add_completion=False, name="devices", help="What runs where, and why.", no_args_is_help=True
)

PAGE = 500
GOOD = "green"
BAD = "red"
WAITING = "yellow"


@devices_app.command(
    "list",
    epilog="Examples:  pithead devices list --label site=north   |   pithead devices list --offline -o json",
)
def list_devices(
    *,
    label: Annotated[list[str] | None, typer.Option(help="name=value; repeat, all must match.")] = None,
    group: Annotated[str | None, typer.Option(help="Devices of this group only.")] = None,
    online: Annotated[bool | None, typer.Option("--online/--offline", help="Only these.")] = None,
    state: Annotated[str | None, typer.Option(help="active or revoked.")] = None,
    troubled: Annotated[
        bool | None,
        typer.Option("--troubled/--untroubled", help="Only those that are bypassed or tell of what fails."),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 1000,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List devices with their models."""
    with connect(server, token) as api:
        found = every(
            api,
            "/api/v1/devices",
            {"label": label, "group": group, "online": online, "state": state, "troubled": troubled},
            limit,
        )
    if output is Output.JSON:
        print_json(found)
        return
    now = time.time_ns() // 1000
    print_table(
        ("DEVICE", "NAME", "STATE", "LAST SEEN", "HARDWARE", "MODELS", "LABELS"),
        (
            (
                device["id"],
                device["name"] or "-",
                _presence(device),
                ago(device["last_seen"], now),
                device["hardware"],
                _models(device),
                labels(device["labels"]),
            )
            for device in found
        ),
        "No devices. Make a join token: pithead tokens create",
    )


@devices_app.command(epilog="Example:  pithead devices show dev-4x7k2m9qpw1c")
def show(
    device: Annotated[str, typer.Argument(help="The device's id, or its name.")],
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Show what a device shall run, what it runs, and why the two differ."""
    with connect(server, token) as api:
        found = api.get(f"/api/v1/devices/{resolve(api, device)}")
    if output is Output.JSON:
        print_json(found)
        return
    console = Console()
    now = time.time_ns() // 1000
    _facts(console, found, now)
    console.print(Text("\nModels", style="bold"))
    _model_table(found)
    for line in reasons(found):
        console.print(Text("  " + line, style=WAITING))
    if found.get("summaries"):
        console.print(Text("\nLast summaries", style="bold"))
        _summary_table(found["summaries"])
    console.print(Text("\nLast steps", style="bold"))
    print_table(
        ("WHEN", "MODEL", "VERSION", "STATE", "WHY"),
        (
            (
                moment(receipt["t_received"]),
                receipt["model_name"],
                receipt["version"],
                _state(receipt["state"]),
                _why(receipt["code"], receipt["detail"]),
            )
            for receipt in found["receipts"]
        ),
        "none yet",
    )


@devices_app.command(epilog="Example:  pithead devices label dev-4x7k2m9qpw1c line=3 canary=")
def label(
    device: Annotated[str, typer.Argument(help="The device's id, or its name.")],
    pairs: Annotated[list[str], typer.Argument(help="name=value sets a label, name= takes it away.")],
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Change a device's labels."""
    changes: dict[str, str | None] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise PitheadError("request.invalid", f"{pair!r} is not name=value")
        changes[name] = value or None
    with connect(server, token) as api:
        changed = api.patch(f"/api/v1/devices/{resolve(api, device)}", {"labels": changes})
    typer.echo(labels(changed["labels"]))


@devices_app.command(epilog="Example:  pithead devices revoke dev-4x7k2m9qpw1c")
def revoke(
    device: Annotated[str, typer.Argument(help="The device's id, or its name.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Take a device's identity away; it must enrol again."""
    if not yes:
        typer.confirm(f"Revoke {device}?", abort=True)
    with connect(server, token) as api:
        pending = api.post(f"/api/v1/devices/{resolve(api, device)}/revoke")
    typer.echo(f"{device} is revoked")
    if pending:
        Console(stderr=True).print(Text(pending["warning"], style=WAITING))


def resolve(api: Client, device: str) -> str:
    """Return a device's id: ``device`` itself, unless it is the name of just one active device.

    Raises ``request.invalid`` when several have that name, or there is none in ``device``.
    """
    if not device.strip():
        raise PitheadError("request.invalid", "the device is empty; give its id or its name")
    named = api.get("/api/v1/devices", {"name": device, "state": "active"})["items"]
    if len(named) > 1:
        ids = ", ".join(found["id"] for found in named)
        raise PitheadError("request.invalid", f"several devices are named {device!r}: {ids}; give the id")
    return str(named[0]["id"]) if named else quote(device, safe="")


def every(api: Client, path: str, params: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """Return up to ``limit`` items of a listing, page by page."""
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        size = min(PAGE, limit - len(found))
        answer = api.get(path, {**params, "limit": size, "cursor": cursor})
        found += answer["items"]
        cursor = answer["next_cursor"]
        if cursor is None:
            break
    return found


def reasons(device: dict[str, Any]) -> list[str]:
    """Say why a device does not run what it shall; nothing when it does."""
    reported = device["reported"] or {}
    lines = []
    if not device["online"]:
        lines.append("offline: it keeps running what it has and catches up when it is back")
    if reported.get("update_code"):
        lines.append("update refused: " + _why(reported["update_code"], reported.get("update_detail", "")))
    revision = device["desired"].get("revision", 0)
    if device["reported"] is None:
        lines.append("it has not reported yet")
    elif reported.get("revision", 0) < revision:
        lines.append(f"it answers revision {reported.get('revision', 0)} of the desired document {revision}")
    for model in reported.get("models", ()):
        for rejected in model.get("rejected", ()):
            why = _why(rejected["code"], rejected.get("detail", ""))
            lines += [f"{model['model_name']} {rejected['version']} rejected: {why}"]
        if model.get("code"):
            lines.append(f"{model['model_name']}: " + _why(model["code"], model.get("detail", "")))
    return lines


def troubles(health: dict[str, Any], now: int) -> list[str]:
    """Say what a device's newest health complains of: bypassed controls, sources, lanes and sinks."""
    lines = []
    if bypass := health.get("bypass"):
        who = f" by {bypass['who']}" if bypass.get("who") else ""
        why = f": {bypass['why']}" if bypass.get("why") else ""
        since = f"{moment(bypass['since'])} ({ago(bypass['since'], now)})" if bypass["since"] else "unknown"
        lines.append(f"bypassed: no control is written, since {since}{who}{why}")
    for each in health.get("ailing", ()):
        name = f"{'pipeline' if each['what'] == 'pipeline' else 'lane'} {each['lane']}"
        if each["what"] == "sink":
            kind = each.get("kind") or "?"
            name += f": sink {each['sink']}" + (f" ({kind})" if kind != each["sink"] else "")
        elif each["what"] in {"source", "machine"}:
            name += f": {each['what']}"
        counts = [f"{each[what]} {what}" for what in ("waiting", "lost") if each.get(what)]
        said = _why(each.get("code"), each.get("detail", ""))
        why = f": {said}" if said else ""
        lines.append(f"{name} {', '.join([each['state'], *counts])}{why}")
    return lines


def _summary_table(summaries: list[dict[str, Any]]) -> None:
    print_table(
        ("MODEL", "VERSION", "BY", "FROM", "WINDOWS", "ERRORS", "ALARMS", "MISSING", "MUTED", "P95 US"),
        (
            (
                each["model_name"],
                each["version"],
                each["source"],
                moment(each["bucket_start"]),
                str(each["count"]),
                str(each["errors"]),
                str(each["alarms"]),
                str(each["missing"]),
                Text(str(each.get("muted", 0)), style=WAITING if each.get("muted") else ""),
                "-" if each["latency_p95_us"] is None else f"{each['latency_p95_us']:.0f}",
            )
            for each in summaries
        ),
        "none yet",
    )


def _facts(console: Console, device: dict[str, Any], now: int) -> None:
    console.print(Text.assemble((device["id"], "bold"), f"  {device['name']}  ", _presence(device)))
    health = device["health"] or {}
    rows = [
        ("last seen", ago(device["last_seen"], now)),
        ("enrolled", moment(device["enrolled_at"])),
        ("hardware", f"{device['hardware']}, {device['arch']}, {', '.join(device['accelerators'])}"),
        ("agent", device["agent_version"] or "-"),
        ("labels", labels(device["labels"])),
    ]
    if health:
        text = (
            f"cpu {health['cpu_percent']:.0f} %, memory {health['memory_percent']:.0f} %, "
            f"agent {health['agent_pss_bytes'] / 1e6:.0f} MB, "
            f"outbox {health['outbox']['records']} records, "
            f"engine restarts {health.get('engine_restarts', 0)} ({ago(device['health_at'], now)})"
        )
        rows.append(("health", text))
    for name, value in rows:
        console.print(Text.assemble((f"  {name:<10}", "dim"), value))
    for line in troubles(health, now):
        console.print(Text("  " + line, style=BAD), soft_wrap=True)


def _model_table(device: dict[str, Any]) -> None:
    reported = {model["model_name"]: model for model in (device["reported"] or {}).get("models", ())}
    desired: dict[str, list[str]] = {}
    for wanted in device["desired"].get("models", ()):
        desired.setdefault(wanted["model_name"], []).append(f"{wanted['version']} ({wanted['role']})")
    print_table(
        ("MODEL", "DESIRED", "ACTIVE", "STANDBY", "LAST GOOD", "VARIANT", "ACCELERATOR", "LANE"),
        (
            (
                name,
                ", ".join(desired.get(name, ())) or "-",
                _slot(reported.get(name, {}), "active"),
                _slot(reported.get(name, {}), "standby"),
                _slot(reported.get(name, {}), "last_good"),
                ((reported.get(name, {}).get("active") or {}).get("variant")) or "-",
                ((reported.get(name, {}).get("active") or {}).get("accelerator")) or "-",
                _lane(reported.get(name, {})),
            )
            for name in sorted({*reported, *desired})
        ),
        "none",
    )


def _slot(model: dict[str, Any], slot: str) -> str:
    content = model.get(slot)
    return content["version"] if content else "-"


def _lane(model: dict[str, Any]) -> Text:
    lane = str(model.get("lane", "none"))
    trial = " (trial)" if model.get("trial") else ""
    style = {"running": GOOD, "failed": BAD}.get(lane, WAITING)
    return Text(lane + trial, style=style)


def _models(device: dict[str, Any]) -> str:
    models = (device["reported"] or {}).get("models", ())
    parts = []
    for model in models:
        active = model.get("active")
        text = f"{model['model_name']} {active['version'] if active else '-'}"
        if model.get("trial"):
            text += " (trial)"
        if model.get("rejected"):
            text += f" ({len(model['rejected'])} rejected)"
        parts.append(text)
    return ", ".join(parts) or "-"


def _presence(device: dict[str, Any]) -> Text:
    if device["state"] != "active":
        return Text(device["state"], style=BAD)
    found = Text("online", style=GOOD) if device["online"] else Text("offline", style=WAITING)
    if (device["health"] or {}).get("bypass"):
        found.append(" bypassed", style=BAD)
    return found


def _state(state: str) -> Text:
    style = {"confirmed": GOOD, "rolled_back": BAD, "refused": BAD}.get(state, "")
    return Text(state, style=style)


def _why(code: str | None, detail: str) -> str:
    if not code:
        return detail
    spec = ERRORS.get(code)
    said = f"{code}: {detail or (spec.summary if spec else '')}"
    return f"{said.rstrip('.')}. {spec.remedy}" if spec else said
