"""``pithead``: one command line made of many, each loaded only when it is called.

So ``pithead --help`` is quick, and a command that is broken or not
installed breaks no other.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points, version
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from contract.errors import PitheadError

GROUP: Final = "pithead.commands"
_PASS_ON: Final = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


class Lazy(msgspec.Struct, frozen=True):
    """A command by the place of its Typer app, ``module:name``."""

    target: str
    help: str

    def load(self) -> typer.Typer:
        """Return the app."""
        module, _, name = self.target.partition(":")
        app = getattr(import_module(module), name)
        if not isinstance(app, typer.Typer):
            raise TypeError(f"{self.target} is not a Typer app")
        return app


def build_app(own: Mapping[str, Lazy], known: Mapping[str, str]) -> typer.Typer:
    """Return the app: ``own`` commands and those of other packages (``known``: what to say of them)."""
    app = typer.Typer(
        name="pithead",
        help="Run machine-learning models on factory devices, and look after the fleet they run on.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    commands = dict(own)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        commands.setdefault(point.name, Lazy(point.value, known.get(point.name, f"From {point.module}.")))
    for name, lazy in commands.items():
        _mount(app, name, lazy)
    return app


def run(app: typer.Typer) -> None:
    """Run the command line; an error says what, why and what to do, and ends with status 1."""
    try:
        app()
    except PitheadError as error:
        show_error(error)
        raise SystemExit(1) from error
    except OSError as error:
        show_error(PitheadError("config.invalid", str(error)))
        raise SystemExit(1) from error


def show_error(error: PitheadError) -> None:
    """Print an error for a person."""
    console = Console(stderr=True)
    console.print(
        Text.assemble((f"{error.code}: ", "bold red"), error.detail or error.spec.summary), soft_wrap=True
    )
    console.print(Text(f"  {error.remedy}", style="dim"), soft_wrap=True)


def _options(
    *,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"pithead {version('pithead')}")
        raise typer.Exit


def _mount(app: typer.Typer, name: str, lazy: Lazy) -> None:
    @app.command(name, help=lazy.help, context_settings=_PASS_ON, add_help_option=False)
    def call(context: typer.Context) -> None:
        try:
            loaded = lazy.load()
        except Exception as error:
            sys.stderr.write(f"pithead {name}: {lazy.target} cannot be loaded: {error}\n")
            raise typer.Exit(1) from error
        loaded(args=context.args, prog_name=f"pithead {name}")
