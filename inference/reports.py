"""What a probe is asked and what it answers. Light, for both of its sides."""

from msgspec import Struct

from contract.manifest import Pipeline, Score, Variant
from inference.accelerators import NO_LIMITS, Accelerator, Resources


class Limits(Struct, frozen=True):
    """What a probe of one variant on one accelerator may cost before it is killed."""

    wall_s: float = 30.0
    cpu_s: int = 20
    memory_mb: int = 1024
    """Address space on top of what the runtime itself takes."""
    measure_s: float = 0.05
    """How long latencies are measured: 3 to 10 rounds of 10 to 100 runs, and two seconds at most."""
    enough_us: float | None = None
    """A model whose first round is slower than this is known well enough."""


DEFAULT_LIMITS = Limits()


class SandboxReport(Struct, frozen=True, omit_defaults=True):
    """Which layers hold."""

    no_new_privs: bool
    rlimits: bool
    landlock_abi: int
    """0 where the kernel has no Landlock."""
    seccomp: bool
    opened: tuple[str, ...] = ()
    """Devices and folders that were left open to a driver; so were the system calls to use them."""

    @property
    def level(self) -> str:
        """``full``, ``partial`` (Landlock or seccomp is missing or loosened), ``limits``, or ``none``."""
        layers = (self.landlock_abi > 0) + self.seccomp
        if self.opened:
            layers = min(layers, 1)
        return ("limits", "partial", "full")[layers] if self.no_new_privs and self.rlimits else "none"


class Placement(Struct, frozen=True, omit_defaults=True):
    """Which nodes of a model run where."""

    nodes: dict[str, dict[str, int]] = {}
    """By accelerator (``cpu`` for the runtime's own kernels): operator -> how many."""

    def nodes_on(self, accelerator: str) -> int:
        """Return how many nodes run there."""
        return sum(self.nodes.get(accelerator, {}).values())

    @property
    def total(self) -> int:
        """How many nodes there are."""
        return sum(map(self.nodes_on, self.nodes))


class ProbeRequest(Struct, frozen=True):
    """What the parent asks of the child: of a variant of a package, or of a bare file."""

    name: str
    format: str
    accelerator: Accelerator
    model: str
    limits: Limits
    parent: int
    resources: Resources = NO_LIMITS
    require_sandbox: bool = False
    variant: Variant | None = None
    """None for a bare file: it is compared with the runtime's own kernels on made-up inputs."""
    golden: str = ""
    pipeline: Pipeline | None = None
    """With ``score``: what a lane feeds the model with, and makes of its output."""
    score: Score | None = None
    graph: str = ""
    """Where the graph of the pipeline's features lies, if it has one, and its golden vectors."""
    graph_golden: str = ""


class ProbeReport(Struct, frozen=True, omit_defaults=True):
    """What was seen of one variant on one accelerator; ``code`` is None when it passed."""

    variant: str
    accelerator: str
    code: str | None = None
    detail: str = ""
    accelerator_used: str | None = None
    runtime: str = ""
    placement: Placement = Placement()
    vectors: int = 0
    """Golden vectors that agreed."""
    worst: dict[str, float] = {}
    """By output: the largest difference from the golden vectors."""
    load_ms: float = 0.0
    latency_p50_us: float = 0.0
    latency_p99_us: float = 0.0
    runs: int = 0
    """That were measured."""
    memory_mb: float = 0.0
    """RSS at its peak less RSS before the model was opened."""
    peak_rss_mb: float = 0.0
    energy_uj: float | None = None
    """Of one run, by the host's counter, whatever else ran meanwhile included; None where there is none."""
    cpu_s: float = 0.0
    sandbox: SandboxReport | None = None

    @property
    def passed(self) -> bool:
        """Whether the model may be loaded by the engine."""
        return self.code is None


class Choice(Struct, frozen=True, omit_defaults=True):
    """The variant and accelerator that a device shall use."""

    variant: str
    accelerator: str
    report: ProbeReport
    why: str = ""
    """For people."""
