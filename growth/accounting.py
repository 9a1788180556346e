"""What a model costs in FLOPs, and what a sparse one would if dead weights cost nothing; never seconds. No torch.

SPDF (Thangarasa et al. 2023, arXiv 2303.10464) counts a sequence of T tokens, forward and backward, as
6 T (density * 12 L d^2 + V d) + 12 L T^2 d: matrices of blocks, the head over the vocabulary, and attention between all
pairs of tokens, of which those that a mask hides are counted too. Here the same is read off a family's table. Biases,
norms, routers and smaller heads are left out. Training (`distill.cost`) counts by the same formula.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import Any

from growth import families
from growth.anatomy import LANGUAGE
from growth.bits import Mask
from growth.errors import UserError
from growth.families.table import Family, Slot
from growth.fill import FOLLOWERS
from growth.scope import AXES, matrices


@dataclass(frozen=True)
class Flops:
    """Of one sequence, or of many, by what multiplies."""

    linear: float
    attention: float
    vocabulary: float

    @property
    def total(self) -> float:
        return self.linear + self.attention + self.vocabulary


@dataclass(frozen=True)
class Work:
    """What a token is multiplied with."""

    weights: float  # in matrices of blocks; of a layer's experts, as many as a token is sent to
    width: int  # of attention, over all layers
    vocabulary: int  # weights of the head over the vocabulary

    def forward(self, length: int, density: float = 1) -> Flops:
        """Modelled, of one sequence: two for each weight and token, and four for each channel and pair of tokens."""
        return Flops(2 * length * self.weights * density, 4 * length**2 * self.width, 2 * length * self.vocabulary)

    def flops(self, length: int, density: float = 1) -> Flops:
        """The same with the backward pass, which costs twice as much."""
        return Flops(*(3 * part for part in astuple(self.forward(length, density))))


def work_of(config: Mapping[str, Any]) -> Work:
    """Of the model of a config.json."""
    family = families.of(config)
    slots = matrices(family, config, AXES)
    reading = [slot for slot in slots.values() if "head" in slot.row.spec.read]  # one in every attention
    return Work(
        weights=float(sum(_used(family, config, slot) * _size(slot) for slot in slots.values())),
        width=sum(slot.shape[slot.row.spec.consumed] for slot in reading),
        vocabulary=_vocabulary(family, config),
    )


def density(config: Mapping[str, Any], masks: Mapping[str, Mask], prefix: str = "") -> float:
    """The share of `weights` that masks leave, by the names of a checkpoint."""
    family = families.of(config)
    slots = matrices(family, config, AXES, prefix)
    used = {name: _used(family, config, slot) for name, slot in slots.items()}
    alive = sum(used[name] * (masks[name].kept if name in masks else _size(slot)) for name, slot in slots.items())
    return float(alive / sum(used[name] * _size(slot) for name, slot in slots.items()))


def _size(slot: Slot) -> int:
    return math.prod(slot.shape)


def _used(family: Family, config: Mapping[str, Any], slot: Slot) -> Fraction:
    """How much of a matrix a token meets on average."""
    if "experts" not in dict(slot.at):
        return Fraction(1)
    return Fraction(family.view(config).num_experts_per_tok, family.sizes_of(config)["experts"])


def _vocabulary(family: Family, config: Mapping[str, Any]) -> int:
    if not any(word in name for name in config.get("architectures") or [] for word in LANGUAGE):
        return 0
    heads = [slot for slot in family.slots(config).values() if not slot.row.body and slot.row.spec.read]
    return max((_size(slot) for slot in heads if slot.row.spec.out == ("vocab",)), default=0)


# The small dense model of equal FLOPs


def matched(config: Mapping[str, Any], length: int, density: float) -> dict[str, Any]:
    """The config of a dense model whose sequence costs what the sparse one's does.

    As deep, with heads as large: of all numbers of heads, hidden channels in proportion, the one whose feed-forward
    part keeps its proportion best when its neurons make up the FLOPs, in multiples of 8 where the source's are.
    """
    family, goal = families.of(config), work_of(config).flops(length, density).total
    old = family.sizes_of(config)
    found = [
        (abs(math.log(sizes["ffn"] / sizes["embed"] * old["embed"] / old["ffn"])), -sizes["embed"], new)
        for sizes, new in _candidates(family, config, length, goal)
    ]
    if not found:
        raise UserError(f"no dense {family.name} of this depth is as small as {goal:.3g} FLOPs a sequence")
    return min(found, key=lambda one: one[:2])[2]


def _candidates(family: Family, config: Mapping[str, Any], length: int, goal: float) -> Iterator[tuple[dict, dict]]:
    old = family.sizes_of(config)
    unit = math.gcd(old["ffn"], 8)
    for sizes in _narrower(old):
        one, two = (_cost(family, config, {**sizes, "ffn": n}, length) for n in (1, 2))
        ffn = round((1 + (goal - one) / (two - one)) / unit) * unit
        if ffn > 0:
            yield {**sizes, "ffn": ffn}, _resized(family, config, {**sizes, "ffn": ffn})


def _narrower(old: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Fewer heads, and channels in proportion; groups of heads keep their size, or their number."""
    kv, group = old.get("kv"), old.get("group")
    heads = old["heads"] if kv is None else kv * group
    for n in range(1, heads + 1):
        embed, rest = divmod(old["embed"] * n, heads)
        if rest:
            continue
        if kv is None:
            yield {"embed": embed, "heads": n}
        elif n % group == 0:
            yield {"embed": embed, "kv": n // group, "group": group}
        elif n % kv == 0:
            yield {"embed": embed, "kv": kv, "group": n // kv}


def _cost(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int], length: int) -> float:
    return work_of(_resized(family, config, sizes)).flops(length).total


def _resized(family: Family, config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    followers = {axis: sizes["embed"] for axis in FOLLOWERS if family.sizes_of(config).get(axis)}
    return family.resized(config, {**sizes, **followers})
