"""Draw the state machines from their own tables, so that the pictures cannot lie."""

import itertools
from collections.abc import Mapping, Sequence
from enum import Enum

Table = Mapping[tuple[Enum, Enum], Enum]


def mermaid(transitions: Table, start: Enum, line: Sequence[Enum] = ()) -> str:
    """Return a Mermaid state diagram of ``transitions``; events that change nothing are left out.

    ``line`` is a way on which steps may be skipped: it is drawn as one box
    with its single steps, and what leads out of all of it (or all but a few,
    which are named) as one arrow.
    """
    place = {state: index for index, state in enumerate(line)}
    lines = ["stateDiagram-v2", f"    [*] --> {start.name}"]
    if line:
        lines += ["    state UNDER_WAY {", f"        [*] --> {line[0].name}"]
        lines += [f"        {a.name} --> {b.name}" for a, b in itertools.pairwise(line)]
        lines.append("    }")
    arrows: dict[tuple[str, str], list[str]] = {}
    out: dict[tuple[Enum, Enum], list[Enum]] = {}
    for (state, event), target in transitions.items():
        if state is target or (state in place and target in place):
            continue
        if state in place:
            out.setdefault((event, target), []).append(state)
        elif target in place:
            _add(arrows, state.name, "UNDER_WAY", event.value if target is line[0] else "reported")
        else:
            _add(arrows, state.name, target.name, event.value)
    for (event, target), states in out.items():
        spared = [state.name for state in line if state not in states]
        words = f"{event.value} (not from {' or '.join(spared)})" if spared else event.value
        _add(arrows, "UNDER_WAY", target.name, words)
    lines += [f"    {state} --> {target}: {', '.join(events)}" for (state, target), events in arrows.items()]
    leaving = {state for state, _ in arrows}
    ends = {target for _, target in arrows} - leaving
    return "\n".join([*lines, *(f"    {state} --> [*]" for state in sorted(ends))]) + "\n"


def _add(arrows: dict[tuple[str, str], list[str]], state: str, target: str, event: str) -> None:
    events = arrows.setdefault((state, target), [])
    if event not in events:
        events.append(event)
