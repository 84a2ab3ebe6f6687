"""``pithead init``, ``serve`` and ``broker``: the commands that run on the server itself."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from control_plane.settings import Settings, load
from control_plane.wiring import logs, site
from control_plane.wiring.control_plane import ControlPlane, require_site
from control_plane.wiring.layout import Layout
from provisioning import broker as mosquitto

DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="PITHEAD_DATA_DIR", help="Where everything of this site lies.")
]

init_app = typer.Typer(add_completion=False)
serve_app = typer.Typer(add_completion=False)
broker_app = typer.Typer(add_completion=False)


@init_app.command(epilog="Example:  pithead init --data-dir /var/lib/pithead --host factory.example")
def init(
    data_dir: DataDir,
    host: Annotated[
        str | None, typer.Option(help="Name or address under which devices reach this machine.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="One more name or address for the certificate.")
    ] = None,
    api_port: Annotated[int | None, typer.Option(help="Port of the operators' API.")] = None,
    device_port: Annotated[int | None, typer.Option(help="Port of the devices' listener.")] = None,
    broker_port: Annotated[int | None, typer.Option(help="Port of the broker.")] = None,
    database_url: Annotated[
        str | None, typer.Option(help="SQLite in the data directory when not given.")
    ] = None,
) -> None:
    """Make a site: authorities, the broker's configuration, the database, the first API token.

    What is there already is left as it is, so the command can be repeated. The options go to
    pithead.toml; when that is there already, it is changed by hand.
    """
    layout = Layout(data_dir)
    given = {
        "host": host,
        "names": tuple(name) if name else None,
        "api_port": api_port,
        "device_port": device_port,
        "broker_port": broker_port,
        "database_url": database_url,
    }
    made = site.init(layout, given, os.environ)
    typer.echo(f"{'Made' if made.site else 'Kept'} the site in {layout.data_dir}")
    if made.token is not None:
        typer.echo(f"First API token (role admin), shown only now:\n  {made.token.token}")
        if made.profile is not None:
            typer.echo(f"Written for the command line into {made.profile}")
        else:
            typer.echo("The command line has a profile of another site: set PITHEAD_SERVER and PITHEAD_TOKEN")
    typer.echo(
        "Next:\n"
        f"  pithead keys init --data-dir {data_dir}    make the signing keys\n"
        f"  pithead broker --data-dir {data_dir}       run the broker\n"
        f"  pithead serve --data-dir {data_dir}        run the control plane"
    )


@serve_app.command(epilog="Example:  pithead serve --data-dir /var/lib/pithead --api-port 8480")
def serve(
    data_dir: DataDir,
    api_host: Annotated[str | None, typer.Option(help="Address of the operators' API.")] = None,
    api_port: Annotated[int | None, typer.Option(help="Port of the operators' API.")] = None,
    device_host: Annotated[str | None, typer.Option(help="Address of the devices' listener.")] = None,
    device_port: Annotated[int | None, typer.Option(help="Port of the devices' listener.")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = None,
) -> None:
    """Run the control plane: API, devices' listener, ingest, workers, signer.

    Every setting of pithead.toml can be overridden by PITHEAD_<NAME>.
    """
    layout = Layout(data_dir)
    settings = load(
        layout.data_dir,
        os.environ,
        {
            "api_host": api_host,
            "api_port": api_port,
            "device_host": device_host,
            "device_port": device_port,
            "log_level": log_level,
        },
    )
    logs.install(settings.log_level)
    require_site(layout)
    with layout.alone():
        ControlPlane(layout, settings).serve(lambda: _announce(settings))
    typer.echo("Stopped.")


@broker_app.command(epilog="Example:  pithead broker --data-dir /var/lib/pithead")
def broker(data_dir: DataDir) -> None:
    """Run the broker (mosquitto) with this site's configuration, in the foreground."""
    layout = Layout(data_dir)
    require_site(layout)
    program = mosquitto.executable()
    os.execv(program, [program, "-c", str(layout.broker_config)])  # noqa: S606  this process becomes the broker


def _announce(settings: Settings) -> None:
    typer.echo(
        f"Pithead {version('pithead')}\n"
        f"  operators  http://{settings.api_host}:{settings.api_port}/api/v1\n"
        f"  devices    https://{settings.host}:{settings.device_port}\n"
        f"  broker     mqtts://{settings.broker}:{settings.broker_port}"
    )
