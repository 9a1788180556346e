"""Which weights live on: the largest of all tensors, or as many as before in better places.

Everything is decided on full-precision weights, tensor by tensor as the engine streams them, by the same arithmetic on
every rank; ties go by the order of tensors and of the weights in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Bits = Callable[[Tensor], Tensor]
Stream = Callable[[], Iterable[tuple[str, Tensor]]]  # name -> full weight, from the beginning whenever it is called
HALF = 16  # bits of a float32 that one pass over the weights looks at


def largest(weights: Stream, dead: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """Masks of the `keep` largest live weights over all tensors; what is dead stays dead.

    The threshold is exact: bits of a positive float, read as an integer, are in the order of the floats, so that two
    counts of 2^16 bins find it. No sorting, no gathering, no limit on the number of weights.
    """
    live = sum(int((~mask).sum()) for mask in dead.values())
    drop = live - keep
    if drop <= 0:
        return {name: ~mask for name, mask in dead.items()}
    high, below, _ = _bin(weights, dead, drop, lambda bits: bits >> HALF, lambda bits: bits >= 0)
    low, under, tied = _bin(weights, dead, drop - below, lambda bits: bits & 0xFFFF, lambda bits: bits >> HALF == high)
    threshold, spared, masks = (high << HALF) + low, under + tied - (drop - below), {}
    for name, weight in weights():
        bits, lives = _bits(weight), ~dead[name]
        mask = lives & (bits > threshold)
        equal = (lives & (bits == threshold)).flatten().nonzero().flatten()[:spared]  # the first of them live on
        mask.view(-1)[equal] = True
        masks[name], spared = mask, spared - len(equal)
    return masks


def _bin(
    weights: Stream, dead: Mapping[str, Tensor], rank: int, key: Callable, among: Callable
) -> tuple[int, int, int]:
    """Where the weight of this rank is, counted from 0 at the smallest: (bin, weights in bins before it, in it)."""
    counts = torch.zeros(1 << HALF, dtype=torch.int64)
    for name, weight in weights():
        bits = _bits(weight)[~dead[name]]
        counts += torch.bincount(key(bits[among(bits)]), minlength=1 << HALF).cpu()
    upto = counts.cumsum(0)
    found = int(torch.searchsorted(upto, rank, right=True))
    return found, int(upto[found] - counts[found]), int(counts[found])


def _bits(weight: Tensor) -> Tensor:
    """Of |w| in float32, as an integer that grows with it."""
    return weight.detach().float().abs().contiguous().view(torch.int32)


# As many as before, elsewhere


class Groups(NamedTuple):
    """Of so many weights along a dimension; each keeps its number of live ones."""

    dim: int
    size: int

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.movedim(self.dim, -1).reshape(-1, self.size)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.movedim(self.dim, -1).shape).movedim(-1, self.dim).contiguous()


class One(NamedTuple):
    """A tensor as a single group."""

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1)

    def back(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.reshape(like.shape)


WHOLE = One()


def rewired(weight: Tensor, dead: Tensor, scores: Tensor, share: float, groups: Groups | One = WHOLE) -> Tensor:
    """A mask of as many weights: the smallest `share` of the live ones die, those of the highest score come to life.

    One that dies may come to life at once, and then keeps its value (RigL, Evci et al. 2020, arXiv 1911.11134; SET,
    Mocanu et al. 2018, arXiv 1707.04780, with random scores).
    """
    live, sizes = groups.rows(~dead), groups.rows(weight.abs())
    order = sizes.where(live, torch.inf).flatten().argsort(stable=True)
    staying = live.flatten().clone()
    staying[order[: int(share * int(live.sum()))]] = False
    staying = staying.view_as(live)
    wanted = groups.rows(scores).nan_to_num(-1.0, -1.0, -1.0).where(~staying, -torch.inf)
    best = wanted.argsort(dim=1, descending=True, stable=True)
    missing = live.sum(1, keepdim=True) - staying.sum(1, keepdim=True)
    coming = torch.zeros_like(live).scatter_(1, best, torch.arange(live.shape[1], device=live.device) < missing)
    return groups.back(staying | coming, dead)
