"""``pithead groups``: named label selectors."""

from typing import Annotated

import typer

from contract.errors import PitheadError
from control_plane.cli.client import ServerOption, TokenOption, connect
from control_plane.cli.output import Output, OutputOption, labels, print_json, print_table

groups_app = typer.Typer(
    add_completion=False, name="groups", help="Groups of devices, by their labels.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="The group's name.")]
Selector = Annotated[
    list[str], typer.Option("--label", help="name=value; repeat: a device must have all of them.")
]
Description = Annotated[str, typer.Option(help="For people.")]


@groups_app.command("list", epilog="Example:  pithead groups list")
def list_groups(
    output: OutputOption = Output.TABLE, server: ServerOption = None, token: TokenOption = None
) -> None:
    """List groups."""
    with connect(server, token) as api:
        groups = api.get("/api/v1/groups")
    if output is Output.JSON:
        print_json(groups)
        return
    print_table(
        ("GROUP", "LABELS", "DESCRIPTION"),
        ((group["name"], labels(group["selector"]), group["description"]) for group in groups),
        "No groups.",
    )


@groups_app.command(epilog="Example:  pithead groups create north --label site=north")
def create(
    name: Name,
    label: Selector,
    description: Description = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Make a group."""
    with connect(server, token) as api:
        api.post("/api/v1/groups", {"name": name, "selector": _selector(label), "description": description})
    typer.echo(f"Made the group {name}")


@groups_app.command(epilog="Example:  pithead groups change north --label site=north --label line=3")
def change(
    name: Name,
    label: Selector,
    description: Description = "",
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Replace a group's labels and description."""
    with connect(server, token) as api:
        api.put(f"/api/v1/groups/{name}", {"selector": _selector(label), "description": description})
    typer.echo(f"Changed the group {name}")


@groups_app.command(epilog="Example:  pithead groups delete north")
def delete(name: Name, server: ServerOption = None, token: TokenOption = None) -> None:
    """Delete a group; its devices stay as they are."""
    with connect(server, token) as api:
        api.delete(f"/api/v1/groups/{name}")
    typer.echo(f"Deleted the group {name}")


def _selector(pairs: list[str]) -> dict[str, str]:
    selector = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise PitheadError("request.invalid", f"--label: {pair!r} is not name=value")
        selector[name] = value
    return selector
