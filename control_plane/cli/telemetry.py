"""``pithead anomalies`` and ``pithead events``."""

import json
import time
from typing import Annotated, Final

import typer

from contract.errors import PitheadError
from control_plane.cli.client import ServerOption, TokenOption, connect
from control_plane.cli.devices import every
from control_plane.cli.output import Output, OutputOption, moment, print_json, print_table

anomalies_app = typer.Typer(add_completion=False, name="anomalies", no_args_is_help=True)
events_app = typer.Typer(add_completion=False, name="events", no_args_is_help=True)

MAX_MINUTES: Final = 10 * 366 * 24 * 60

Limit = Annotated[int, typer.Option(min=1, help="At most so many, the newest first.")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Of the last so many minutes.")]


@anomalies_app.callback()
def _anomalies() -> None:
    """What the models have found."""


@events_app.callback()
def _events() -> None:
    """What people and the control plane did."""


@anomalies_app.command(
    "list", epilog="Example:  pithead anomalies list --model shuttle --minutes 10 --limit 50"
)
def list_anomalies(
    device: Annotated[str | None, typer.Option(help="Of this device.")] = None,
    model: Annotated[str | None, typer.Option(help="Of this model.")] = None,
    minutes: Minutes = None,
    limit: Limit = 50,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List anomalies, the newest first."""
    params = {"device": device, "model": model, "since": _since(minutes)}
    with connect(server, token) as api:
        found = every(api, "/api/v1/anomalies", params, limit)
    if output is Output.JSON:
        print_json(found)
        return
    print_table(
        ("RECEIVED", "DEVICE", "MODEL", "SCORE", "THRESHOLD", "SOURCE", "BECAUSE OF"),
        (
            (
                moment(each["t_received"]),
                each["device_id"],
                f"{each['model_name']} {each['version']}",
                f"{each['score']:.4g}",
                f"{each['threshold']:.4g}",
                " ".join(part for part in (each["source"], each["source_ref"]) if part) or "-",
                _because(each["contributions"]),
            )
            for each in found
        ),
        "No anomalies.",
    )


@events_app.command("list", epilog="Example:  pithead events list --kind device.enrolled")
def list_events(
    kind: Annotated[str | None, typer.Option(help="Of this kind, for example device.enrolled.")] = None,
    subject: Annotated[str | None, typer.Option(help="About this device, token, rollout ...")] = None,
    minutes: Minutes = None,
    limit: Limit = 50,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List events, the newest first."""
    params = {"kind": kind, "subject": subject, "since": _since(minutes)}
    with connect(server, token) as api:
        found = every(api, "/api/v1/events", params, limit)
    if output is Output.JSON:
        print_json(found)
        return
    print_table(
        ("WHEN", "WHO", "WHAT", "ABOUT", "FACTS"),
        (
            (
                moment(each["t"]),
                each["actor"],
                each["kind"],
                each["subject"],
                json.dumps(each["facts"], ensure_ascii=False) if each["facts"] else "-",
            )
            for each in found
        ),
        "No events.",
    )


def _since(minutes: float | None) -> int | None:
    if minutes is None:
        return None
    if not 0 <= minutes <= MAX_MINUTES:
        raise PitheadError("request.invalid", f"--minutes: {minutes} is not from 0 to {MAX_MINUTES}")
    return time.time_ns() // 1000 - round(minutes * 60_000_000)


def _because(contributions: dict[str, float]) -> str:
    largest = sorted(contributions.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {share:.0%}" for name, share in largest) or "-"
