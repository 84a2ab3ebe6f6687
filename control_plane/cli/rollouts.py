"""``pithead rollouts``: bring a version to the fleet by stages, and see why it does or does not move."""

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from control_plane.cli import rollouts_show as show_
from control_plane.cli.client import Client, ServerOption, TokenOption, connect
from control_plane.cli.output import Output, OutputOption, ago, print_json, print_table
from control_plane.cli.rollouts_replay import read_policy, replay_file

rollouts_app = typer.Typer(
    add_completion=False,
    name="rollouts",
    help="Bring a version to the fleet by stages.",
    no_args_is_help=True,
)

PATH: Final = "/api/v1/rollouts"
FINAL: Final = frozenset({"succeeded", "rolled_back", "aborted"})

RolloutArgument = Annotated[str, typer.Argument(help="The rollout's id.")]
ReasonOption = Annotated[str, typer.Option("--reason", "-m", help="Why; it is kept with the event.")]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="Policy file (TOML); the default policy without.", dir_okay=False),
]
ModelArgument = Annotated[str, typer.Argument(help="Name of the model.")]
VersionArgument = Annotated[str, typer.Argument(help="Released version.")]
GroupOption = Annotated[str | None, typer.Option(help="Devices of this group only.")]
LabelOption = Annotated[list[str] | None, typer.Option(help="name=value; repeat, all must match.")]
DeviceOption = Annotated[list[str] | None, typer.Option("--device", help="This device; may be repeated.")]


