"""``pithead tokens``: for joining devices, and for the API. A secret is printed once, when it is made."""

import enum
import re
from typing import Annotated, Final

import typer

from contract.errors import PitheadError
from control_plane.cli.client import ServerOption, TokenOption, connect
from control_plane.cli.output import Output, OutputOption, labels, moment, print_json, print_table

tokens_app = typer.Typer(
    add_completion=False,
    name="tokens",
    help="Tokens for joining devices and for the API.",
    no_args_is_help=True,
)


class Kind(enum.Enum):
    """What a token is for."""

    JOIN = "join"
    API = "api"


KindOption = Annotated[Kind, typer.Option("--kind", help="join: for devices; api: for people and programs.")]

_DURATION: Final = re.compile(r"(\d+)\s*(s|min|h|d)")
_SECONDS: Final = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@tokens_app.command(
    epilog="Examples:  pithead tokens create --label site=north --uses 20 --ttl 2h   |   "
    "pithead tokens create --kind api --name dashboard --role viewer --ttl 90d"
)
def create(
    kind: KindOption = Kind.JOIN,
    label: Annotated[list[str] | None, typer.Option(help="join: the devices get name=value; repeat.")] = None,
    uses: Annotated[int | None, typer.Option(min=1, help="join: for so many devices. [default: 1]")] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="api: viewer, operator, releaser, approver or admin; repeat.")
    ] = None,
    name: Annotated[str, typer.Option(help="For people.")] = "",
    ttl: Annotated[str | None, typer.Option(help="How long it is good: 90s, 15min, 24h, 30d.")] = None,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Make a token and print it. It cannot be shown again."""
    if kind is Kind.JOIN and role:
        raise PitheadError("request.invalid", "--role is for API tokens; say --kind api")
    if kind is Kind.API and (label or uses is not None):
        raise PitheadError("request.invalid", "--label and --uses are for join tokens, not for --kind api")
    lifetime = None if ttl is None else _seconds(ttl)
    with connect(server, token) as api:
        if kind is Kind.JOIN:
            wanted: dict[str, object] = {
                "labels": _pairs(label or []),
                "max_uses": 1 if uses is None else uses,
                "description": name,
            }
            if lifetime is not None:
                wanted["ttl_s"] = lifetime
            made = api.post("/api/v1/join-tokens", wanted)
        else:
            made = api.post(
                "/api/v1/tokens", {"name": name or "api", "roles": role or ["viewer"], "ttl_s": lifetime}
            )
    if output is Output.JSON:
        print_json(made)
    else:
        typer.echo(made["token"])


@tokens_app.command("list", epilog="Example:  pithead tokens list --kind api")
def list_tokens(
    kind: KindOption = Kind.JOIN,
    output: OutputOption = Output.TABLE,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """List tokens, without their secrets."""
    with connect(server, token) as api:
        tokens = api.get("/api/v1/join-tokens" if kind is Kind.JOIN else "/api/v1/tokens")
    if output is Output.JSON:
        print_json(tokens)
    elif kind is Kind.JOIN:
        print_table(
            ("ID", "USES", "EXPIRES", "LABELS", "REVOKED", "DESCRIPTION"),
            (
                (
                    each["id"],
                    f"{each['uses']}/{each['max_uses']}",
                    moment(each["expires_at"]),
                    labels(each["labels"]),
                    moment(each["revoked_at"]),
                    each["description"],
                )
                for each in tokens
            ),
            "No join tokens.",
        )
    else:
        print_table(
            ("ID", "NAME", "ROLES", "EXPIRES", "LAST USED", "REVOKED"),
            (
                (
                    each["id"],
                    each["name"],
                    " ".join(each["roles"]),
                    moment(each["expires_at"]),
                    moment(each["last_used"]),
                    moment(each["revoked_at"]),
                )
                for each in tokens
            ),
            "No API tokens.",
        )


@tokens_app.command(epilog="Example:  pithead tokens revoke 01932c7e-... --kind api")
def revoke(
    token_id: Annotated[str, typer.Argument(metavar="ID", help="The token's id, not its secret.")],
    kind: KindOption = Kind.JOIN,
    server: ServerOption = None,
    token: TokenOption = None,
) -> None:
    """Make a token useless."""
    path = "join-tokens" if kind is Kind.JOIN else "tokens"
    with connect(server, token) as api:
        api.delete(f"/api/v1/{path}/{token_id}")
    typer.echo(f"Revoked {token_id}")


def _seconds(text: str) -> int:
    matched = _DURATION.fullmatch(text.strip())
    if matched is None:
        raise PitheadError("request.invalid", f"--ttl: {text!r} is not a time such as 90s, 15min, 24h, 30d")
    return int(matched[1]) * _SECONDS[matched[2]]


def _pairs(values: list[str]) -> dict[str, str]:
    pairs = {}
    for value in values:
        name, separator, content = value.partition("=")
        if not separator:
            raise PitheadError("request.invalid", f"--label: {value!r} is not name=value")
        pairs[name] = content
    return pairs
