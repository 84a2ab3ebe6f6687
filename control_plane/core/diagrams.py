"""Draw the state machines from their own tables, so that the pictures cannot lie."""

from collections.abc import Mapping
from enum import Enum


def mermaid(transitions: Mapping[tuple[Enum, Enum], Enum], start: Enum) -> str:
    """Return a Mermaid state diagram of ``transitions``; events that change nothing are left out."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), target in transitions.items():
        if state is not target:
            arrows.setdefault((state.name, target.name), []).append(event.value)
    ends = {target for _, target in arrows} - {state for state, _ in arrows}
    lines = ["stateDiagram-v2", f"    [*] --> {start.name}"]
    lines += [f"    {state} --> {target}: {', '.join(events)}" for (state, target), events in arrows.items()]
    lines += [f"    {state} --> [*]" for state in sorted(ends)]
    return "\n".join(lines) + "\n"