@rollouts_app.command(epilog="Example:  pithead rollouts create shuttle 2.0.0 --policy policy.toml --watch")
def create(
    model: ModelArgument,
    version: VersionArgument,
    *,
    policy: PolicyOption = None,
    group: GroupOption = None,
    label: LabelOption = None,
    device: DeviceOption = None,
    watching: Annotated[bool, typer.Option("--watch", help="Watch it until it ends or waits.")] = False,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Make a rollout. It begins at once, unless its policy asks for an approval."""
    body = _wanted(model, version, policy, group, label, device)
    with connect(server, token) as api:
        made = api.post(PATH, body)
        if output is Output.JSON:
            print_json(made)
        else:
            typer.echo(made["id"])
        if watching:
            _watch(api, made["id"], 1.0)


@rollouts_app.command(epilog="Example:  pithead rollouts plan shuttle 2.0.0 --policy policy.toml")
def plan(
    model: ModelArgument,
    version: VersionArgument,
    *,
    policy: PolicyOption = None,
    group: GroupOption = None,
    label: LabelOption = None,
    device: DeviceOption = None,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Say what a rollout would do and what its gate could find. Nothing is changed."""
    body = _wanted(model, version, policy, group, label, device)
    with connect(server, token) as api:
        found = api.post(f"{PATH}/plan", body)
    if output is Output.JSON:
        print_json(found)
        return
    show_.plan(Console(), found)


@rollouts_app.command("list")
def list_rollouts(
    *,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    state: Annotated[str | None, typer.Option(help="Only in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List rollouts, the newest first."""
    with connect(server, token) as api:
        found = api.get(PATH, {"model": model, "state": state, "limit": limit})["items"]
    if output is Output.JSON:
        print_json(found)
        return
    now = time.time_ns() // 1000
    print_table(
        ("ROLLOUT", "MODEL", "VERSION", "STATE", "STAGE", "CHANGED", "WHY"),
        (
            (
                one["id"],
                one["model"],
                one["version"],
                show_.state(one),
                f"{one['stage']}/{one['stages']}",
                ago(one["changed_at"], now),
                one["reason"],
            )
            for one in found
        ),
        "No rollouts. Make one: pithead rollouts create MODEL VERSION",
    )


@rollouts_app.command()
def show(
    rollout: RolloutArgument,
    *,
    devices: Annotated[bool, typer.Option("--devices", help="List its devices too.")] = False,
    verdicts: Annotated[bool, typer.Option("--verdicts", help="List all decisions too.")] = False,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Show a rollout: how far it is, what the gate says, who failed."""
    with connect(server, token) as api:
        found = api.get(f"{PATH}/{rollout}")
        if devices:
            found["assignments"] = api.get(f"{PATH}/{rollout}/assignments")
        if verdicts:
            found["verdicts"] = api.get(f"{PATH}/{rollout}/verdicts")
    if output is Output.JSON:
        print_json(found)
        return
    console = Console()
    console.print(show_.status(found))
    if devices:
        show_.assignments(found["assignments"])
    if verdicts:
        show_.verdicts(found["verdicts"])


@rollouts_app.command()
def watch(
    rollout: RolloutArgument,
    *,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 1.0,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Watch a rollout until it ends or waits for a person. Ends with 1 unless it has succeeded."""
    with connect(server, token) as api:
        ended = _watch(api, rollout, every)
    if ended["state"] != "succeeded":
        raise typer.Exit(1)


@rollouts_app.command()
def approve(
    rollout: RolloutArgument,
    reason: ReasonOption = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Let a rollout start, or go on where it waits for a person."""
    _decide("approve", rollout, reason, server, token)


@rollouts_app.command()
def skip(
    rollout: RolloutArgument,
    reason: ReasonOption = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """End the present stage as if the gate had advanced it."""
    _decide("skip", rollout, reason, server, token)


@rollouts_app.command()
def pause(
    rollout: RolloutArgument,
    reason: ReasonOption = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Stop growth; guardrails and gate go on watching."""
    _decide("pause", rollout, reason, server, token)


@rollouts_app.command()
def resume(
    rollout: RolloutArgument,
    reason: ReasonOption = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Go on after a pause that an operator ordered."""
    _decide("resume", rollout, reason, server, token)


@rollouts_app.command()
def abort(
    rollout: RolloutArgument,
    reason: ReasonOption = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """End it where it stands: devices that serve the new version keep it. See also ``rollback``.

    One that goes back waits no longer for devices that are not heard of.
    """
    _decide("abort", rollout, reason, server, token)


@rollouts_app.command()
def rollback(
    rollout: RolloutArgument,
    reason: ReasonOption = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Bring every device back to the version that it had."""
    _decide("rollback", rollout, reason, server, token)


@rollouts_app.command()
def retry(rollout: RolloutArgument, server: ServerOption = None, token: TokenOption = None) -> None:
    """Offer the version once more to the devices that failed or were not reached."""
    _decide("retry", rollout, "", server, token)


@rollouts_app.command(epilog="Example:  pithead rollouts why ROLLOUT dev-4x7k2m9qpw1c")
def why(
    rollout: RolloutArgument,
    device: Annotated[str, typer.Argument(help="The device's id.")],
    *,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Say what keeps a device from its update, and what would change it."""
    with connect(server, token) as api:
        found = api.get(f"{PATH}/{rollout}/why", {"device": device})
    if output is Output.JSON:
        print_json(found)
        return
    show_.why(Console(), found)


@rollouts_app.command()
def trace(
    rollout: RolloutArgument,
    verdict: Annotated[int, typer.Argument(help="Id of the decision; see `show --verdicts`.")],
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Print what a decision of the gate was based on, for ``replay``."""
    with connect(server, token) as api:
        typer.echo(api.get_bytes(f"{PATH}/{rollout}/verdicts/{verdict}/trace").decode(), nl=False)


@rollouts_app.command(epilog="Example:  pithead rollouts replay --policy policy.toml --trace trace.jsonl")
def replay(
    policy: Annotated[Path, typer.Option("--policy", help="Policy file (TOML).", dir_okay=False)],
    trace_file: Annotated[Path, typer.Option("--trace", help="Trace (JSON Lines).", dir_okay=False)],
) -> None:
    """Run the gate on a recorded or simulated trace; print one JSON line per look, and the verdict.

    Needs no server: the code is the very one that decides live.
    """
    for line in replay_file(policy, trace_file):
        typer.echo(line)


def _wanted(
    model: str,
    version: str,
    policy: Path | None,
    group: str | None,
    label: list[str] | None,
    device: list[str] | None,
) -> dict[str, Any]:
    labels = {}
    for pair in label or ():
        name, separator, value = pair.partition("=")
        if not separator:
            raise typer.BadParameter(f"{pair!r} is not name=value", param_hint="--label")
        labels[name] = value
    return {
        "model": model,
        "version": version,
        "policy": read_policy(policy) if policy is not None else {},
        "group": group,
        "labels": labels,
        "devices": device or [],
    }


def _decide(action: str, rollout: str, reason: str, server: str | None, token: str | None) -> None:
    with connect(server, token) as api:
        found = api.post(f"{PATH}/{rollout}/{action}", {"reason": reason} if action != "retry" else None)
    Console().print(show_.headline(found))


def _watch(api: Client, rollout: str, every: float) -> dict[str, Any]:
    """Show the rollout live until it ends or waits for a person, and return it as it then is."""
    console = Console()
    found: dict[str, Any] = api.get(f"{PATH}/{rollout}")
    with Live(show_.status(found), console=console, refresh_per_second=4) as live:
        while found["state"] not in FINAL and not _waits(found):
            time.sleep(every)
            found = api.get(f"{PATH}/{rollout}")
            live.update(Group(show_.status(found)))
    if _waits(found):
        console.print(Text("It waits for a person: pithead rollouts approve, or rollback", style="yellow"))
    return found


def _waits(found: dict[str, Any]) -> bool:
    paused = found["state"] == "paused" and found["pause"] != "operator"
    return paused or bool(found["state"] == "awaiting_approval")
