"""How rollouts look on a terminal."""

from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from control_plane.cli.output import moment, print_table

COLOURS: Final = {
    "succeeded": "green",
    "running": "cyan",
    "paused": "yellow",
    "awaiting_approval": "yellow",
    "rolling_back": "red",
    "rolled_back": "red",
    "aborted": "red",
    "advance": "green",
    "hold": "yellow",
    "halt": "red",
    "confirmed": "green",
    "refused": "red",
    "unreached": "yellow",
}


def state(found: dict[str, Any]) -> Text:
    """Return a rollout's state with its colour."""
    return coloured(found["state"])


def coloured(word: str) -> Text:
    """Return a state or a verdict with its colour."""
    return Text(word, style=COLOURS.get(word, ""))


def headline(found: dict[str, Any]) -> Text:
    """Return the rollout in one line."""
    return Text.assemble(
        (f"{found['model']} {found['version']} ", "bold"),
        state(found),
        f" stage {found['stage']} of {found['stages']}  {found['reason']}",
    )


def status(found: dict[str, Any]) -> RenderableType:
    """Return a rollout: stage, soak, devices, the gate's last word, failures."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    states = "  ".join(f"{name} {count}" for name, count in sorted(found["states"].items()))
    arms = "  ".join(f"{name} {count}" for name, count in sorted(found["arms"].items()) if name != "none")
    grid.add_row("rollout", found["id"])
    grid.add_row("devices", Text(states))
    grid.add_row("rollback to", Text(_versions(found["returns_to"])))
    if arms and found["strategy"] == "canary":
        grid.add_row("arms", Text(arms))
    if found["soak_from"] is not None:
        soaked, longest = found["soaked_buckets"], found["max_soak_buckets"]
        bar = ProgressBar(total=longest, completed=min(soaked, longest), width=40)
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, f"{min(soaked, longest)}/{longest} buckets")
        grid.add_row("soak", line)
    verdict = found["verdict"]
    if verdict is not None:
        grid.add_row(verdict["kind"], Text.assemble(coloured(verdict["verdict"]), f"  {verdict['reason']}"))
        grid.add_row("", Text(_numbers(verdict["numbers"]), style="dim"))
    for failure in found["failures"][:10]:
        words = f"{failure['device']} {failure['state']}"
        why_ = " ".join(part for part in (failure["code"], failure["detail"], failure["aftermath"]) if part)
        grid.add_row("failed", Text(f"{words} {why_}", style="red"))
    if len(found["failures"]) > 10:  # noqa: PLR2004 - what fits on a screen
        grid.add_row("", f"and {len(found['failures']) - 10} more: pithead rollouts show --devices")
    return Group(headline(found), grid)


def assignments(found: list[dict[str, Any]]) -> None:
    """Print a rollout's devices."""
    print_table(
        ("DEVICE", "ARM", "STAGE", "STATE", "STRATUM", "BACK TO", "WHY"),
        (
            (
                one["device"],
                one["arm"],
                str(one["stage"] or "-"),
                coloured(one["state"]),
                one["stratum"],
                one["previous_version"] or "none",
                " ".join(part for part in (one["code"], one["detail"], one["aftermath"]) if part),
            )
            for one in found
        ),
        "No devices.",
    )


def verdicts(found: list[dict[str, Any]]) -> None:
    """Print decisions."""
    print_table(
        ("ID", "WHEN", "STAGE", "KIND", "VERDICT", "BUCKET", "WHY", "NUMBERS"),
        (
            (
                str(one["id"]),
                moment(one["t"]),
                str(one["stage"]),
                one["kind"],
                coloured(one["verdict"]),
                str(one["bucket"] or "-"),
                one["reason"],
                _numbers(one["numbers"]),
            )
            for one in found
        ),
        "No decisions yet.",
    )


def plan(console: Console, found: dict[str, Any]) -> None:
    """Print a plan."""
    strata = ", ".join(f"{name}: {count}" for name, count in sorted(found["strata"].items()))
    console.print(
        Text(f"{found['devices']} devices, {found['strategy']}; hold-out {found['hold_out']}", style="bold")
    )
    console.print(Text(f"strata: {strata or '-'}", style="dim"))
    console.print(Text(f"a rollback brings back: {_versions(found['returns_to'])}", style="dim"))
    if found["stages"]:
        print_table(
            ("STAGE", "JOIN", "RUNNING", "CONTROLS", "CAN HALT", "CAN ADVANCE", "FINDS (SD)"),
            (
                (
                    str(one["stage"]),
                    str(one["joining"]),
                    str(one["running"]),
                    str(one["controls"]),
                    "yes" if one["can_halt"] else "no",
                    "yes" if one["can_advance"] else f"no: {one['needs']}",
                    "-" if one["detectable"] is None else f"{one['detectable']:.2f}",
                )
                for one in found["stages"]
            ),
            "",
        )
    for device, rollout in sorted(found["locked"].items()):
        console.print(Text(f"{device} is in the open rollout {rollout}", style="red"))
    for remark in found["remarks"]:
        console.print(Text(remark, style="yellow"))


def why(console: Console, found: dict[str, Any]) -> None:
    """Print the conditions of an update."""
    console.print(Text(f"{found['device']}: {found['state'] or 'not in this rollout'}", style="bold"))
    for reason in found["reasons"]:
        mark, style = ("yes", "green") if reason["holds"] else ("no ", "yellow")
        console.print(Text.assemble((f"  {mark} ", style), f"{reason['condition']}: {reason['detail']}"))
        if reason["remedy"] and not reason["holds"]:
            console.print(Text(f"      {reason['remedy']}", style="dim"))


def _versions(counts: dict[str, int]) -> str:
    return ", ".join(f"{version} ({count} devices)" for version, count in sorted(counts.items())) or "-"


def _numbers(numbers: dict[str, Any]) -> str:
    look = numbers.get("look")
    if not look:
        return ""
    parts = [f"bucket {look['bucket']}"]
    if look["harm_z"] is not None:
        limit = "-" if look["harm_limit"] is None else f"{look['harm_limit']:.2f}"
        parts.append(f"harm z {look['harm_z']:.2f} (limit {limit}, {look['worst']})")
    parts += [
        f"{one['metric']} {one['shift']:+.3g} p {one['margin_p']:.3f}"
        for one in look["metrics"]
        if one["shift"] is not None and one["margin_p"] is not None
    ]
    return "; ".join(parts)
