"""What detectors find in labelled recordings, through the lane of the engine, beside published figures.

Packages are made by the project's own tools and run as int8 on LiteRT and on
ONNX Runtime, with their float form beside them. Every figure is one of rows
that made nothing of the model; docs/accuracy.md tells how to read them. Data
are looked for in ``$PITHEAD_SHARED_DATA``; what is absent is left out, and
said. The exit code is 1 where a figure that is asked for is missed.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from benchmarks.accuracy import fan, hydraulic, inverters, nab, recorded, shuttle
from benchmarks.accuracy.common import Absent, Result
from contract.errors import PitheadError

DATA_SETS: Final[Mapping[str, Callable[[Path], Iterator[Result]]]] = {
    m.NAME: m.results for m in (shuttle, fan, recorded, hydraulic, inverters, nab)
}
LAYOUT: Final = "{:<26} {:<44} {:<15} {:<30} {:>10} {:>10} {:>8} {:>7} {}"


def line_of(result: Result) -> str:
    """Return one line of the table."""
    theirs = result.published
    return LAYOUT.format(
        result.data,
        result.model,
        result.variant,
        result.metric,
        f"{result.ours:.4f}",
        "" if theirs is None else f"{theirs.value:.4f}",
        "" if theirs is None else f"{result.ours - theirs.value:+.4f}",
        "" if result.target is None else f"{result.target:g}",
        result.verdict,
    ).rstrip()


def collected(names: list[str], *, quiet: bool) -> tuple[list[Result], dict[str, str]]:
    """Return the lines, and why a data set has none."""
    found: list[Result] = []
    skipped: dict[str, str] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                for result in DATA_SETS[name](Path(scratch)):
                    found.append(result)
                    if not quiet:
                        print(line_of(result), flush=True)
            except Absent as reason:
                skipped[name] = str(reason)
            except PitheadError as error:
                if error.code != "source.failed":
                    raise
                skipped[name] = error.detail
    return found, skipped


def notes(results: list[Result]) -> Iterator[str]:
    """Yield how rows were divided and where published figures come from, each once."""
    seen: set[tuple[str, str]] = set()
    for result in results:
        source = "" if result.published is None else result.published.source
        for kind, text in (("split", result.split), ("published", source)):
            if text and (result.data, text) not in seen:
                seen.add((result.data, text))
                yield f"{result.data}: {kind}: {text}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", choices=[*DATA_SETS, []], help="Only these data sets.")
    parser.add_argument("--json", action="store_true", help="Print one JSON line and nothing else.")
    given = parser.parse_args()
    if not given.json:
        print(LAYOUT.format("data", "model", "variant", "metric", "ours", "published", "diff.", "target", ""))
    results, skipped = collected(given.data or list(DATA_SETS), quiet=given.json)
    missed = [r for r in results if r.verdict == "missed"]
    if not given.json:
        print()
        for note in notes(results):
            print(note)
        for name, reason in skipped.items():
            print(f"skipped {name}: {reason}")
        for result in missed:
            print(f"MISSED: {line_of(result)}")
    facts = {"results": [r.facts() for r in results], "skipped": skipped, "missed": len(missed)}
    print(json.dumps({"bench": "accuracy", **facts}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
