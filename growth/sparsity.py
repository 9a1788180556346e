"""Sparsity at rest: masks are drawn and weights off them zeroed; or the masks are dropped, and what was dead may grow.

SPDF (Thangarasa et al. 2023, arXiv 2303.10464): the matrices of attention and feed-forward parts are sparse, all
equally, with exactly int((1 - sparsity) * weights) of each left; embeddings, norms, biases and heads stay dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from growth.anatomy import Anatomy, dissect
from growth.bits import FILE, Mask, as_integers, group
from growth.errors import UsageError, UserError, did_you_mean
from growth.families.table import Slot
from growth.masks import is_sparse
from growth.noise import generator
from growth.operate import PLAIN, Output, Result, delivered, opened
from growth.pieces import Computed
from growth.reindex import Stream, widely
from growth.scope import AXES, part_of

HOW = ("random", "magnitude")
SCOPE = tuple(AXES)
RESCALE = ("none", "sqrt_density")
SPARSITY = 0.75  # the paper's highest


def sparsify(
    src: Any,
    dst: str | Path | None = None,
    *,
    sparsity: float | None = None,
    how: str = "random",
    scope: Sequence[str] = SCOPE,
    pattern: str | None = None,
    rescale: str = "none",
    seed: int = 0,
    output: Output = PLAIN,
) -> Any:
    """A checkpoint in which `sparsity` of every matrix in `scope` is zero, with `masks.safetensors` beside the weights.

    `random` draws from (seed, name of the tensor) alone; `magnitude` keeps the largest weights. `pattern` "2:4" keeps
    two of every four along the dimension that is summed over, as hardware wants it, and says the sparsity by itself;
    without it the sparsity is 0.75. `rescale` "sqrt_density" divides what a random mask leaves by the square root of
    its share, which keeps the deviation of outputs; the paper does not.
    """
    sparsity = _checked(sparsity, how, scope, pattern, rescale)
    checkpoint = opened(src, dst, output)
    if is_sparse(checkpoint):
        raise UserError(f"{checkpoint.path} has masks already; `growth densify` drops them")
    anatomy = dissect(checkpoint)
    masks = {slot.name: _mask(checkpoint, anatomy, slot, sparsity, how, pattern, seed)
             for slot in prunable(anatomy, scope)}  # fmt: skip
    arguments = {"sparsity": float(sparsity), "how": how, "scope": list(scope), "pattern": pattern, "rescale": rescale}
    facts = {
        **{"maps": {}, "new": {}, "preserves": "no" if sparsity else "exact"},
        "kept": {name: [mask.kept, mask.size] for name, mask in masks.items()},
    }
    stream = _zeroed(checkpoint, anatomy, masks, rescale == "sqrt_density")
    result = Result("sparsify", {**arguments, "seed": seed}, checkpoint.config, stream, facts, masks=masks)
    return delivered(result, dst, output, checkpoint)


def densify(src: Any, dst: str | Path | None = None, *, output: Output = PLAIN) -> Any:
    """The same weights without masks: what was dead starts at exactly zero, and may grow from there."""
    checkpoint = opened(src, dst, output)
    if not is_sparse(checkpoint):
        raise UserError(f"{checkpoint.path} has no {FILE}, so it is dense already")
    stream = ((slot.name, checkpoint[name]) for slot, name in dissect(checkpoint).places.items())
    facts = {"maps": {}, "new": {}, "preserves": "exact"}
    return delivered(Result("densify", {}, checkpoint.config, stream, facts, masks={}), dst, output, checkpoint)


def _checked(sparsity: float | None, how: str, scope: Sequence[str], pattern: str | None, rescale: str) -> Fraction:
    """The sparsity as it was written: 0.9 is nine tenths, which no binary number is."""
    _one_of("how", how, HOW)
    _one_of("rescale", rescale, RESCALE)
    for one in scope:
        _one_of("scope", one, SCOPE)
    if isinstance(scope, str) or not scope:
        raise UsageError(f"scope {scope!r}: a list of some of {', '.join(SCOPE)} is expected")
    if rescale != "none" and how != "random":
        raise UsageError("sqrt_density makes up for weights lost at random; what magnitude leaves is larger than that")
    said = None if sparsity is None else _fraction(sparsity)
    if pattern is None:
        return Fraction(str(SPARSITY)) if said is None else said
    try:
        keep, of = group(pattern)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if said not in (None, 1 - Fraction(keep, of)):
        raise UsageError(f"pattern {pattern} is a sparsity of {1 - keep / of:g}, not {sparsity}; leave one of them out")
    return 1 - Fraction(keep, of)


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} {value!r}: one of {', '.join(known)}{did_you_mean(value, known)}")


def _fraction(sparsity: float) -> Fraction:
    try:
        said = Fraction(str(sparsity))
    except ValueError:
        said = Fraction(-1)
    if not 0 <= said < 1:
        raise UsageError(f"sparsity {sparsity}: a share from 0, which is dense, to below 1, at which nothing is left")
    return said


def prunable(anatomy: Anatomy, scope: Sequence[str] = SCOPE) -> list[Slot]:
    """The matrices inside layers that belong to attention or the feed-forward part, by the family's table."""
    return [slot for slot in anatomy.places if slot.part != ".bias" and part_of(slot.row) in scope]


