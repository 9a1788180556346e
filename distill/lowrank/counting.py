"""How many numbers a student with factors trains, and what building its matrices costs; from a config alone."""

from __future__ import annotations

from dataclasses import replace

from distill import loading, taps
from distill.lowrank import students
from distill.lowrank.spec import LowRankSpec
from distill.models import Facts


def counted(facts: Facts, config, spec: LowRankSpec) -> Facts:
    """The facts of a student whose matrices are factors.

    A token is multiplied with the factors where they are alone, and with the whole matrix where values stand beside.
    """
    model = loading.skeleton(loading.class_of(config, None), config, {})
    saved = {layer: _saved(name, layer, spec) for name, layer in students.layers(model, spec.scope).items()}
    per_block = [sum(saved.get(module, 0) for module in block.modules()) for block in taps.blocks(model)]
    spared = [0 if spec.density else n for n in per_block]
    return replace(
        facts,
        parameters=facts.parameters - sum(saved.values()),
        blocks=tuple(n - less for n, less in zip(facts.blocks, spared, strict=True)),
        body=facts.body - sum(spared),
    )


def _saved(name: str, layer, spec: LowRankSpec) -> int:
    (out, into), (rank, n, _) = students.shape(layer), students.size(name, layer, spec)
    return out * into - rank * (out + into) - n


def rebuilding(config, spec: LowRankSpec) -> int:
    """FLOPs of one forward and backward pass that no token asks for: W twice, and from its gradient those of B and A,
    each one product of out x rank x in."""
    if not spec.density:
        return 0
    model = loading.skeleton(loading.class_of(config, None), config, {})
    found = students.layers(model, spec.scope).items()
    shapes = ((*students.shape(layer), students.size(name, layer, spec)[0]) for name, layer in found)
    return sum(4 * 2 * out * rank * into for out, into, rank in shapes)
