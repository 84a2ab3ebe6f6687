"""The command ``pithead demo``."""

import shutil
import signal
import tempfile
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer
from rich.console import Console

from simulator.demo.fleet import Fleet
from simulator.demo.narrator import Narrator
from simulator.demo.story import Story
from simulator.processes import SimulatorError

PLAIN_WIDTH: Final = 140

demo_app = typer.Typer(
    add_completion=False,
    name="demo",
    help="The main job on this machine, told as a story.",
    invoke_without_command=True,
)


@demo_app.command(
    epilog="Examples:  pithead demo    pithead demo --once --headless    pithead demo --devices 5"
)
def demo(
    devices: Annotated[int, typer.Option(min=3, max=200, help="How many real agents to run.")] = 20,
    headless: Annotated[bool, typer.Option("--headless", help="Plain lines instead of moving bars.")] = False,
    once: Annotated[
        bool, typer.Option("--once", help="End after the story; fail when a check failed.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where everything goes; must not exist or be empty. Kept.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.1, max=20, help="How much faster the recording is replayed.")
    ] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="Save the summary as an SVG picture.")] = None,
) -> None:
    """Enrol a fleet, install signed models, find anomalies, pass a good canary, catch a bad one.

    Everything is real: the broker, the agents (two processes each), the keys, the models and the data.
    """
    where = _directory(data_dir)
    terminal = Console()
    plain = headless or not terminal.is_terminal
    narrator = Narrator(Console(width=PLAIN_WIDTH) if plain else terminal, headless=plain)
    fleet = Fleet(where, devices, speed)
    signal.signal(signal.SIGTERM, _end)
    keep = data_dir is not None
    try:
        try:
            Story(fleet, narrator).run()
        except SimulatorError as error:
            narrator.check("the story went to its end", str(error), passed=False)
            keep = True
        narrator.summary(picture)
        if not narrator.passed:
            narrator.say(f"logs and data are in {where}")
            keep = True
        if not once:
            _stay(fleet, narrator)
    except KeyboardInterrupt:
        narrator.say("ending")
    finally:
        fleet.stop()
        if not keep:
            shutil.rmtree(where, ignore_errors=True)
    if not narrator.passed:
        raise typer.Exit(1)


def _stay(fleet: Fleet, narrator: Narrator) -> None:
    plant = fleet.plant
    narrator.panel(
        "still running; Ctrl-C ends it",
        [
            f"API          {plant.api_url}/docs",
            f"token        {plant.token}",
            "",
            f"export PITHEAD_SERVER={plant.api_url} PITHEAD_TOKEN={plant.token}",
            "pithead devices list",
            "pithead rollouts list",
            f"pithead-agent status --root {fleet.devices[0].root}",
        ],
    )
    signal.pause()


def _directory(data_dir: Path | None) -> Path:
    if data_dir is None:
        return Path(tempfile.mkdtemp(prefix="pithead-demo-"))
    if data_dir.exists() and any(data_dir.iterdir()):
        raise typer.BadParameter(f"{data_dir} is not empty", param_hint="--data-dir")
    data_dir.mkdir(parents=True, exist_ok=True)
    return data_dir.resolve()


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
