"""The command ``pithead keys``: the ceremony that makes the signing keys, and a look at what it made."""

import os
from pathlib import Path
from typing import Annotated

import typer

from contract.errors import PitheadError
from provisioning import keys

keys_app = typer.Typer(
    add_completion=False, name="keys", help="Signing keys: hold the ceremony, look at its result."
)

DataDir = Annotated[Path, typer.Option("--data-dir", envvar="PITHEAD_DATA_DIR", help="Data directory.")]
Offline = Annotated[
    Path | None, typer.Option("--offline", help="Directory for the offline keys. [default: DATA_DIR/offline]")
]


@keys_app.command()
def init(data_dir: DataDir, offline: Offline = None) -> None:
    """Make all signing keys and the first signed metadata. Overwrites nothing."""
    directory = offline or keys.offline_directory(data_dir)
    files = keys.init(data_dir, directory, new_passphrase(), keys.utc_now())
    for path, what in files.items():
        typer.echo(f"{path}  {what}")
    typer.echo(
        f"\nThe keys in {directory} are encrypted and not needed here from now on:\n"
        "  - move image-root-*, image-targets-* and director-root-* to three separate places\n"
        "    (any two of three sign; they are needed for key rotation only);\n"
        "  - give release-1.pem to whoever releases models:\n"
        "    `pithead release PACKAGE_DIR --key release-1.pem`;\n"
        "  - keep the passphrase apart from them.\n"
        f"The keys in {data_dir / 'signer'} are for the signer process alone; back them up offline.\n"
        "Devices learn both roots when they enrol."
    )


@keys_app.command()
def status(data_dir: DataDir, offline: Offline = None) -> None:
    """Show which keys and signed files are there, and when the files expire."""
    directory = offline or keys.offline_directory(data_dir)
    missing = 0
    now = keys.utc_now()
    for file in keys.status(data_dir, directory):
        state = "present" if file.present else "not here"
        if file.expires is not None:
            state = f"version {file.version}, expires {file.expires:%Y-%m-%d}"
            if file.ends_soon(now):
                state += f"  SIGN AGAIN: {(file.expires - now).days} days left"
        typer.echo(f"{file.path}  {file.what}: {state}")
        missing += not file.present and file.path.parent != directory
    if missing:
        typer.echo(
            f"{missing} files are missing: hold the ceremony with `pithead keys init --data-dir {data_dir}`"
        )
        raise typer.Exit(1)


def new_passphrase() -> str:
    """Return the passphrase for new keys, from the environment or asked for twice."""
    given = os.environ.get(keys.ENVIRONMENT_VARIABLE)
    if given is not None:
        return given
    answer: str = typer.prompt("Passphrase for the offline keys", hide_input=True, confirmation_prompt=True)
    return answer


def passphrase_for(path: Path) -> str | None:
    """Return the passphrase of the key in ``path``; None when it is not encrypted."""
    if not keys.is_encrypted(path):
        return None
    given = os.environ.get(keys.ENVIRONMENT_VARIABLE)
    if given is not None:
        return given
    answer: str = typer.prompt(f"Passphrase of {path.name}", hide_input=True)
    if not answer:
        raise PitheadError("request.invalid", f"{path} needs a passphrase")
    return answer
