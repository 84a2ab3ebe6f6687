"""All the other ways in which the canaries could have been chosen.

The labels are permuted within strata, since that is how they were given. Few
possible choices are all written down; of many a sample is drawn, always the
same for the same seed.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from control_plane.core.gate.evidence import Booleans, Integers

Choices = NDArray[np.float32]

MAX_CELLS: Final = 8_000_000
"""Choices x devices held at once, so that a large fleet needs no large memory."""


class Allocations:
    """The choices of canaries, the real one first."""

    def __init__(self, treated: Booleans, strata: Integers, *, seed: str, limit: int) -> None:
        self.treated = treated
        self.members = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
        self.possible = possible([(int(treated[m].sum()), len(m)) for m in self.members])
        self.exact = self.possible <= limit
        self.count = self.possible if self.exact else limit + 1
        self._seed = seed

    def chunks(self) -> Iterator[Choices]:
        """Yield rows of 0 and 1, one row for each choice; the first row is the real one."""
        if self.exact:
            yield self._all()
            return
        generator = np.random.Generator(np.random.PCG64(_number(self._seed)))
        yield self.treated[None, :].astype(np.float32)
        rows = max(1, MAX_CELLS // len(self.treated))
        for start in range(1, self.count, rows):
            yield self._draw(generator, min(rows, self.count - start))

    def _all(self) -> Choices:
        real = self.treated.astype(np.float32)
        table = np.zeros((1, len(real)), np.float32)
        for members in self.members:
            wanted = int(self.treated[members].sum())
            parts = np.zeros((math.comb(len(members), wanted), len(real)), np.float32)
            for row, chosen in enumerate(itertools.combinations(members, wanted)):
                parts[row, list(chosen)] = 1
            table = (table[:, None, :] + parts[None, :, :]).reshape(-1, len(real))
        first = int(np.flatnonzero((table == real).all(axis=1))[0])
        table[[0, first]] = table[[first, 0]]
        return table

    def _draw(self, generator: np.random.Generator, rows: int) -> Choices:
        table = np.zeros((rows, len(self.treated)), np.float32)
        for members in self.members:
            wanted = int(self.treated[members].sum())
            if wanted == len(members):
                table[:, members] = 1
            elif wanted:
                keys = generator.random((rows, len(members)))
                chosen = np.argpartition(keys, wanted - 1, axis=1)[:, :wanted]
                table[np.arange(rows)[:, None], members[chosen]] = 1
        return table


def possible(sizes: list[tuple[int, int]]) -> int:
    """Return how many choices there are, given (canaries, devices) of every stratum."""
    return math.prod(math.comb(devices, canaries) for canaries, devices in sizes)


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "big")
