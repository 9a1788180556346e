"""How far the student's distribution q is from the teacher's p: each kind with its derivative, row by row.

A kind takes p and q as (log, probability) [N, V] and gives the divergence of every row [N] and its derivative by the
student's logits [N, V]: with g = dD/dq that is q (g - sum_j q_j g_j), in which a constant added to g changes nothing.
The teacher may rule entries out (probability 0, logarithm minus infinity); the student's logits are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distill.objectives.known import softmax_rows
from growth.errors import UserError, did_you_mean


class Distribution(NamedTuple):
    log: Tensor  # [N, V]
    probability: Tensor  # [N, V]


def distribution(logits: Tensor) -> Distribution:
    probability = torch.empty_like(logits)
    return Distribution(logits - softmax_rows(logits, out=probability)[:, None], probability)


Result = tuple[Tensor, Tensor]
Kind = Callable[[Distribution, Distribution], Result]


def forward_kl(p: Distribution, q: Distribution) -> Result:
    """KL(p || q): the student covers all that the teacher does (Hinton et al. 2015, arXiv 1503.02531)."""
    return _mean(p, p.log - q.log), q.probability - p.probability


def reverse_kl(p: Distribution, q: Distribution) -> Result:
    """KL(q || p): the student does nothing that the teacher would not (Gu et al. 2023, arXiv 2306.08543)."""
    excess = q.log - p.log
    return _mean(q, excess), _by_logits(q, q.probability * excess)


def symmetric(p: Distribution, q: Distribution, beta: float) -> Result:
    """(1 - beta) KL(p || q) + beta KL(q || p); half of Jeffreys' divergence at 1/2."""
    (forward, pull), (reverse, push) = forward_kl(p, q), reverse_kl(p, q)
    return (1 - beta) * forward + beta * reverse, (1 - beta) * pull + beta * push


def jsd(p: Distribution, q: Distribution, beta: float) -> Result:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2023, arXiv 2306.13649).

    By definition KL(p || q) at 0 and KL(q || p) at 1; in between it tends to 0 at both ends: `scaled_jsd` does not.
    """
    m = log_mixture(p.log, q.log, beta)
    excess = q.log - m
    value = beta * _mean(p, p.log - m) + (1 - beta) * _mean(q, excess)
    return value, _by_logits(q, (1 - beta) * q.probability * excess)


def scaled_jsd(p: Distribution, q: Distribution, beta: float) -> Result:
    """JSD / (beta (1 - beta)): from KL(p || q) at 0 to KL(q || p) at 1 without a jump."""
    value, slope = jsd(p, q, beta)
    return value / (beta * (1 - beta)), slope / (beta * (1 - beta))


def skew_forward_kl(p: Distribution, q: Distribution, alpha: float) -> Result:
    """KL(p || alpha p + (1 - alpha) q), at most log(1 / alpha) (Ko et al. 2024, arXiv 2402.03898)."""
    excess = p.log - log_mixture(p.log, q.log, alpha)
    return _mean(p, excess), _by_logits(q, (alpha - 1) * q.probability * torch.expm1(excess))


def skew_reverse_kl(p: Distribution, q: Distribution, alpha: float) -> Result:
    """KL(q || alpha q + (1 - alpha) p), at most log(1 / alpha) (Ko et al. 2024, arXiv 2402.03898)."""
    excess = q.log - log_mixture(q.log, p.log, alpha)
    return _mean(q, excess), _by_logits(q, q.probability * (excess - alpha * torch.expm1(excess)))


def total_variation(p: Distribution, q: Distribution) -> Result:
    """Half the sum of |p - q|; no pull where both are equal."""
    gap = q.probability - p.probability
    return gap.abs().sum(-1) / 2, _by_logits(q, q.probability * gap.sign() / 2)


PLAIN = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "total_variation": total_variation}
SHARED = {"symmetric": symmetric, "jsd": jsd, "scaled_jsd": scaled_jsd}  # beta: 0 is forward KL, 1 is reverse KL
SKEWED = {"skew_forward_kl": skew_forward_kl, "skew_reverse_kl": skew_reverse_kl}  # alpha: 0 is no skew


def kind_of(name: str, beta: float = 0.5, alpha: float = 0.1) -> Kind:
    """The divergence of that name; at the ends of beta and alpha it is the KL that it means there."""
    if name not in (names := (*PLAIN, *SHARED, *SKEWED)):
        raise UserError(f"no divergence {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}")
    if not (0 <= beta <= 1 and 0 <= alpha < 1):
        raise UserError(f"beta={beta:g} must be from 0 to 1, alpha={alpha:g} at least 0 and below 1")
    if name in SHARED and beta in (0, 1):
        return forward_kl if beta == 0 else reverse_kl
    if name in SKEWED and alpha == 0:
        return PLAIN[name.removeprefix("skew_")]
    if name in SHARED:
        return partial(SHARED[name], beta=beta)
    return partial(SKEWED[name], alpha=alpha) if name in SKEWED else PLAIN[name]


def _by_logits(q: Distribution, weighted: Tensor) -> Tensor:
    """The derivative by the logits of q, from q g."""
    return torch.addcmul(weighted, q.probability, weighted.sum(-1, keepdim=True), value=-1)


def log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), from the greater of the two: never the logarithm of 0, exact where p = q."""
    gap = log_q - log_p
    smaller = (gap < 0).to(gap.dtype).mul_(1 - 2 * share).add_(share)  # the share of the smaller; `where` is slow
    return gap.abs_().neg_().expm1_().mul_(smaller).log1p_().add_(torch.maximum(log_p, log_q))


def _mean(p: Distribution, x: Tensor) -> Tensor:
    """sum_j p_j x_j of each row; 0 times minus infinity is 0, NaN stays NaN."""
    return x.clamp(min=torch.finfo(x.dtype).min).mul_(p.probability).sum(-1)
