"""Divergences of two language models over spans of the same text, which come from distill.teachers.alignment.

Both models have read the same bytes where a span starts and where it ends. So the chain rule gives each of them the
probability of the span, and the two may be compared, whatever tokens they used.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.heads import Logits
from distill.objectives.given import one_of
from distill.objectives.token_sum import against_labels, scored, token_sum
from distill.refine.likelihood import log_probabilities

NONE = -1
IMPOSSIBLE = -1e4  # a logarithm whose exponential is zero, and which zero times does not become NaN
LEAST = 1e-6  # of a probability's distance from one: its logarithm stays finite


class Predicted(NamedTuple):
    """Predicted tokens of one model, in any order: its logits [N, V], the tokens themselves [N], their spans [N]."""

    head: Logits
    targets: Tensor
    spans: Tensor

    @classmethod
    def of(cls, head: Logits, labels: Tensor, segments: Tensor, spans: Tensor) -> Predicted:
        """Of rows [B, T] whose logits [N, V] are those of the positions that `scored` names: each predicts the next."""
        rows, targets = scored(labels, segments, causal=True)
        return cls(head, targets, spans.flatten()[rows + 1])

    @property
    def log_probs(self) -> Tensor:
        """Of the tokens [N], without a gradient; the logits never all exist."""
        return log_probabilities(self.head, self.targets)


class Heard(NamedTuple):
    """The same of a model of which only the log-probabilities of these tokens were kept [N], and their spans [N]."""

    log_probs: Tensor
    spans: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, labels: Tensor, segments: Tensor, spans: Tensor) -> Heard:
        rows, _ = scored(labels, segments, causal=True)
        return cls(log_probs, spans.flatten()[rows + 1])


def aligned(student: Predicted, teacher: Predicted, kind: str = "likelihood", temperature: float = 1.0, shared=None):
    """Mean over the spans that both sides have; 0 without any. See `Aligned` for the kinds."""
    one_of("kind", kind, ("likelihood", "shared", "sorted"))
    count = span_count(student.spans, teacher.spans).clamp(min=1)
    total = aligned_sum(student, teacher, kind, temperature, shared)
    return total / count.to(total.dtype)


def span_count(student: Tensor, teacher: Tensor) -> Tensor:
    """How many spans both sides have, float64."""
    return _both(student, teacher).sum(dtype=torch.float64)


def aligned_sum(student: Predicted, teacher: Predicted | Heard, kind: str, temperature: float, shared=None) -> Tensor:
    """The sum over spans. Float32 inside (float64 for float64); the teacher gets no gradient.

    `shared` [2, K], for the kind of that name: ids of the pieces that both have, the student's and the teacher's.
    """
    both = _both(student.spans, teacher.spans)
    if kind == "likelihood":
        return _likelihood_sum(student, teacher, both, temperature)
    ours, theirs = (_log_probs(_next(side, both), temperature) for side in (student, teacher))
    if kind == "sorted":
        return sorted_distance(theirs.detach(), ours).sum()
    return shared_divergence(theirs.detach()[:, shared[1]], ours, shared[0]).sum()


def _likelihood_sum(student: Predicted, teacher: Predicted | Heard, both: Tensor, temperature: float) -> Tensor:
    """A chunk of rows at a time: by the chain rule, the gradient is that of a weighted cross-entropy."""
    theirs = _by_span(teacher.log_probs, teacher.spans, len(both))[both]
    with torch.enable_grad():
        each = student.log_probs.requires_grad_()
        ours = _by_span(each, student.spans, len(both))[both]
        value = likelihood_divergence(theirs, ours, temperature).sum()
        (slope,) = torch.autograd.grad(value, each)
    learned = token_sum(student.head, None, against_labels(student.targets), -slope)
    return value.detach() + (learned - learned.detach())


def _by_span(log_probs: Tensor, spans: Tensor, count: int) -> Tensor:
    """The chain rule adds up the tokens of each span [count]."""
    there = spans != NONE
    return log_probs.new_zeros(count).index_add(0, spans[there], log_probs[there])


def likelihood_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL between two coins for each span [S]: this text, or any other, of log-likelihoods [S] over the temperature."""
    p, q = teacher.clamp(min=IMPOSSIBLE).div(temperature).clamp(max=-LEAST), student.div(temperature).clamp(max=-LEAST)
    return p.exp() * (p - q) - torch.expm1(p) * (_log1mexp(p) - _log1mexp(q))


def shared_divergence(teacher: Tensor, student: Tensor, ids: Tensor) -> Tensor:
    """KL of each row [S], over the tokens that the teacher speaks of and all others taken as one.

    Log-probabilities: the teacher's [S, K] of the student's tokens `ids` [K] or [S, K], the student's [S, V]. The
    others have what is left of the teacher's mass. If there are none, the teacher's mass is brought to one, and with
    equal tokenisers this is the KL of the distributions.
    """
    ids = ids.expand(len(student), -1)
    teacher = teacher.clamp(min=IMPOSSIBLE)
    teacher = teacher.log_softmax(-1) if ids.shape[1] == student.shape[1] else teacher
    kl = (teacher.exp() * (teacher - student.gather(1, ids))).sum(-1)
    if ids.shape[1] == student.shape[1]:
        return kl
    rest = -torch.expm1(teacher.logsumexp(-1).clamp(max=0))  # [S]
    return kl + torch.xlogy(rest, rest) - rest * student.scatter(1, ids, float("-inf")).logsumexp(-1)


def sorted_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum over ranks of |p - q| of each row [S], of log-probabilities [S, V] and [S, W]; beyond the shorter one 0."""
    p, q = (side.exp().sort(-1, descending=True).values for side in (teacher, student))
    width = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (p, q))
    return (p - q).abs().sum(-1)


def _both(student: Tensor, teacher: Tensor) -> Tensor:
    """Which span numbers stand on both sides [S] bool."""
    size = 1 + max(int(side.max()) if side.numel() else NONE for side in (student, teacher))
    there = [torch.zeros(size, dtype=torch.bool, device=student.device) for _ in range(2)]
    for mask, side in zip(there, (student, teacher), strict=True):
        mask[side[side != NONE]] = True
    return there[0] & there[1]


def _next(side: Predicted, both: Tensor) -> Tensor:
    """The logits with which a model starts each of these spans [S, V]."""
    there = (side.spans != NONE).nonzero().squeeze(1)
    last = len(side.spans)
    first = there.new_full((len(both),), last).scatter_reduce(0, side.spans[there], there, "amin")
    return side.head.at(first[both]).whole()


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    return (_wide(logits) / temperature).log_softmax(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0."""
    return torch.where(x > -0.69, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))
