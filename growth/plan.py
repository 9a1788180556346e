"""When and how much to grow: the published laws of G_stack, what a growth costs and saves, in honest words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from growth.errors import UsageError

FACTOR = 4  # the paper's growth factor, for every size (Du et al. 2024, arXiv 2405.15319)
SPEED_UP = 0.546  # its figure for 7B: from scratch needs 54.6 % more compute to the same loss
TRAINING_BYTES = 16  # a parameter under mixed-precision AdamW: weight and gradient in bf16, master and moments in fp32


@dataclass(frozen=True)
class Plan:
    """A model of `parameters / factor` trained on `small_tokens`, stacked, and the big one trained further."""

    parameters: float
    tokens: float  # that the big model would see from scratch
    factor: int

    @property
    def flops(self) -> float:
        """Of training from scratch: 6 N D."""
        return 6 * self.parameters * self.tokens

    @property
    def small_tokens(self) -> float:
        """When to grow: log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74; with C = 6 N D its four rows follow."""
        return 10 ** (0.88 * math.log10(self.parameters) + 163.27 / math.log10(self.flops) - 5.74)

    @property
    def small_share(self) -> float:
        """What the small model costs, as a share of training from scratch."""
        return self.small_tokens / self.factor / self.tokens

    @property
    def training_bytes(self) -> float:
        """Weights, gradient and optimizer of the big model, over all ranks; activations come on top."""
        return TRAINING_BYTES * self.parameters


def plan(parameters: float, tokens: float, factor: int = FACTOR) -> Plan:
    """The plan for a model of so many parameters that would see so many tokens from scratch."""
    if not (parameters >= 1e5 and tokens >= 1e6 and factor >= 2 and math.isfinite(parameters * tokens)):
        raise UsageError("a plan needs at least 1e5 parameters, 1e6 tokens and a factor of 2")
    made = Plan(parameters, tokens, factor)
    if made.small_share >= 1:
        raise UsageError(
            f"{tokens:g} tokens are too few to grow: the law wants {made.small_tokens:.3g} for the small model"
        )
    return made


def saved(speed_up: float) -> float:
    """A speed-up of 54.6 % saves 35 %: the one is a ratio minus one, the other one minus its inverse."""
    return 1 - 1 / (1 + speed_up)
