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
from inference.accelerators import ONNX, TFLITE, Accelerator

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

Where a model has a lane on a device, its latency and alarms are judged by the lane's windows, and what
applications ask of it counts for errors only; where it is only served, the requests are what is judged.

A machine that stands (`[lanes.machine]`, docs/lanes.md) mutes its lane. Buckets in which nothing was scored
for that reason are no evidence: neither good nor bad, and no silence either; a device that says nothing at
all is silent, standing machine or not. What a rest takes from the soak must be made up for: a stage grows
when `min_coverage` of the canaries, and of the controls, have run for the shortest soak, and some of each
run now. Until then the gate holds and says whose machines stood, and past the longest soak a person is asked.

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


ACCELERATORS_HEAD = """\
# Runtimes and accelerators

A model runs in ONNX Runtime or in LiteRT (tflite-runtime where there is no LiteRT), on what its manifest
names and the device has. What that costs is measured on the device itself, not looked up.

```
pithead-agent probe packages/shuttle/1.0.0
pithead-agent probe detector.tflite --json
```

shows each variant on each accelerator: the nodes that it took, p50 and p99 of a run, memory, energy,
whether the golden vectors agreed, and the choice with its reason.

## How the choice is made

1. Candidates are tried in the order of expectation: the manifest's `preference`, then the accelerators
   in the variant's own order. Each is opened in a process of its own, confined, with bounded time.
2. A candidate is out when its driver is missing (`inference.accelerator_missing`), when it took no node
   (a silent fall-back to the CPU is not a use of the accelerator), when a golden vector is off by more
   than its tolerance, or when p99 or memory is above the manifest's `budget` or the device's `memory_mb`.
3. Of what is left the cheapest is taken: by energy where the host counts it for all of them (RAPL), else
   by p50. A later candidate must be a fifth cheaper than an earlier one.
4. The search ends at the first candidate whose run takes 50 us or less, since what surrounds a run costs
   more, and 30 s after the first one passed. Only when a device goes on searching does it download
   further variants; `[probe] compare = "first"` never does.
5. The choice is made anew when the agent starts under another kernel, system, runtime, driver library
   (its size and time of change), kernel module or setting than those of the choice. What serves goes on
   serving meanwhile.

Energy is that of the whole processor package, with whatever else ran; `unavailable` where the kernel
shows no counter (virtual machines, most boards, or an agent that is not root). Nodes are those of the
graph that the runtime divided, before its last optimisations. A bare file has no golden vectors: it is
compared with the runtime's own kernels on made-up inputs, and the largest difference is shown.

## A device's own

```toml
[engine]
threads = 2                # of one run
cpus = [2, 3]              # the engine's processors, and the probe's
memory_mb = 200            # no variant that takes more; ONNX Runtime's arena ends there

[accelerators.my-npu]      # any external delegate, by path and options
format = "tflite"
library = "/usr/lib/libmy_npu_delegate.so"
options = { cores = 2 }
devices = ["/dev/my-npu0"] # what its driver opens

[accelerators.openvino]    # other options for one of the table below
format = "onnx"
options = { device_type = "GPU" }
devices = ["/dev/dri/renderD128"]
```

A variant names `my-npu` among its accelerators. For ONNX Runtime, `provider` names the execution
provider, and `library` one that is not built in. A manifest's `accelerator_options` may set the options
in the column *manifest may set*, no others: an option can be a path to code.

Where a driver opens devices, or reads its runtime's files with each model, the probe's sandbox leaves
those open and says so; its level is then `partial`, which `[probe] require = "full"` refuses.
"""


def accelerators_markdown() -> str:
    """Return ``docs/accelerators.md`` as it should be: how the choice is made, and the tables."""
    parts = [ACCELERATORS_HEAD]
    for title, table in (("ONNX Runtime", ONNX), ("LiteRT and tflite-runtime", TFLITE)):
        parts += [
            f"## {title}",
            "",
            "| name | what | by | default options | manifest may set | needs one of | in |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        parts += [_accelerator_row(a) for a in table]
        parts.append("")
    return "\n".join(parts)


def _accelerator_row(a: Accelerator) -> str:
    options = ", ".join(f"`{k}={v}`" for k, v in a.options.items())
    where = ", ".join(f"`{p}`" for p in a.packages) or {"darwin": "macOS", "win32": "Windows"}.get(
        a.system, ""
    )
    where = "Android" if a.system == "android" else where
    hints, needs = (", ".join(f"`{v}`" for v in values) for values in (a.hints, a.needs))
    by = f"`{a.library or a.provider}`" if a.library or a.provider else ""
    return f"| `{a.name}` | {a.what} | {by} | {options} | {hints} | {needs} | {where} |"


def _shown(policy: Policy) -> dict[str, Any]:
    """Return all keys of ``policy``, those with default values too."""
    return {name: msgspec.to_builtins(getattr(policy, name)) for name in Policy.__struct_fields__} | {
        "guardrails": {name: getattr(policy.guardrails, name) for name in Guardrails.__struct_fields__}
    }


GENERATED = {
    "accelerators.md": accelerators_markdown,
    "rollouts.md": rollouts_markdown,
    "asyncapi.yaml": asyncapi_yaml,
    "errors.md": errors_markdown,
}


def main() -> None:
    """Write all of them."""
    for name, make in GENERATED.items():
        (DOCS / name).write_text(make())


if __name__ == "__main__":
    main()
