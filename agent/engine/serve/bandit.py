"""Send requests to the version that has earned most, and still try the others. Pure.

``thompson`` draws a mean reward for each version from Beta(1 + sum of rewards,
1 + what was missing to 1) and takes the largest (Thompson 1933; rewards
between 0 and 1 count in part). ``epsilon-greedy`` takes the best mean, and
with probability epsilon any (Sutton and Barto, 2.2). A version without a reward
is tried first by the latter, but not for ever: rewards may come late, or never.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from agent.engine.serve.split import Version

TRIED: Final = 100
"""After so many requests without a reward a version has to wait for one like all others."""


class Bandit(Struct, frozen=True, forbid_unknown_fields=True):
    """``[models.<name>.bandit]``."""

    policy: Literal["thompson", "epsilon-greedy"] = "thompson"
    versions: Annotated[tuple[Version, ...], Meta(max_length=100)] = ()
    """Empty: all that are served."""
    epsilon: Annotated[float, Meta(ge=0, le=1)] = 0.1
    seed: int | None = None
    """For tests: the same requests and rewards give the same choices."""


class Arm(Struct):
    """What is known of a version."""

    requests: Annotated[int, Meta(ge=0)] = 0
    """That were sent to it and answered."""
    rewards: Annotated[int, Meta(ge=0)] = 0
    reward: Annotated[float, Meta(ge=0)] = 0.0
    """Their sum."""

    def earn(self, reward: float) -> None:
        """Count a reward, 0 to 1."""
        self.rewards += 1
        self.reward += reward

    def give_back(self, reward: float) -> None:
        """Take back what was counted and could not be kept."""
        self.rewards -= 1
        self.reward = max(0.0, self.reward - reward) if self.rewards else 0.0

    @property
    def mean(self) -> float:
        """Mean reward; before there is one 1, and 0 when it has been asked often enough for one."""
        if self.rewards:
            return self.reward / self.rewards
        return 1.0 if self.requests < TRIED else 0.0


def pull(given: Bandit, versions: Sequence[str], arms: Mapping[str, Arm], source: random.Random) -> str:
    """Return the version that is asked next, one of ``versions``, which must not be empty."""
    known = {version: arms.get(version) or Arm() for version in versions}
    if given.policy == "thompson":
        drawn = {
            version: source.betavariate(1 + arm.reward, 1 + max(0.0, arm.rewards - arm.reward))
            for version, arm in known.items()
        }
        return max(drawn, key=lambda version: drawn[version])
    if source.random() < given.epsilon:
        return source.choice(list(versions))
    return max(versions, key=lambda version: known[version].mean)
