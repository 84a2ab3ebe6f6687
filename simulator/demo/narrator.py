"""Tells the story on a terminal, or line by line where there is none, and keeps the list of checks."""

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table


@dataclass(frozen=True)
class Check:
    """One claim of the story, and what was seen."""

    chapter: str
    claim: str
    seen: str
    passed: bool


class Bar:
    """Progress of one piece of work."""

    def __init__(self, narrator: "Narrator", text: str, total: int) -> None:
        self._narrator = narrator
        self._text = text
        self._total = total
        self._last = -1
        self._task = narrator.progress.add_task(text, total=total) if narrator.progress else None

    def set(self, done: int, note: str = "") -> None:
        """Show ``done`` of the total, and a note."""
        if self._narrator.progress and self._task is not None:
            text = f"{self._text}  [dim]{note}[/dim]" if note else self._text
            self._narrator.progress.update(self._task, completed=done, description=text)
        elif done != self._last and done == self._total:
            self._narrator.say(f"{self._text}: {done}/{self._total} {note}".rstrip())
        self._last = done


@dataclass
class Narrator:
    """The voice of the demo."""

    console: Console
    headless: bool
    checks: list[Check] = field(default_factory=list)
    progress: Progress | None = None
    _chapter: str = ""
    _started: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(f"  {text}", highlight=False)

    def verdict(self, verdict: Mapping[str, Any]) -> None:
        """Print one decision of a rollout."""
        colour = {"advance": "green", "halt": "red"}.get(verdict["verdict"], "yellow")
        when = f" after {verdict['bucket']} buckets" if verdict["bucket"] is not None else ""
        self.say(
            f"stage {verdict['stage']}: [bold {colour}]{verdict['verdict']}[/] by {verdict['kind']}{when}: "
            f"{verdict['reason']}"
        )

    @contextmanager
    def chapter(self, title: str) -> Iterator[None]:
        """Everything until the end of the block belongs to ``title``."""
        self._chapter = title
        began = time.monotonic()
        self.console.rule(f"[bold]{title}", align="left")
        if self.headless:
            yield
        else:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as progress:
                self.progress = progress
                try:
                    yield
                finally:
                    self.progress = None
        self.console.print(f"  [dim]{time.monotonic() - began:.0f} s[/dim]")

    def bar(self, text: str, total: int) -> Bar:
        """Return a progress bar of ``total`` steps."""
        return Bar(self, text, total)

    def check(self, claim: str, seen: str, *, passed: bool) -> None:
        """Record and print one claim with what was seen."""
        self.checks.append(Check(self._chapter, claim, seen, passed))
        mark = "[green]ok  [/green]" if passed else "[bold red]FAIL[/bold red]"
        self.console.print(f"  {mark} {claim}: {seen}", highlight=False)

    @property
    def passed(self) -> bool:
        """Whether there were claims and all of them held."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    def summary(self, picture: Path | None = None) -> None:
        """Print the table of all claims; save it as an SVG picture where asked."""
        table = Table(title=f"Pithead demo, {time.monotonic() - self._started:.0f} s", title_justify="left")
        table.add_column("chapter", style="bold")
        table.add_column("claim")
        table.add_column("seen")
        table.add_column("")
        last = ""
        for check in self.checks:
            if check.chapter != last and last:
                table.add_section()
            mark = "[green]ok[/green]" if check.passed else "[bold red]FAILED[/bold red]"
            table.add_row(check.chapter if check.chapter != last else "", check.claim, check.seen, mark)
            last = check.chapter
        self.console.print(table)
        if picture is not None:
            recorder = Console(record=True, width=140, file=io.StringIO())
            recorder.print(table)
            picture.write_text(recorder.export_svg(title="pithead demo"), encoding="utf-8")

    def panel(self, title: str, lines: list[str]) -> None:
        """Print a box of lines."""
        self.console.print(Panel("\n".join(lines), title=title, title_align="left"))
