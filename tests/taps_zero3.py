"""Gradients of tapped values under ZeRO-3 with activation checkpointing, against a plain model: `taps_zero3.py FAMILY`

Parameters are let go of at once, as those of a big model are: without `taps.Keep` DeepSpeed then crashes in backward.
"""

from __future__ import annotations

import json
import sys

import tiny
import torch

from distill import taps, world
from distill.engine import _deepspeed

CONFIG = {
    "train_batch_size": 3,
    "optimizer": {"type": "AdamW", "params": {"lr": 0.0, "torch_adam": True}},
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 0.0,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    },
}


class Lesson(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        tapped = taps.trace(self.model, batch, [taps.Tap("value", layer) for layer in (1, -1)]).taps
        return sum(value.square().mean() for value in tapped.values())


def gap(family: str, deepspeed) -> float:
    """How far the gradient is from the plain model's, relative to its norm."""
    sharded, plain = (Lesson(tiny.model(family).train().to(world.device())) for _ in range(2))
    sharded.model.activation_checkpointing_enable()
    engine, *_ = deepspeed.initialize(model=sharded, model_parameters=list(sharded.parameters()), config=CONFIG)
    batch = {name: t.to(world.device()) for name, t in tiny.batch([[11], [7], [1]], 11).items()}
    for module, backward in ((engine, engine.backward), (plain, torch.Tensor.backward)):
        torch.manual_seed(0)  # the same dropout
        backward(module(batch))
    pairs = [
        (deepspeed.utils.safe_get_full_grad(p), q.grad)
        for p, q in zip(sharded.parameters(), plain.parameters(), strict=True)
        if q.grad is not None
    ]
    difference = torch.cat([(a - b).flatten() for a, b in pairs]).norm()
    return float(difference / torch.cat([b.flatten() for _, b in pairs]).norm())


if __name__ == "__main__":
    world.start()
    deepspeed = _deepspeed()
    print(json.dumps({family: gap(family, deepspeed) for family in sys.argv[1:]}))
