"""Losses of rankers: scores of passages for a query, against those that a teacher gave.

Scores are lists [B, N], one row a query, with a mask of the same shape where lists have different lengths: what is
masked out may hold anything, NaN as well. Shapes are never broadcast: (B, 1) against (B,) is an error. With
`reduction="sum"` a loss is a sum whose count (`pair_count` and the others) comes from mask and teacher alone, so that
it does not matter how a step was cut into batches; losses over the passages of other queries depend on these by
definition. Float32 inside, float64 for float64; teachers get no gradient.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objectives.given import one_of, wrong_shapes
from distill.objectives.score_lists import alike, kept, mask_of, mask_of_lists, rows_of, wide

Reduction = Literal["mean", "sum"]
HIDDEN = -1e30  # a score that no softmax sees; not minus infinity, for a row may have nothing else


def margin_mse(
    positive: Tensor,
    negatives: Tensor,
    teacher_positive: Tensor,
    teacher_negatives: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Margin-MSE: match differences of scores, not scores (Hofstaetter et al. 2020, arXiv 2010.02666).

    [(s+ - s-) scale - (t+ - t-)]^2 over all negatives that the mask leaves: scores of positives [B], of negatives [B]
    or [B, N]. Only differences are taught, so that teacher and student may have other offsets; `scale` is for a student
    whose margins cannot be as wide as the teacher's (see `margin_scale`).
    """
    alike(positive=positive, teacher_positive=teacher_positive)
    if positive.dim() != 1 or negatives.dim() not in (1, 2) or len(negatives) != len(positive):
        raise wrong_shapes("positives are [B], negatives [B] or [B, N]", positive=positive, negatives=negatives)
    mask = mask_of(mask, negatives=negatives, teacher_negatives=teacher_negatives)
    at = positive.shape + (1,) * (negatives.dim() - 1)
    error = scale * (wide(positive).view(at) - wide(negatives))
    error = error - (wide(teacher_positive).view(at) - wide(teacher_negatives)).detach()
    return _reduced(kept(error, mask).square(), pair_count(mask), reduction)


def all_pairs_margin_mse(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, reduction: Reduction = "mean"
) -> Tensor:
    """Margin-MSE of every pair of a list [B, N] in O(N).

    With e = scale s - t, the squares of e_i - e_j over all pairs add up to n times the sum of (e_i - mean e)^2.
    """
    mask = mask_of_lists(mask, student=student, teacher=teacher)
    error = kept(scale * wide(student) - wide(teacher).detach(), mask)  # [B, N]
    n = mask.sum(1, keepdim=True)
    apart = kept(error - error.sum(1, keepdim=True) / n.clamp(min=1), mask)
    return _reduced(n * apart.square(), all_pairs_count(mask), reduction)


def pointwise_mse(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, reduction: Reduction = "mean"
) -> Tensor:
    """Match the scores themselves, of any shape."""
    mask = mask_of(mask, student=student, teacher=teacher)
    return _reduced(kept(wide(student) - wide(teacher).detach(), mask).square(), pair_count(mask), reduction)


def listwise_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL of two distributions over the passages of a list [B, N]: softmax(teacher / T) and softmax(student / T)."""
    mask = mask_of_lists(mask, student=student, teacher=teacher)
    p, q = (F.log_softmax(wide(x).masked_fill(~mask, HIDDEN) / temperature, 1) for x in (teacher.detach(), student))
    kl = torch.where(mask & (p > HIDDEN / 2), p.exp() * (p - q), 0)
    factor = temperature**2 if temperature_squared else 1.0
    return _reduced(kl * factor, list_count(mask), reduction)


def ranknet(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    weighted: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """RankNet on the teacher's preferences: log(1 + exp(s_j - s_i)) wherever it scores i above j in a list [B, N].

    `weighted`: times how far above. Which of two passages is the better one is the teacher's word, so that no weight
    is negative.
    """
    mask = mask_of_lists(mask, student=student, teacher=teacher)
    preferred = _preferred(teacher, mask)  # [B, N, N]
    s, t = kept(wide(student), mask), kept(wide(teacher.detach()), mask)
    loss = F.softplus(s[:, None, :] - s[:, :, None])
    loss = loss * (t[:, :, None] - t[:, None, :]) if weighted else loss
    return _reduced(kept(loss, preferred), preference_count(teacher, mask), reduction)


def in_batch_margin(
    student: Tensor,
    teacher: Tensor,
    positive: Tensor,
    own: Tensor,
    *,
    scale: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Margin-MSE of each query's positive against the passages of the other queries (TAS-B: arXiv 2104.06967).

    Scores of every query with every passage of the group [B, P], those of a teacher that can give them all (a
    ColBERT); `positive` [B] is a column, `own` [B, P] tells the passages that belong to a query: they are left out, its
    pairs have a loss of their own. With one positive and one negative a query this is the half of both halves of TAS-B.
    """
    alike(student=student, teacher=teacher)
    rows = rows_of(student, positive)
    s, t = wide(student), wide(teacher)
    given = s[rows, positive], s, t[rows, positive], t
    return margin_mse(*given, mask=_others(own, positive), scale=scale, reduction=reduction)


def contrastive(
    scores: Tensor,
    positive: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of each query's positive among the passages of the group: scores [B, P], `positive` [B] a column.

    The mask [B, P] leaves out passages that are no negatives: other positives of the query, say.
    """
    rows, mask = rows_of(scores, positive), mask_of_lists(mask, scores=scores)
    mask = mask.index_put((rows, positive), mask.new_ones(len(rows)))
    seen = (wide(scores) / temperature).masked_fill(~mask, HIDDEN)
    return _reduced(seen.logsumexp(1) - seen[rows, positive], list_count(mask), reduction)


# What sums are divided by: float64, from masks and teachers alone


def pair_count(mask: Tensor) -> Tensor:
    """Of margin_mse (the mask of its negatives) and pointwise_mse."""
    return mask.sum(dtype=torch.float64)


def all_pairs_count(mask: Tensor) -> Tensor:
    n = mask.sum(1, dtype=torch.float64)
    return (n * (n - 1) / 2).sum()


def list_count(mask: Tensor) -> Tensor:
    """Of listwise_kl and contrastive: lists with anything in them."""
    return mask.any(1).sum(dtype=torch.float64)


def preference_count(teacher: Tensor, mask: Tensor) -> Tensor:
    """Of ranknet: pairs that the teacher does not find equal."""
    return _preferred(teacher, mask).sum(dtype=torch.float64)


def in_batch_count(positive: Tensor, own: Tensor) -> Tensor:
    return pair_count(_others(own, positive))


def _reduced(values: Tensor, count: Tensor, reduction: Reduction) -> Tensor:
    one_of("reduction", reduction, get_args(Reduction))
    total = values.sum(dtype=torch.float64)
    total = total / count.clamp(min=1) if reduction == "mean" else total
    return total.to(values.dtype)


def _others(own: Tensor, positive: Tensor) -> Tensor:
    rows = rows_of(own, positive)
    return (~own).index_put((rows, positive), own.new_zeros(len(rows)))


def _preferred(teacher: Tensor, mask: Tensor) -> Tensor:
    """[B, N, N]: i is above j, both are there."""
    return (teacher[:, :, None] > teacher[:, None, :]) & mask[:, :, None] & mask[:, None, :]
