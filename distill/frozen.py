"""A model that teaches: as it is, in the precision of the run, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from distill import classifiers, models, world


def frozen(reference: str, head: str | None, context, classes: Sequence[str] | None = None) -> nn.Module:
    """A model or stage on this rank's device, with its head if an objective asks for its logits.

    A head that classifies has these classes, in this order.
    """
    known = context.recipe.models.get(reference)
    asked = known and known.dtype
    path, dtype = context.model(reference), getattr(torch, asked) if asked else precision(context.recipe.engine)
    model = classifiers.load(path, classes, dtype) if head == "classify" else models.load(path, head, dtype)
    return models.freeze(model).to(world.device())


def precision(engine) -> torch.dtype:
    """That of forward passes."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[engine.precision]
