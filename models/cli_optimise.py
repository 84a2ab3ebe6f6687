"""`pithead models optimise`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from contract.errors import PitheadError

Printer = Callable[[], Console]
Exit = Callable[[PitheadError], typer.Exit]
EPILOG = (
    "Examples:  pithead models optimise build/packages/shuttle/1.0.0 --data recording.csv --label anomaly "
    "--out build/packages   |   pithead models optimise kws.onnx --data inputs.npy "
    "--techniques int8,prune=0.7+int8 --tolerance flips=0.02 --name kws "
    "--version 1.0.0 --licence Apache-2.0 --out build/packages   (exit status 1 when a variant was refused)"
)


def add_to(app: typer.Typer, console: Printer, errors: Console, leave: Exit) -> None:
    """Add the command to `pithead models`."""

    @app.command(epilog=EPILOG)
    def optimise(
        model: Annotated[
            Path, typer.Argument(help="A package's directory, or a float .onnx or .tflite file.")
        ],
        *,
        data: Annotated[Path, typer.Option(help="Recording: .csv (.gz), .parquet, .npy, or .npz by tensor.")],
        out: Annotated[Path, typer.Option(help="The package goes to OUT/<name>/<version>.")],
        label: Annotated[
            str | None, typer.Option(help="Column that is not 0 where something is wrong.")
        ] = None,
        columns: Annotated[
            str | None, typer.Option(help="Names in the file, in the model's order, with commas between.")
        ] = None,
        techniques: Annotated[
            str | None,
            typer.Option(
                help="Of int8, fp16, prune[=SHARE], fuse[=extended]; steps joined by +; default: all."
            ),
        ] = None,
        tolerance: Annotated[
            list[str] | None,
            typer.Option(help="The most a variant may lose: mean=, max=, flips=, auc=; else the manifest's."),
        ] = None,
        calibrate: Annotated[
            float, typer.Option(min=0.01, max=0.99, help="First share of the recording: to calibrate on.")
        ] = 0.5,
        variant: Annotated[
            str | None, typer.Option(help="Of a package: the float variant to begin with.")
        ] = None,
        score: Annotated[
            str | None, typer.Option(help="Of a file: reconstruction_mse or output, judged with --threshold.")
        ] = None,
        threshold: Annotated[
            float | None, typer.Option(help="Of a file: a score above it is an alarm.")
        ] = None,
        name: Annotated[str | None, typer.Option(help="Of a file: name of the model.")] = None,
        version: Annotated[
            str | None, typer.Option(help="SemVer; a package's next minor one by default.")
        ] = None,
        licence: Annotated[str | None, typer.Option(help="Of a file: SPDX identifier.")] = None,
        source: Annotated[str, typer.Option(help="Of a file: where it comes from.")] = "not stated",
        release_counter: Annotated[int | None, typer.Option(min=1, help="Rises with every release.")] = None,
        rounds: Annotated[int, typer.Option(min=1, max=20, help="Of measuring; latencies are medians.")] = 3,
        plot: Annotated[Path | None, typer.Option(help="Write a plot here, as SVG.")] = None,
        require_sandbox: Annotated[
            bool, typer.Option(help="Refuse to open models where the full sandbox is not available.")
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    ) -> None:
        """Make smaller variants of a model; what loses more than the tolerance is not written."""
        from models.optimise import run, show  # noqa: PLC0415 - it imports numpy

        order = run.Order(
            model=model,
            data=data,
            out=out,
            label=label,
            columns=columns,
            techniques=techniques,
            tolerance=tuple(tolerance or ()),
            calibrate=calibrate,
            variant=variant,
            score=score,
            threshold=threshold,
            name=name,
            version=version,
            licence=licence,
            source=source,
            release_counter=release_counter,
            rounds=rounds,
            require_sandbox=require_sandbox,
        )
        try:
            if plot is not None and not plot.parent.is_dir():  # told before the work
                raise PitheadError("config.invalid", f"--plot {plot}: {plot.parent} is no directory")  # noqa: TRY301 - one way out
            with errors.status("reading", spinner="dots") as status:
                result = run.run(order, status.update)
            if plot is not None:
                _write(plot, show.svg(result, f"{name or model.name}: variants beside the original"))
        except PitheadError as error:
            raise leave(error) from error
        if as_json:
            sys.stdout.write(msgspec.json.encode(show.facts(result)).decode() + "\n")
        else:
            _show(result, console(), errors)
        if result.refused:
            raise typer.Exit(1)


def _show(result: Any, console: Console, errors: Console) -> None:
    from models.optimise import show  # noqa: PLC0415 - it imports numpy

    table = Table()
    for i, head in enumerate(show.HEAD):
        table.add_column(head, no_wrap=i == 0)
    for one in result.candidates:
        colour = "green" if one.kept and one.technique else "red" if not one.kept else "bold"
        first, word, *rest = show.cells(one, result)
        table.add_row(first, f"[{colour}]{word}[/]", *rest)
    console.print(table)
    compared = next((c.loss.of for c in result.candidates if c.loss is not None), "outputs")
    console.print(f"differences of {compared}; {result.division}", highlight=False)
    console.print(f"tolerances: {result.tolerances.text}", highlight=False)
    for one in result.candidates[1:]:
        if one.kept:
            console.print(f"{one.name}: {one.explanation}", highlight=False)
        else:
            errors.print(f"[red]{one.code}[/] ", end="")
            errors.print(f"{one.name}: {one.detail}", markup=False, highlight=False, soft_wrap=True)
    if result.directory is None:
        errors.print("no variant was kept, and nothing was written")
    else:
        console.print(f"[bold]written:[/] {result.directory}", soft_wrap=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PitheadError("config.invalid", f"--plot {path}: {error.strerror}") from error
