"""`pithead models`: build, look at, and check model packages."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from contract.errors import PitheadError
from contract.manifest import Manifest
from inference.probing import DEFAULT_LIMITS, Limits
from models import cli_import, cli_optimise, package, shipped

app = typer.Typer(
    add_completion=False,
    name="models",
    help="Build, look at and check model packages.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
_WIDTH_OF_A_FILE = 160
_errors = Console(stderr=True)


def _console() -> Console:
    """Return a console as wide as the terminal; what goes to a file or a pipe must not be cut."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_FILE)


@app.command(
    epilog="Examples:  pithead models build --all --out build/packages   |   "
    "pithead models build shuttle --recipe wider --out build/packages   |   "
    "pithead models build shuttle --version 2.1.0 --release-counter 5 --set hidden=32,4,32 --set seed=3 "
    "--out build/packages"
)
def build(
    name: Annotated[str | None, typer.Argument(help="One of the shipped models.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Packages go to OUT/<name>/<version>.")],
    every: Annotated[bool, typer.Option("--all", help="Build every shipped model.")] = False,
    recipe: Annotated[str | None, typer.Option(help="A named set of settings; `all` builds each.")] = None,
    version: Annotated[str | None, typer.Option(help="Instead of the recipe's version.")] = None,
    release_counter: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one setting of the recipe: name=value.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line for each package.")] = False,
) -> None:
    """Build shipped models from data; the same arguments write the same bytes."""
    try:
        orders = _orders(name, recipe, version, release_counter, settings or [], every=every)
        built = _build_all(orders, out, quiet=as_json)
        manifests = [(directory, package.read_manifest(directory)) for directory in built]
    except PitheadError as error:
        raise _exit(error) from error
    if as_json:
        for directory, manifest in manifests:
            _print_json({"directory": str(directory), **_facts(manifest)})
        return
    for directory, manifest in manifests:
        _console().print(f"[bold]{manifest.name} {manifest.version}[/]  {directory}")
        _console().print(_metrics(manifest))


def _orders(
    name: str | None,
    recipe: str | None,
    version: str | None,
    release_counter: int | None,
    settings: list[str],
    *,
    every: bool,
) -> list[shipped.Order]:
    if every == (name is not None):
        raise PitheadError("config.invalid", f"name one of {', '.join(shipped.SHIPPED)}, or --all")
    changes = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise PitheadError("config.invalid", f"--set {text!r} is not name=value")
        changes[key] = value
    names = list(shipped.SHIPPED) if name is None else [name]
    return [
        shipped.order(each, recipe=one, version=version, release_counter=release_counter, settings=changes)
        for each in names
        for one in (shipped.recipes_of(each) if recipe == "all" else [recipe])
    ]


def _build_all(orders: list[shipped.Order], out: Path, *, quiet: bool) -> list[Path]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_errors, disable=quiet) as progress, ThreadPoolExecutor(2) as pool:

        def one(order: shipped.Order) -> Path:
            task = progress.add_task(f"building {order.name} {order.version} ({order.recipe})", total=1)
            directory = shipped.build_apart(order, out)
            progress.update(task, completed=1)
            return directory

        return list(pool.map(one, orders))


