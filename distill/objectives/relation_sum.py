"""Relation KL in blocks of scores: memory linear in the sequence length, gradient in the forward pass.

For one relation head of width d the student's scores are Z = L R^T / sqrt(d). With P the teacher's and Q the student's
softmax, dKL/dZ = Q - P =: G, so dL = G R / sqrt(d) and dR = G^T L / sqrt(d): sums over blocks of G. Scores exist for
a few heads and query rows at a time, in three buffers that are written again and again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distill.objectives.known import known, softmax_rows
from distill.objectives.segments import Group, groups, sequences

# Scores of one block: 8 heads or more, and as many rows as then fit, SCORES / (8 n). The head width does not enter, no
# buffer depends on it. The first is measured (benchmarks/LOG.md, 2026-11-21), the second is a guess.
SCORES, SCORES_ON_A_GPU = 2**19, 2**26
HEADS = 8
HIDDEN = -1e30  # swallows the score it is written over; not minus infinity, for hidden scores are subtracted

Pair = tuple[Tensor, Tensor]  # left (query rows) and right (keys); the same tensor for a relation with itself


def relation_kl(
    teacher: Tensor | Pair,
    student: Tensor | Pair,
    segments: Tensor,
    heads: int,
    *,
    causal: bool = False,
    reduction: str = "sample",
    scaling: tuple[float, float] | None = None,
) -> Tensor:
    """How differently two models relate tokens to each other (MiniLMv2: Wang et al. 2020, arXiv 2012.15828).

    `teacher` and `student` are [B, T, width] or [B, heads, T, head], or a pair of these for a relation between two
    (queries and keys). Widths may differ; `heads` relation heads divide them all. `segments` [B, T]: 0 is padding, a
    token sees its own segment, with `causal` only up to itself. `reduction`: "sample" is the mean over sequences of
    the mean over heads and rows, "token" the mean over all rows and heads. `scaling` (teacher, student) replaces
    1 / sqrt(head width). Float32 inside (float64 for float64); the teacher gets no gradient.
    """
    sides = _pair(teacher), _pair(student)
    total = relation_sum(*sides, groups(segments), heads, causal=causal, reduction=reduction, scaling=scaling)
    return total / relation_count(segments, reduction).clamp(min=1).to(total.dtype)


def relation_count(segments: Tensor, reduction: str) -> Tensor:
    """What the sum is divided by: the number of sequences ("sample") or of tokens ("token"), float64."""
    positions, lengths = sequences(segments)
    return segments.new_tensor(len(lengths if reduction == "sample" else positions), dtype=torch.float64)


def relation_sum(
    teacher: Pair,
    student: Pair,
    problems: list[Group],
    heads: int,
    *,
    causal: bool,
    reduction: str,
    scaling: tuple[float, float] | None = None,
) -> Tensor:
    """Sum over sequences of [KL over heads and rows / (heads x rows)], for "token" of [KL over both / heads]."""
    device, dtype = student[0].device, torch.float64 if student[0].dtype == torch.float64 else torch.float32
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        total = torch.zeros((), dtype=torch.float64, device=device)
        gradients = {x: torch.zeros_like(_tokens(x), dtype=dtype) for x in student if learns}  # [B * T, W]
        for group in problems:
            t, s = (_dense(pair, group, heads, dtype) for pair in (teacher, student))
            scales = scaling or (t[0].shape[1] ** -0.5, s[0].shape[1] ** -0.5)
            found = {x: torch.zeros_like(dense) for x, dense in zip(student, s, strict=True) if learns}
            kl = _solve(t, s, scales, [found[x] for x in student if learns], _outside(group, heads), causal)
            weight = _weight(group, heads, reduction)  # [S * heads]
            total += (kl * weight).sum()
            for x, gradient in found.items():
                _put(gradients[x], gradient * weight.to(dtype)[:, None, None], group)
    return known(total.to(dtype), {x: _as_given(gradient, x) for x, gradient in gradients.items()})


def _solve(teacher: Pair, student: Pair, scales, gradients: list, outside: Tensor | None, causal: bool) -> Tensor:
    """KL of every problem summed over its rows [P], float64; its derivative by the student is added to `gradients`."""
    (tl, tr), (sl, sr) = teacher, student  # [P, d, L]
    tl, sl = tl * scales[0], sl * scales[1]
    kl = torch.zeros(len(sl), dtype=torch.float64, device=sl.device)
    for p, rows, buffers in _blocks(sl):
        keys = slice(0, rows.stop if causal else sl.shape[2])
        a, b, free = (_shaped(buffer, p, rows, keys) for buffer in buffers)
        torch.bmm(tl[p, :, rows].mT, tr[p, :, keys], out=a)
        torch.bmm(sl[p, :, rows].mT, sr[p, :, keys], out=b)  # [P', rows, keys]
        _hide((a, b), None if outside is None else outside[p, None, keys], rows if causal else None)
        row_kl, difference = _divergence(a, b, free)
        if outside is not None:
            row_kl.masked_fill_(outside[p, rows], 0)
            difference.masked_fill_(outside[p, rows, None], 0)
        kl[p] += row_kl.sum(-1, dtype=torch.float64)
        if gradients:
            left, right = gradients
            left[p, :, rows].baddbmm_(sr[p, :, keys], difference.mT, alpha=scales[1])
            right[p, :, keys].baddbmm_(sl[p, :, rows], difference)
    return kl


def _divergence(a: Tensor, b: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P || Q) of every row and Q - P, where P = softmax(a), Q = softmax(b); overwrites all three.

    KL = sum_j P_j (a_j - b_j) - lse(a) + lse(b)
    """
    p, lse_a = free, softmax_rows(a, out=free)
    expected = a.sub_(b).mul_(p).sum(-1)
    q, lse_b = a, softmax_rows(b, out=a)
    return expected - lse_a + lse_b, q.sub_(p)


