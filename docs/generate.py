"""Write the parts of the documentation that are made from code. Run by ``make docs``."""

import json
from pathlib import Path
from typing import Any

import msgspec
import yaml

from contract import asyncapi
from contract.errors import ERRORS
from contract.messages import AssignmentState
from control_plane.core import assignment, rollout
from control_plane.core.diagrams import mermaid
from control_plane.core.policy import Guardrails, Policy

DOCS = Path(__file__).parent


def asyncapi_yaml() -> str:
    """Return ``docs/asyncapi.yaml`` as it should be."""
    return yaml.safe_dump(asyncapi.document(), sort_keys=False, allow_unicode=True, width=110)


def errors_markdown() -> str:
    """Return ``docs/errors.md`` as it should be."""
    rows = [
        f"| `{code}` | {spec.summary} | {spec.remedy} | {'yes' if spec.retryable else 'no'} |"
        for code, spec in ERRORS.items()
    ]
    head = [
        "# Error codes",
        "",
        "The same code stands in an HTTP problem document, in a device's receipt and in the log.",
        "",
        "| code | what happened | what to do | tried again by itself |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *rows]) + "\n"


ROLLOUTS_HEAD = """\
# Rollouts

A rollout brings one version of one model to devices, by stages. At each stage canaries activate the
version, and controls, chosen at random from the same strata, restart their own at the same moment.
Guardrails halt at once; the gate halts when harm above the policy's `minimum_harm` is shown, advances
when harm of the `margin` is refuted in every metric, and holds otherwise. A hold past
`max_soak_buckets` waits for a person.

`pithead rollouts plan` says beforehand what the gate can find with so many devices, `why` what keeps
a device from its update, and `replay` runs the same gate on a recorded trace.
"""


def rollouts_markdown() -> str:
    """Return ``docs/rollouts.md`` as it should be: states from their tables, and every policy key."""
    parts = [
        ROLLOUTS_HEAD,
        "## States of a rollout",
        "```mermaid",
        mermaid(rollout.TRANSITIONS, rollout.RolloutState.DRAFT).rstrip(),
        "```",
        "",
        "## States of a device in a rollout",
        "A device may be seen to skip steps, since receipts can be lost; a late one never turns it back.",
        "```mermaid",
        mermaid(assignment.TRANSITIONS, AssignmentState.PLANNED, assignment.PROGRESS).rstrip(),
        "```",
        "",
        "## The default policy",
        "Every key may be left out; an unknown key is refused by name.",
        "```json",
        json.dumps(msgspec.to_builtins(Policy()) | _shown(Policy()), indent=2),
        "```",
        "",
    ]
    return "\n".join(parts)


def _shown(policy: Policy) -> dict[str, Any]:
    """Return all keys of ``policy``, those with default values too."""
    return {name: msgspec.to_builtins(getattr(policy, name)) for name in Policy.__struct_fields__} | {
        "guardrails": {name: getattr(policy.guardrails, name) for name in Guardrails.__struct_fields__}
    }


GENERATED = {"rollouts.md": rollouts_markdown, "asyncapi.yaml": asyncapi_yaml, "errors.md": errors_markdown}


def main() -> None:
    """Write all of them."""
    for name, make in GENERATED.items():
        (DOCS / name).write_text(make())


if __name__ == "__main__":
    main()
