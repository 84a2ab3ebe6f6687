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

While a rollout is open its canaries are watched: between stages, in a pause, and after the longest soak
in late watches of one, two, four ... times its length. A quarter of `alpha` is reserved for those, half
of what is left for each; when a person is away so long that nothing is left, the guardrails still halt.

A stage without canaries passes only where canaries of this rollout serve the version. A last stage below
100 % leaves the other devices, the hold-out among them, at the version that they have; one of 100 %
gives the version to the hold-out when the rollout closes.

With `on_halt = "pause"` a person decides on a halt. Approving acknowledges what was shown, by those
devices or in that comparison, and the stage goes on; anything else halts again. `skip` needs canaries
of the stage that serve the version. With `approval = true` neither comes from the rollout's author.

A rollback holds only the devices that have not come back. `abort` ends it without them; their order to
go back stands. `show --devices` names the version to which each device goes back.

Several rollouts on one device, each of another model, share its reporting: the shortest intervals and
the longest trial of those under way. After the last one the device goes on as it does.

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
