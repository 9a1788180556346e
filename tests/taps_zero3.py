"""Gradients under ZeRO-3 with activation checkpointing, against a plain model: `taps_zero3.py FAMILY|FAMILY.HEAD ...`

Of tapped values, or with a head (bert.mlm, qwen2.causal) of losses on its own weights, tied or not. Checkpointing is
ours; with `!` before the name it is that of transformers.
Parameters are let go of at once, as those of a big model are: without `taps.Keep` DeepSpeed then crashes in backward.
"""

from __future__ import annotations

import json
import sys

import tiny
import torch

from distill import taps, world
from distill.engine import _deepspeed
from distill.forwards import recomputed
from distill.objectives import cross_entropy, divergence

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
        self.model, self.checkpointing = model, False

    def forward(self, batch):
        with recomputed(block for block, _ in (taps.layers(self.model.base_model) if self.checkpointing else ())):
            return self.loss(batch)

    def loss(self, batch):
        tapped = taps.trace(self.model, batch, [taps.Tap("value", layer) for layer in (1, -1)]).taps
        return sum(value.square().mean() for value in tapped.values())


class Head(Lesson):
    def loss(self, batch):
        rows = torch.tensor([0, 1, 5, 12, 13], device=world.device())
        head = taps.trace(self.model, batch, [], rows).head
        teacher = torch.randn(5, tiny.VOCAB, generator=torch.Generator().manual_seed(3)).to(world.device())
        return divergence(head, teacher, "jsd") + cross_entropy(head, rows)


def lesson(name: str) -> Lesson:
    family, _, head = name.partition(".")
    model = tiny.model(family, head or None, tie_word_embeddings=family != "qwen2").train().to(world.device())
    return (Head if head else Lesson)(model)


def gap(name: str, deepspeed) -> float:
    """How far the gradient is from the plain model's, relative to its norm."""
    sharded, plain = lesson(name.strip("!")), lesson(name.strip("!"))
    sharded.checkpointing = not name.startswith("!")
    if not sharded.checkpointing:
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
    print(json.dumps({name: gap(name, deepspeed) for name in sys.argv[1:]}))
