"""How masks change after a step: fewer weights live, or as many in other places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from distill.schedules import Progress
from distill.sparsity.choosing import WHOLE, Groups, Stream, largest, rewired
from distill.sparsity.values import Sparsify
from growth.noise import generator

Bools = Mapping[str, Tensor]  # True where a weight is dead
Heard = Callable[[], Mapping[str, Tensor]]  # gradients of all weights, of all ranks together; to be asked for once


class Rule(Protocol):
    def listens(self, progress: Progress) -> bool:
        """Whether the gradients of dead weights are wanted of the step that begins here."""

    def due(self, progress: Progress) -> bool:
        """Whether masks change once so many steps are done."""

    def changed(self, progress: Progress, weights: Stream, dead: Bools, heard: Heard) -> dict[str, Tensor]:
        """The masks from there on."""


class Static(Rule):
    """Masks stay."""

    def listens(self, progress: Progress) -> bool:
        return False

    def due(self, progress: Progress) -> bool:
        return False


@dataclass(frozen=True)
class Prune(Static):
    """Of all weights with a mask together, the largest stay."""

    spec: Sparsify

    def due(self, progress: Progress) -> bool:
        return self.spec.falls(progress) is not None

    def changed(self, progress: Progress, weights: Stream, dead: Bools, heard: Heard) -> dict[str, Tensor]:
        total = sum(mask.numel() for mask in dead.values())
        return largest(weights, dead, max(round(self.spec.falls(progress) * total), 1))


@dataclass(frozen=True)
class Rewire(Static):
    """Of each matrix the smallest weights die, and as many come to life: drawn, or where gradients are largest."""

    spec: Sparsify
    seed: int
    groups: Mapping[str, Groups]  # of matrices with a pattern

    def listens(self, progress: Progress) -> bool:
        return self.spec.how == "rigl" and self.due(replace(progress, step=progress.step + 1))

    def due(self, progress: Progress) -> bool:
        return self.spec.moves(progress) > 0

    def changed(self, progress: Progress, weights: Stream, dead: Bools, heard: Heard) -> dict[str, Tensor]:
        share, gradients = self.spec.moves(progress), heard() if self.spec.how == "rigl" else {}
        masks = {}
        for name, weight in weights():
            scores = gradients[name].abs() if gradients else self._drawn(name, progress.step, weight)
            masks[name] = rewired(weight, dead[name], scores, share, self.groups.get(name, WHOLE))
        return masks

    def _drawn(self, name: str, step: int, weight: Tensor) -> Tensor:
        """A function of (seed, step, name), the same on every rank and after a resume."""
        drawn = torch.rand(weight.shape, generator=generator(f"{name} after step {step}", self.seed))
        return drawn.to(weight.device)
