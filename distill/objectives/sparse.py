"""Teachers of whom only a part was kept: their most likely tokens, or a sample. What a cache on disk hands to losses.

Neither has logits of its own: `against` is the loss of rows of a student's, in the same pass and the same chunks as any
other (distill.objectives.token_sum), with its derivative over the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.objectives.divergences import Kind, Result, distribution, forward_kl
from distill.objectives.known import softmax_rows
from growth.errors import UserError


@dataclass(frozen=True)
class TopK:
    """The k likeliest tokens and what all others have together: k + 1 buckets, to which a student is reduced as well.

    Forward KL over buckets is a lower bound of that over tokens: it grows with k and is exact at k = V. So is every
    divergence of this package (merging outcomes brings distributions no further apart).
    """

    ids: Tensor  # [N, k]
    log_probs: Tensor  # [N, k]
    rest: Tensor  # [N] logarithm of what the others have
    vocabulary: int
    temperature: float = 1.0  # by which the teacher's logits were divided

    @property
    def rows(self) -> int:
        return len(self.ids)

    def against(self, kind: Kind, temperature: float, squared: bool):
        """A divergence over buckets, as a RowLoss. A bucket's logit is the log-sum-exp of those in it."""
        _same(temperature, self.temperature)
        factor = temperature**2 if squared else 1.0

        def loss(rows: slice, logits: Tensor, _) -> Result:
            x = logits if temperature == 1 else logits / temperature
            ids = self.ids[rows]
            buckets, share = _buckets(x, ids)
            p = self._buckets(rows, x.dtype)
            values, slope = kind(distribution(p), distribution(buckets))
            slope = slope * (factor / temperature)
            return values * factor, _spread(slope, share, ids)

        return loss

    def _buckets(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """[n, k + 1], or [n, V] if nothing was left out."""
        kept = self.log_probs[rows].to(dtype)
        return kept if self._whole else torch.cat([kept, self.rest[rows, None].to(dtype)], 1)

    @property
    def _whole(self) -> bool:
        return self.ids.shape[1] == self.vocabulary


def _buckets(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The student's buckets [n, k + 1] of logits [n, V], and what each of the others has of their bucket [n, V].

    The others are summed as they are: one minus the sum of the kept would be noise where that is nearly one.
    """
    kept = x.gather(1, ids)
    if ids.shape[1] == x.shape[1]:
        return kept, torch.empty_like(x)
    share = torch.empty_like(x)
    rest = softmax_rows(x.scatter(1, ids, float("-inf")), out=share)
    return torch.cat([kept, rest[:, None]], 1), share


def _spread(slope: Tensor, share: Tensor, ids: Tensor) -> Tensor:
    """A derivative by the buckets' logits as one by the tokens' [n, V]."""
    k = ids.shape[1]
    others = share.mul_(slope[:, k:]) if slope.shape[1] > k else share
    return others.scatter_(1, ids, slope[:, :k])


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from the teacher, with weights that are the teacher's probabilities on average.

    Forward KL is linear in them, so its gradient, and with the teacher's entropy its value, are those of the whole
    distribution on average: unbiased, where top-k is not (random sampling: Anshumann et al. 2025, arXiv 2503.16870).
    Every other divergence is not linear and is refused.
    """

    ids: Tensor  # [N, m]; a place that holds no token has weight 0
    weights: Tensor  # [N, m] each row's sum to 1
    entropy: Tensor  # [N] of the whole distribution
    vocabulary: int
    temperature: float = 1.0

    @property
    def rows(self) -> int:
        return len(self.ids)

    def against(self, kind: Kind, temperature: float, squared: bool):
        """Cross-entropy against the weights minus the entropy, as a RowLoss."""
        _same(temperature, self.temperature)
        if kind is not forward_kl:
            raise UserError("a sampled teacher has no other divergence than forward_kl; a top-k or hidden cache has")
        factor = temperature**2 if squared else 1.0

        def loss(rows: slice, logits: Tensor, _) -> Result:
            x = logits if temperature == 1 else logits / temperature
            ids, weights, q = self.ids[rows], self.weights[rows].to(x.dtype), torch.empty_like(x)
            log_sum = softmax_rows(x, out=q)
            values = log_sum - (weights * x.gather(1, ids)).sum(1) - self.entropy[rows].to(x.dtype)
            slope = q.scatter_add_(1, ids, -weights)
            return values * factor, slope if factor == temperature else slope.mul_(factor / temperature)

        return loss


Sparse = TopK | Sampled


@dataclass(frozen=True)
class Spoken:
    """Of each predicted token only how likely it was: enough for the likelihood of spans of text, in tokens of the
    teacher's own."""

    log_probs: Tensor  # [N]


def _same(asked: float, kept: float) -> None:
    """What is left out cannot be divided by another temperature afterwards."""
    if asked != kept:
        raise UserError(
            f"the teacher was cached at temperature {kept:g}, the loss asks for {asked:g}; cache it at that, or keep: "
            "hidden, which serves any"
        )
