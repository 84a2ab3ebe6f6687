"""`pithead models import`."""

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from contract.errors import PitheadError

Exit = Callable[[PitheadError], typer.Exit]
EPILOG = (
    "Examples:  pithead models import forest.joblib --trust-pickle --name forest "
    "--version 1.0.0 --licence MIT --out build/packages   |   pithead models import net.pt2 "
    "--python torch-env/bin/python "
    "--name net --version 1.0.0 --licence MIT --out build/packages"
)


class To(StrEnum):
    """What can be made."""

    ONNX = "onnx"


def add_to(app: typer.Typer, leave: Exit) -> None:
    """Add the command to `pithead models`."""

    @app.command("import", epilog=EPILOG)
    def bring_in(
        file: Annotated[
            Path,
            typer.Argument(help="scikit-learn (.joblib .pkl .skops), Keras, SavedModel, .pt2, TorchScript."),
        ],
        *,
        out: Annotated[Path, typer.Option(help="The package goes to OUT/<name>/<version>.")],
        name: Annotated[str, typer.Option(help="Name of the model.")],
        version: Annotated[str, typer.Option(help="SemVer.")],
        licence: Annotated[str, typer.Option(help="SPDX identifier.")],
        to: Annotated[To, typer.Option(help="Format.")] = To.ONNX,  # noqa: ARG001 - the only one so far
        release_counter: Annotated[int, typer.Option(min=1, help="Rises with every release.")] = 1,
        trust_pickle: Annotated[
            bool, typer.Option("--trust-pickle", help="The file may run its code here: its maker is known.")
        ] = False,
        python: Annotated[
            str, typer.Option(help="Interpreter that has the framework and its converter.")
        ] = sys.executable,
        inputs: Annotated[
            Path | None,
            typer.Option(help="Rows to compare both models on: .npy, or .npz with one array per input."),
        ] = None,
        shape: Annotated[
            list[str] | None,
            typer.Option(help="Of an input, batch included: 1,3,32,32. Needed for TorchScript."),
        ] = None,
        differing: Annotated[
            float,
            typer.Option(min=0, max=1, help="Share of output values that may differ from the original's."),
        ] = 0.0,
        require_sandbox: Annotated[
            bool, typer.Option(help="Refuse to open models where the full sandbox is not available.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    ) -> None:
        """Convert another framework's model, check it against the original, and package it."""
        from models import importing  # noqa: PLC0415 - it imports numpy

        try:
            done = importing.bring_in(
                file,
                out,
                name=name,
                version=version,
                licence=licence,
                release_counter=release_counter,
                python=python,
                trusted=trust_pickle,
                inputs=inputs,
                shapes=[_shape(text) for text in shape or ()],
                differing=differing,
                require_sandbox=require_sandbox,
            )
        except PitheadError as error:
            raise leave(error) from error
        if as_json:
            sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
            return
        sys.stdout.write(
            f"{done.source}\non {done.rows} {done.inputs} rows the largest difference is {done.worst:.3g}, "
            f"{done.differing:.3%} of the values are beyond the tolerance\n{done.directory}\n"
        )


def _shape(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise PitheadError("config.invalid", f"--shape {text!r} is not like 1,3,32,32")
    return found
