"""Factors taken anew from their own product, again and again while a run goes on. No torch before it is needed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from distill.hook import Hook

if TYPE_CHECKING:
    from torch import nn

    from distill.engine import Engine


class Refactor(Hook):
    """The SVD of every B A takes its place, and the optimizer starts over (Glentis et al. 2025, arXiv 2505.22922).

    The function stays what it is, and so do the values; the learning rate comes back within a few steps.
    """

    every: Annotated[int, Field(gt=0)] = Field(description="steps between two of them")
    recovery: Annotated[int, Field(ge=0)] = Field(10, description="steps in which the learning rate returns, a cosine")

    def due(self, step: int, steps: int) -> bool:
        """After so many of all steps; behind the last one it would only lose what is left of its accuracy."""
        return step % self.every == 0 and step < steps

    def last(self, step: int) -> int:
        """The number of steps after which the optimizer that makes the next one was new."""
        return step // self.every * self.every

    def warmth(self, step: int) -> float:
        """What the learning rate of a step (from 0) is multiplied by."""
        done = step - self.last(step) + 1
        if step < self.every or done >= self.recovery:
            return 1.0
        return (1 - math.cos(math.pi * done / self.recovery)) / 2


def last(hooks: Iterable, step: int) -> int:
    """After how many of these steps the optimizer was last made new."""
    return max((hook.last(step) for hook in hooks if isinstance(hook, Refactor)), default=0)


def warmth(hooks: Iterable, step: int) -> float:
    """What hooks multiply the learning rate of a step by."""
    return math.prod(hook.warmth(step) for hook in hooks if isinstance(hook, Refactor))


def after(hooks: Iterable, engine: Engine, module: nn.Module, step: int, steps: int) -> None:
    """What hooks do after so many of all steps."""
    if any(isinstance(hook, Refactor) and hook.due(step, steps) for hook in hooks):
        refactor(engine, module)


def refactor(engine: Engine, module: nn.Module) -> None:
    """Balance the factors of all layers of the module that the engine has, and forget all moments. Collective."""
    new = dict(_balanced(engine, module))
    engine.load_state(lambda name, key: new.get(name) if key == "master" else None, lambda phases: 0)


def _balanced(engine: Engine, module: nn.Module):
    """(name, new master) of every B and A; rank 0 decides, since an SVD has signs to choose."""
    import torch

    from distill import world
    from distill.lowrank.module import SparseLowRank
    from growth.factored import balanced

    layers = [name for name, layer in module.named_modules() if isinstance(layer, SparseLowRank)]
    trained = {f"{layer}.{key}" for layer in layers for key in "BA"} & set(engine.names)
    held = {name: master.cpu().clone() for name, master in engine.masters(trained)}
    for layer in layers:
        names = f"{layer}.B", f"{layer}.A"
        if trained.issuperset(names):
            found = balanced(*(held[name] for name in names))
            for name, tensor in zip(names, found, strict=True):
                yield name, world.total(tensor if world.rank() == 0 else torch.zeros_like(tensor))