@app.command(epilog="Example:  pithead models inspect build/packages/shuttle/1.0.0")
def inspect(
    directory: Annotated[Path, typer.Argument(help="A package's directory.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest's main facts as JSON.")] = False,
) -> None:
    """Show what a package holds, without opening its models."""
    try:
        manifest = package.read_manifest(directory)
        package.check_files(directory, manifest)
    except PitheadError as error:
        raise _exit(error) from error
    if as_json:
        _print_json(_facts(manifest))
        return
    _console().print(
        f"[bold]{manifest.name} {manifest.version}[/]  release counter {manifest.release_counter}  "
        f"{manifest.licence}\n{manifest.summary}"
    )
    table = Table(
        "variant", "file", "bytes", "accelerators", "arch", "preference", "golden vectors", "tolerance"
    )
    for v in sorted(manifest.variants, key=lambda v: -v.preference):
        allowed = ", ".join(f"{name} ±{t.atol:g} ±{t.rtol:g}x" for name, t in v.golden.tolerance.items())
        table.add_row(
            v.name,
            v.file.path,
            str(v.file.length),
            ", ".join(v.accelerators),
            ", ".join(v.arch),
            str(v.preference),
            str(v.golden.vectors),
            allowed or "exact",
        )
    _console().print(table)
    if manifest.pipeline is not None and manifest.score is not None:
        p, alarm = manifest.pipeline, manifest.score
        fitted = "" if p.fit is None else f", fitted per device on {p.fit.samples} windows"
        _console().print(
            f"input: {len(p.channels)} channels, window {p.window}, stride {p.stride}, "
            f"{p.sample_rate_hz or '?'} Hz{fitted}; alarm: {alarm.method} > {alarm.threshold:g}"
        )
    _console().print(_metrics(manifest))


