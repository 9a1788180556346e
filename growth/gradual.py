"""Gradual pruning in closed form: dense for a quarter of the compute, ever sparser for a half, sparse for the rest.

Jin et al. 2025, arXiv 2501.12486 (The Journey Matters). What is dense costs more, so shares of compute are no shares of
steps. In between, every prune keeps the same share of what was left; quality follows the average density. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from growth.errors import UsageError

DENSE, PRUNED = 0.25, 0.75  # shares of compute at which pruning begins and ends
EVERY = 100  # steps between two prunes


@dataclass(frozen=True)
class Gradual:
    """A schedule of densities over so many steps, counted from 0; a prune comes before the step that it is due at."""

    sparsity: float  # at the end
    steps: int
    every: int = EVERY
    dense: float = DENSE
    pruned: float = PRUNED

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise UsageError(f"sparsity {self.sparsity}: a share between 0 and 1, which pruning ends at")
        if not 0 <= self.dense < self.pruned < 1:
            raise UsageError(f"pruning from {self.dense} to {self.pruned} of the compute: 0 to below 1, in this order")
        if self.every < 1 or not self.start < self.end < self.steps:
            raise UsageError(
                f"{self.steps} steps leave no time to prune every {self.every}: at most every {self._coarsest} of them"
            )

    @property
    def final(self) -> float:
        """The density that it ends at."""
        return 1 - self.sparsity

    @property
    def mean(self) -> float:
        """The average density, as if time were continuous."""
        between = self.sparsity / math.log(1 / self.final)  # mean of a geometric fall from 1 to the final density
        return 1 / (self.dense + (self.pruned - self.dense) / between + (1 - self.pruned) / self.final)

    @property
    def fractions(self) -> tuple[float, float]:
        """Where pruning begins and ends, as shares of the steps."""
        return self.dense * self.mean, 1 - (1 - self.pruned) * self.mean / self.final

    @cached_property
    def start(self) -> int:
        """The step of the first prune."""
        return self._whole(self.fractions[0])

    @cached_property
    def end(self) -> int:
        """The step of the last one."""
        return self._whole(self.fractions[1])

    @cached_property
    def prunes(self) -> range:
        """The steps that a prune comes before."""
        return range(self.start, self.end + 1, self.every)

    def density(self, step: int) -> float:
        """Of the weights that take part in a step."""
        done = min(max((step - self.start) // self.every + 1, 0), len(self.prunes))
        return self.final ** (done / len(self.prunes))

    def phases(self, until: int) -> Iterator[tuple[int, float]]:
        """(steps, density) of what comes before a step, between one prune and the next."""
        edges = [0, *(step for step in self.prunes if step < until), until]
        yield from ((later - step, self.density(step)) for step, later in pairwise(edges) if later > step)

    @property
    def average(self) -> float:
        """The mean density over all steps, exactly."""
        return average(self.phases(self.steps))

    def share(self, step: int) -> float:
        """Of the compute of linear layers, what is spent before a step."""
        return sum(n * density for n, density in self.phases(step)) / (self.average * self.steps)

    def _whole(self, fraction: float) -> int:
        return round(fraction * self.steps / self.every) * self.every

    @property
    def _coarsest(self) -> int:
        first, last = self.fractions
        return max(int((last - first) * self.steps / 2), 1)


def average(phases: Iterable[tuple[int, float]]) -> float:
    """The mean density of phases of (steps, density)."""
    told = list(phases)
    return math.fsum(steps * density for steps, density in told) / sum(steps for steps, _ in told)
