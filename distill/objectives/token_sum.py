"""Losses of tokens over a vocabulary, in chunks of rows: the logits never all exist, gradient in the forward pass.

A chunk's logits X = hidden W^T are made, overwritten by the derivative G = dL/dX and used up: d hidden = G W,
dW += G^T hidden. That is three products of the student and one of the teacher, where making logits again in backward
takes four and two. Softmax and divergence work through a chunk in strips that fit a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.heads import Logits, Mixture, add_product
from distill.objectives.divergences import distribution, kind_of
from distill.objectives.given import one_of
from distill.objectives.known import known, softmax_rows
from distill.objectives.sparse import Sparse
from growth.errors import UserError

# Rows of a chunk. A product of n rows reads all of W for 2 n FLOP a number, whatever the vocabulary: too few starve it,
# too many cost memory. The first is measured (benchmarks/LOG.md), the second a guess.
CHUNK, CHUNK_ON_A_GPU = 192, 1024
STRIP, STRIP_ON_A_GPU = 2**18, 2**25  # logits of a strip: measured; a guess
IGNORED = -100

RowLoss = Callable[..., tuple[Tensor, Tensor]]
"""(rows, student's logits [n, V], teacher's or None) -> loss of each row [n] and its derivative by the student's."""


def scored(labels: Tensor, segments: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Flat positions b * T + t whose logits are scored [N], and their targets [N]; -100 is no label.

    Labels are unshifted. A causal position is scored with the label of the next one, if both are of one segment.
    """
    if causal:
        follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
        labels = F.pad(labels[:, 1:].masked_fill(~follows, IGNORED), (0, 1), value=IGNORED)
    labels = labels.flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    return rows, labels[rows]


def classed(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a known class [N], and their classes [N]; -100 is none."""
    rows = (classes != IGNORED).nonzero().squeeze(1)
    return rows, classes[rows]


def sequence_means(segments: Tensor, rows: Tensor) -> tuple[Tensor, int]:
    """Weights [N] of rows with which a sum is one of the sequences' means, and the number of those with any row."""
    names = torch.arange(len(segments), device=segments.device)[:, None] * (segments.max() + 1) + segments
    _, sequence, lengths = names.flatten()[rows].unique(return_inverse=True, return_counts=True)
    return 1 / lengths.double()[sequence], len(lengths)


def cross_entropy(logits: Tensor | Logits, targets: Tensor) -> Tensor:
    """Mean cross-entropy of rows against targets [N]; 0 without rows. Float32 inside, whatever they are."""
    _as_many(logits=_logits(logits).rows, targets=len(targets))
    return cross_entropy_sum(logits, targets) / max(len(targets), 1)


def cross_entropy_sum(logits: Tensor | Logits, targets: Tensor) -> Tensor:
    """Sum over rows of log-sum-exp minus the target's logit."""
    return token_sum(_logits(logits), None, against_labels(targets))


def divergence(
    student: Tensor | Logits,
    teacher: Tensor | Logits | Mixture,
    kind: str = "forward_kl",
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    weights: Tensor | None = None,
    targets: Tensor | None = None,
    ce: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """How far the student's next tokens are from the teacher's: kinds in `distill.objectives.divergences`.

    Both sides are logits [N, V] (log-probabilities will do) or `Logits`, which are never made whole; hidden sizes may
    differ, and several teachers are a `Mixture`. Entries that only one side has are padding of its head and are left
    out. `temperature` divides both sides' logits, `temperature_squared` multiplies the result by its square. `weights`
    [N] are factors of rows; `ce` times the cross-entropy against `targets` [N] is added in the same pass. `reduction`:
    "mean" over rows, "sum". The student gets gradients, the teacher none.
    """
    if ce and targets is None:
        raise UserError("cross-entropy (ce) needs targets, the labels of the rows")
    one_of("reduction", reduction, ("mean", "sum"))
    if temperature <= 0:
        raise UserError(f"temperature={temperature:g} must be above 0")
    student, made = _logits(student), kind_of(kind, beta, alpha)
    if isinstance(teacher, Sparse):
        student = _reading(student, teacher.vocabulary)
        teacher, loss = None, teacher.against(made, temperature, temperature_squared)
    else:
        teacher, loss = _logits(teacher), against_teacher(made, temperature, temperature_squared)
        _as_many(student=student.rows, teacher=teacher.rows)
    if ce:
        loss = both(loss, against_labels(targets), ce)
    total = token_sum(student, teacher, loss, weights)
    return total / max(student.rows, 1) if reduction == "mean" else total


def token_sum(
    student: Logits, teacher: Logits | Mixture | None, loss: RowLoss, weights: Tensor | None = None
) -> Tensor:
    """Sum over rows of weight x loss; its gradient is that of the student's hidden states and head."""
    width = min(side.vocabulary for side in (student, teacher) if side)
    student, teacher = student.trimmed(width), teacher and teacher.trimmed(width)
    dtype = torch.float64 if student.hidden.dtype == torch.float64 else torch.float32
    if weights is not None:
        loss = weighted(loss, weights.to(dtype))
    learns = torch.is_grad_enabled() and student.learns
    with torch.no_grad(), torch.autocast(student.hidden.device.type, enabled=False):
        total = torch.zeros((), dtype=torch.float64, device=student.hidden.device)
        gradients = _Gradients(student, dtype) if learns else None
        for rows in _cuts(0, student.rows, _chunk([student, teacher] if teacher else [student])):
            total += _of_chunk(rows, student, teacher, loss, gradients, dtype)
    return known(total.to(dtype), gradients.found if learns else {})


def _of_chunk(
    rows: slice, student: Logits, teacher: Logits | Mixture | None, loss: RowLoss, gradients, dtype
) -> Tensor:
    """Sum over a chunk, its gradient added to `gradients`. A function, so that its logits are gone before the next."""
    x, y = student.product(rows), teacher and teacher.product(rows)  # [chunk, V]
    room = gradients and gradients.room(rows, x)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for strip in _cuts(rows.start, rows.stop, _strip(x)):
        here = slice(strip.start - rows.start, strip.stop - rows.start)
        logits = student.finish(x[here].to(dtype))  # [strip, V]
        values, by_logits = loss(strip, logits, teacher and teacher.finish(y[here].to(dtype)))
        total += values.sum(dtype=torch.float64)
        if gradients:
            room[here] = student.through(by_logits, logits)
    if gradients:
        gradients.add(rows, room)
    return total


class _Gradients:
    """Of what makes the student's logits, summed over chunks in float32 or float64."""

    def __init__(self, student: Logits, dtype: torch.dtype):
        self.student = student
        given = [x for x in (student.hidden, student.weight, student.bias) if x is not None and x.requires_grad]
        kept = student.hidden.dtype if student.weight is None else dtype  # logits that are there are many
        self.found = {x: torch.zeros_like(x, dtype=kept) for x in given}

    def room(self, rows: slice, product: Tensor) -> Tensor:
        """Where the derivative of these rows goes: where their logits were, or at once to its place."""
        return self.found[self.student.hidden][rows] if self.student.weight is None else product

    def add(self, rows: slice, slope: Tensor) -> None:
        """d hidden = G W, dW += G^T hidden, db += the sum of G."""
        hidden, weight, bias = self.student.hidden, self.student.weight, self.student.bias
        if weight is None:
            return
        if hidden in self.found:
            add_product(self.found[hidden][rows], slope, weight)
        if weight in self.found:
            add_product(self.found[weight], slope.mT, hidden[rows])
        if bias in self.found:
            self.found[bias] += slope.sum(0)


def against_labels(targets: Tensor) -> RowLoss:
    """Cross-entropy: softmax - one-hot."""

    def loss(rows: slice, logits: Tensor, _) -> tuple[Tensor, Tensor]:
        target, p = targets[rows, None], torch.empty_like(logits)
        values = softmax_rows(logits, out=p) - logits.gather(1, target).squeeze(1)
        return values, p.scatter_add_(1, target, torch.full_like(logits[:, :1], -1))

    return loss


def against_teacher(kind: Callable, temperature: float = 1.0, squared: bool = False) -> RowLoss:
    """A divergence of softmax(teacher / T) and softmax(student / T), times T squared if asked for."""
    factor = temperature**2 if squared else 1.0

    def loss(rows: slice, logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        p, q = (distribution(x if temperature == 1 else x / temperature) for x in (teacher, logits))
        values, by_logits = kind(p, q)
        return values * factor, by_logits if factor == temperature else by_logits.mul_(factor / temperature)

    return loss


def both(first: RowLoss, second: RowLoss, share: float) -> RowLoss:
    """first + share x second."""

    def loss(*given) -> tuple[Tensor, Tensor]:
        (values, slopes), (others, more) = first(*given), second(*given)
        return values + share * others, slopes.add_(more, alpha=share)

    return loss


def weighted(first: RowLoss, weights: Tensor) -> RowLoss:
    """Of every row, times its weight."""

    def loss(rows: slice, *sides) -> tuple[Tensor, Tensor]:
        values, slopes = first(rows, *sides)
        return values * weights[rows], slopes.mul_(weights[rows, None])

    return loss


def _logits(given: Tensor | Logits | Mixture) -> Logits | Mixture:
    return Logits(given) if isinstance(given, Tensor) else given


def _as_many(**rows: int) -> None:
    if len(set(rows.values())) > 1:
        raise UserError("both sides have as many rows: " + ", ".join(f"{name} has {n}" for name, n in rows.items()))


def _reading(student: Logits, vocabulary: int) -> Logits:
    """Without padding, as the teacher was when it was cached."""
    if student.vocabulary < vocabulary:
        raise UserError(f"the student's head has {student.vocabulary} rows, its cached teacher {vocabulary} tokens")
    return student.trimmed(vocabulary)


@torch.no_grad()
def strips(logits: Logits) -> Iterator[tuple[slice, Tensor]]:
    """Rows of logits [n, V] in float32 or float64, a strip at a time: they never all exist. Without gradients."""
    dtype = torch.float64 if logits.hidden.dtype == torch.float64 else torch.float32
    for rows in _cuts(0, logits.rows, _chunk([logits])):
        product = logits.product(rows)
        for strip in _cuts(rows.start, rows.stop, _strip(product)):
            here = slice(strip.start - rows.start, strip.stop - rows.start)
            yield strip, logits.finish(product[here].to(dtype))


def _cuts(first: int, end: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, end)) for i in range(first, end, size))


def _chunk(sides: list[Logits | Mixture]) -> int:
    """Rows; all of them at once where logits are there anyway."""
    if all(side.there for side in sides):
        return max(1, sides[0].rows)
    return CHUNK if sides[0].hidden.device.type == "cpu" else CHUNK_ON_A_GPU


def _strip(x: Tensor) -> int:
    return max(1, (STRIP if x.device.type == "cpu" else STRIP_ON_A_GPU) // x.shape[1])
