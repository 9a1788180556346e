"""How many numbers a student with factors trains, and what building its matrices costs; from a config alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from distill import loading, models, taps
from distill.lowrank import students
from distill.lowrank.spec import LowRankSpec
from distill.models import Facts


def facts(config: Any, spec: LowRankSpec | None) -> Facts:
    """The facts of a student whose matrices are factors while it trains; `config` as in `models.facts`.

    A token is multiplied with the factors where they are alone, and with the whole matrix where values stand beside.
    """
    if spec is None:
        return models.facts(config)
    whole, base = models.facts(config), _base(config)
    layers = students.layers(base, spec.scope)
    sizes = {layer: students.size(name, layer, spec) for name, layer in layers.items()}
    saved = {layer: layer.weight.numel() - sizes[layer].numbers for layer in layers.values()}
    spared = {} if spec.density else saved
    per_block = [sum(spared.get(module, 0) for module in block.modules()) for block in taps.blocks(base)]
    return replace(
        whole,
        parameters=whole.parameters - sum(saved.values()),
        blocks=tuple(n - less for n, less in zip(whole.blocks, per_block, strict=True)),
        body=whole.body - sum(per_block),
        rebuilt=sum(map(_rebuilding, sizes.values())),
    )


def _base(config: Any) -> nn.Module:
    read = loading.configuration(config) if isinstance(config, dict | Path) else config
    return loading.skeleton(loading.class_of(read, None), read, {})


def _rebuilding(size: students.Size) -> int:
    """FLOPs of a forward and a backward pass that no token asks for: W twice, and from its gradient those of B and A,
    each one product of out x rank x in."""
    return 4 * 2 * size.out * size.rank * size.into if size.values else 0