def _hide(scores: Pair, outside: Tensor | None, causal_rows: slice | None) -> None:
    """Remove keys before the softmax: those behind the end of a sequence, and with causal rows those after the row."""
    for score in scores:
        if outside is not None:
            score.masked_fill_(outside, HIDDEN)
        if causal_rows is not None:
            corner = score[..., causal_rows]
            corner.masked_fill_(torch.ones_like(corner[0], dtype=torch.bool).triu(1), HIDDEN)


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Problems and query rows of each block of [P, d, L], and three buffers that hold its scores."""
    problems, _, length = x.shape
    budget = SCORES if x.device.type == "cpu" else SCORES_ON_A_GPU
    rows = min(length, max(1, budget // (HEADS * length)))
    some = min(problems, max(1, budget // (rows * length)))
    buffers = x.new_empty(3, some * rows * length)
    for p in range(0, problems, some):
        for r in range(0, length, rows):
            yield slice(p, min(p + some, problems)), slice(r, min(r + rows, length)), buffers


def _shaped(buffer: Tensor, *block: slice) -> Tensor:
    sizes = [s.stop - s.start for s in block]
    return buffer[: math.prod(sizes)].view(sizes)


# Between the layout of attention and dense problems


def _tokens(x: Tensor) -> Tensor:
    """[B, T, W] or [B, H, T, d] as one row per token [B * T, W]."""
    return (x if x.dim() == 3 else x.transpose(1, 2).flatten(2)).flatten(0, 1)


def _as_given(rows: Tensor, x: Tensor) -> Tensor:
    """One row per token [B * T, W] in the layout of `x`."""
    return rows.view_as(x) if x.dim() == 3 else rows.view(x.transpose(1, 2).shape).transpose(1, 2)


def _dense(pair: Pair, group: Group, heads: int, dtype: torch.dtype) -> Pair:
    """Both tensors as the problems of a group [S * heads, d, L]: features first, for thin products run faster so."""
    dense = {}
    for x in pair:
        if x not in dense:
            tokens = _tokens(x)[group.index].unflatten(2, (heads, -1))  # [S, L, heads, d]
            dense[x] = tokens.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
    return dense[pair[0]], dense[pair[1]]


def _put(tokens: Tensor, dense: Tensor, group: Group) -> None:
    """Write the problems of a group [S * heads, d, L] to their places in [B * T, W]."""
    rows = dense.view(len(group.index), -1, dense.shape[2]).mT  # [S, L, W]
    tokens[group.index[group.real]] = rows[group.real]


def _outside(group: Group, heads: int) -> Tensor | None:
    """True where a problem has no token [S * heads, L]; None where every one is full."""
    return (~group.real).repeat_interleave(heads, 0) if group.ragged else None


def _weight(group: Group, heads: int, reduction: str) -> Tensor:
    """What the KL of each problem counts [S * heads], float64 (a bool or int tensor divided would be float32)."""
    lengths = group.lengths.double()
    return (1 / (heads * lengths if reduction == "sample" else heads * lengths**0)).repeat_interleave(heads)


def _pair(x: Tensor | Pair) -> Pair:
    return (x, x) if isinstance(x, Tensor) else x