@app.command(
    epilog="Example:  pithead models validate build/packages/shuttle/1.0.0 --json   "
    "(exit status 1 when the package must not be published)"
)
def validate(
    directory: Annotated[Path, typer.Argument(help="A package's directory.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    require_sandbox: Annotated[
        bool, typer.Option(help="Refuse to open models where the full sandbox is not available.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="For each variant on each accelerator.")] = (
        DEFAULT_LIMITS.wall_s
    ),
) -> None:
    """Check manifest, files and golden vectors; each model is opened in a sandbox of its own."""
    result = package.validate(directory, limits=Limits(wall_s=timeout_s), require_sandbox=require_sandbox)
    if as_json:
        _print_json(msgspec.to_builtins(result))
    else:
        _show(result)
    if not result.valid:
        raise typer.Exit(1)


@app.command(
    epilog="Example:  pithead models wrap kws.tflite kws.onnx --name kws --version 1.0.0 "
    "--licence Apache-2.0 --out build/packages"
)
def wrap(
    files: Annotated[list[Path], typer.Argument(help="Files of one model (.tflite, .onnx), best first.")],
    *,
    name: Annotated[str, typer.Option(help="Name of the model.")],
    version: Annotated[str, typer.Option(help="SemVer.")],
    out: Annotated[Path, typer.Option(help="The package goes to OUT/<name>/<version>.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier.")],
    release_counter: Annotated[int, typer.Option(min=1, help="Rises with every release.")] = 1,
    source: Annotated[str, typer.Option(help="Where the files come from.")] = "not stated",
    inputs: Annotated[
        Path | None, typer.Option(help="An .npz with one array per input tensor, a leading axis of vectors.")
    ] = None,
    require_sandbox: Annotated[
        bool, typer.Option(help="Refuse to open models where the full sandbox is not available.")
    ] = False,
) -> None:
    """Package model files from elsewhere, unchanged; golden vectors are recorded in a sandbox."""
    from models.wrap import wrap as make  # noqa: PLC0415 - it imports numpy

    directory = out / name / version
    try:
        make(
            files,
            directory,
            name=name,
            version=version,
            release_counter=release_counter,
            licence=licence,
            source=source,
            inputs=inputs,
            require_sandbox=require_sandbox,
        )
    except PitheadError as error:
        raise _exit(error) from error
    sys.stdout.write(f"{directory}\n")


@app.command(
    epilog="Example:  pithead models graph spectrum.onnx --windows normal.npy --out build/packages/pump/1.0.0"
)
def graph(
    file: Annotated[Path, typer.Argument(help="An ONNX file: float32 (n, window, channels) to (n, ...).")],
    *,
    out: Annotated[Path, typer.Option(help="The package's directory.")],
    windows: Annotated[
        Path | None, typer.Option(help="A .npy of normalised windows (n, window, channels).")
    ] = None,
    name: Annotated[str, typer.Option(help="Of its files in the package.")] = "features",
    per_channel: Annotated[bool, typer.Option(help="It gives a table of rows x channels.")] = False,
    require_sandbox: Annotated[
        bool, typer.Option(help="Refuse to open it where the full sandbox is not available.")
    ] = False,
) -> None:
    """Put an ONNX graph into a package as its feature; prints what `pipeline.features` has to say."""
    from models.graph import graph_of  # noqa: PLC0415 - it imports numpy

    try:
        made, contents = graph_of(
            file, windows, name=name, per_channel=per_channel, require_sandbox=require_sandbox
        )
    except PitheadError as error:
        raise _exit(error) from error
    for path, content in contents.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)
    sys.stdout.write(msgspec.json.format(msgspec.json.encode([made]), indent=1).decode() + "\n")


@app.command(
    epilog="Example:  pithead models backtest build/packages/shuttle/1.0.0 recording.csv --label anomaly"
)
def backtest(
    directory: Annotated[Path, typer.Argument(help="A package's directory.")],
    recording: Annotated[Path, typer.Argument(help="A CSV (.gz) or Parquet file with a column per channel.")],
    *,
    columns: Annotated[
        str | None, typer.Option(help="Names in the file, in the order of the channels, with commas between.")
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Column that is not 0 where something is wrong: adds precision, AUC ..."),
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Instead of the preferred one.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="Instead of the variant's first.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write row, score and alarm of each window, as CSV.")
    ] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="For the whole recording.")] = 3600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Replay a recording through the lane of a device, and say what it would have found."""
    from models import backtest as replay  # noqa: PLC0415 - it imports numpy

    names = None if columns is None else [name.strip() for name in columns.split(",")]
    try:
        found = replay.backtest(
            directory,
            recording,
            columns=names,
            label=label,
            variant=variant,
            accelerator=accelerator,
            timeout_s=timeout_s,
        )
        if out is not None:
            replay.write_csv(out, found)
    except PitheadError as error:
        raise _exit(error) from error
    facts = replay.summary(found)
    if as_json:
        _print_json(facts)
        return
    table = Table("what", "value", show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value))
    _console().print(table)


def _show(result: package.Validation) -> None:
    table = Table("variant", "accelerator", "result", "vectors", "p50 µs", "p99 µs", "memory MB", "sandbox")
    for r in result.probes:
        table.add_row(
            r.variant,
            r.accelerator,
            "[green]passed[/]" if r.passed else f"[red]{r.code}[/]",
            str(r.vectors),
            f"{r.latency_p50_us:.1f}",
            f"{r.latency_p99_us:.1f}",
            f"{r.memory_mb:.1f}",
            r.sandbox.level if r.sandbox else "",
        )
    if result.probes:
        _console().print(table)
    for variant in result.untried:
        _console().print(f"[yellow]{variant}: not tried, this machine has none of its accelerators[/]")
    if result.valid:
        _console().print(f"[green]{result.name} {result.version} may be published[/]")
    else:
        _errors.print(f"[red]{result.code}[/] ", end="")
        _errors.print(result.detail, markup=False)


def _metrics(manifest: Manifest) -> Table:
    table = Table("metric", "value", show_header=False, box=None)
    for key, value in manifest.provenance.metrics.items():
        table.add_row(key.replace("_", " "), f"{value:g}")
    return table


def _facts(manifest: Manifest) -> dict[str, object]:
    return {
        "name": manifest.name,
        "version": manifest.version,
        "release_counter": manifest.release_counter,
        "variants": [v.name for v in manifest.variants],
        "threshold": None if manifest.score is None else manifest.score.threshold,
        "metrics": manifest.provenance.metrics,
    }


def _print_json(value: object) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def _exit(error: PitheadError) -> typer.Exit:
    _errors.print(f"[red]{error.code}[/] ", end="")
    _errors.print(f"{error.detail}\n{error.remedy}", markup=False)
    return typer.Exit(1)


cli_optimise.add_to(app, _console, _errors, _exit)
cli_import.add_to(app, _exit)
