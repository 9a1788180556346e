"""Scores as lists [B, N] with a mask: their shapes, which are never broadcast, and what a mask leaves of them."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.given import wrong_shapes
from growth.errors import UserError


def lists(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of pairs [P] as lists [B, N] by the pairs' groups [P] (0, 1, ...; order is kept), and their mask."""
    if scores.dim() != 1 or group.shape != scores.shape:
        raise wrong_shapes("scores and groups are [P]", scores=scores, group=group)
    order = group.argsort(stable=True)
    sizes = torch.bincount(group) if len(group) else group.new_zeros(0)
    mask = torch.arange(int(sizes.max()) if len(sizes) else 0, device=group.device) < sizes[:, None]  # [B, N]
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores[order]), mask


def pairs_of_lists(group: Tensor) -> Tensor:
    """How many pairs of two of one list there are, of groups [P]: float64."""
    n = torch.bincount(group).double()
    return (n * (n - 1) / 2).sum()


def differences(scores: Tensor, group: Tensor, every: bool = False) -> Tensor:
    """Of the scores [P] of lists the first minus each other one, or each minus each that stands behind it [n]."""
    rows, mask = lists(scores, group)
    apart = rows[:, :, None] - rows[:, None, :]  # [B, N, N]
    pairs = (mask[:, :, None] & mask[:, None, :]).triu(1)
    return apart[pairs] if every else apart[:, 0][pairs[:, 0]]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def kept(x: Tensor, mask: Tensor) -> Tensor:
    """Zero, and no gradient, where the mask is false."""
    return torch.where(mask, x, 0)


def mask_of(mask: Tensor | None, **scores: Tensor) -> Tensor:
    """The mask, all true if there is none, of the shape that all scores have."""
    alike(**scores)
    first = next(iter(scores.values()))
    if mask is None:
        return torch.ones_like(first, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise UserError(f"the mask of scores is bool, not {mask.dtype}")
    alike(**scores, mask=mask)
    return mask


def mask_of_lists(mask: Tensor | None, **scores: Tensor) -> Tensor:
    mask = mask_of(mask, **scores)
    if mask.dim() != 2:
        raise wrong_shapes("scores are lists [B, N]", **scores)
    return mask


def rows_of(scores: Tensor, positive: Tensor) -> Tensor:
    if scores.dim() != 2 or positive.shape != scores.shape[:1]:
        raise wrong_shapes("scores are [B, P], positives one column [B] each", scores=scores, positive=positive)
    return torch.arange(len(scores), device=scores.device)


def alike(**tensors: Tensor) -> None:
    if len({x.shape for x in tensors.values()}) > 1:
        raise wrong_shapes("scores are never broadcast, their shapes must be equal", **tensors)