def kept_of(weights: int, sparsity: Fraction) -> int:
    """Truncated, as the paper's masks are."""
    return int((1 - sparsity) * weights)


def _mask(
    checkpoint: Any, anatomy: Anatomy, slot: Slot, sparsity: Fraction, how: str, pattern: str | None, seed: int
) -> Mask:
    name = anatomy.places[slot]
    shape = checkpoint[name].shape
    kept, dim = kept_of(math.prod(shape), sparsity), slot.row.spec.consumed
    if pattern and shape[dim] % group(pattern)[1]:
        raise UserError(f"{name} sums over {shape[dim]} channels, which are no whole groups of the pattern {pattern}")
    if kept == 0:
        raise UserError(f"sparsity {float(sparsity)} leaves nothing of {name}, which has {math.prod(shape)} weights")
    inner = slot.name.removeprefix(anatomy.prefix)  # the same with a head and without
    scores = partial(_drawn, shape, inner, seed) if how == "random" else partial(_sizes, checkpoint, name)
    choose = partial(_largest, kept=kept) if pattern is None else partial(_in_groups, dim=dim, pattern=pattern)
    return Mask.drawn(shape, kept, lambda: choose(scores()), pattern)


def _drawn(shape: tuple[int, ...], name: str, seed: int):
    import torch

    return torch.empty(shape, dtype=torch.int32).random_(generator=generator(f"mask of {name}", seed))


def _sizes(checkpoint: Any, name: str):
    tensor = checkpoint.tensor(name)
    sizes = (tensor if tensor.itemsize > 2 else tensor.float()).abs()
    if sizes.isnan().any():
        raise UserError(f"{checkpoint.path}: {name} is not finite (NaN), so it has no largest weights")
    return sizes


def _largest(scores, kept: int):
    """True for exactly so many; among equal ones, for the first."""
    import numpy as np

    flat = scores.flatten()
    bar = np.partition(flat.numpy(), len(flat) - kept)[len(flat) - kept].item()
    mask = flat > bar
    equal = (flat == bar).nonzero()[:, 0]
    mask[equal[: kept - int(mask.sum())]] = True
    return mask.view(scores.shape)


def _in_groups(scores, dim: int, pattern: str):
    """True for the largest of every group along a dimension; among equal ones, for the first."""
    import torch

    keep, of = group(pattern)
    groups = scores.movedim(dim, -1).unflatten(-1, (-1, of))  # [..., groups, of]
    best = groups.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    mask = torch.zeros(groups.shape, dtype=torch.bool).scatter_(-1, best, True)
    return mask.flatten(-2).movedim(-1, dim).contiguous()


def _zeroed(checkpoint: Any, anatomy: Anatomy, masks: dict[str, Mask], rescaled: bool) -> Stream:
    for slot, name in anatomy.places.items():
        entry, mask = checkpoint[name], masks.get(slot.name)
        if mask is None:
            yield slot.name, entry
        else:
            factor = math.sqrt(mask.size / mask.kept) if rescaled else 1.0
            yield slot.name, Computed(entry.dtype, entry.shape, partial(_alive, checkpoint, name, mask, factor))


def _alive(checkpoint: Any, name: str, mask: Mask, factor: float):
    tensor = checkpoint.tensor(name)
    scaled = tensor if factor == 1.0 else widely(lambda wide: wide * factor, tensor)
    return zero(scaled, ~mask.bools())


def zero(tensor, dead):
    """Zero where dead and the same bits elsewhere, in any type; filled and not multiplied, since 0 x NaN is NaN."""
    return as_integers(tensor).masked_fill(dead, 0).view(tensor.dtype)
