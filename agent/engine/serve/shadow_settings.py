"""What a shadow version may cost, and what is told from its answers."""

from typing import Annotated

from msgspec import Meta, Struct

from agent.engine.serve.compare import Tolerance
from agent.engine.serve.split import Version


class Shadow(Struct, frozen=True, forbid_unknown_fields=True):
    """``[models.<name>.shadow]``."""

    version: Version
    """Also asked; its answer is never given out."""
    sample: Annotated[float, Meta(ge=0, le=1)] = 0.1
    """Share of the requests without a version."""
    cpu: Annotated[float, Meta(gt=0, le=64)] = 0.05
    """Of one core, on average."""
    tolerance: Tolerance = Tolerance()
    classes: str = ""
    """The output whose largest value is the class. Empty: the only output, where there is one."""
