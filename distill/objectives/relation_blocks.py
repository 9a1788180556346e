"""Relation KL in blocks of scores: a few heads and query rows at a time, in three buffers written again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from distill.objectives.known import softmax_rows
from distill.objectives.segments import Form, Group, Sight

# Scores of one block: 8 heads or more, and as many rows as then fit, SCORES / (8 n). The head width does not enter, no
# buffer depends on it. The first is measured (benchmarks/LOG.md, 2026-11-21), the second is a guess.
SCORES, SCORES_ON_A_GPU = 2**19, 2**26
HEADS = 8
HIDDEN = -1e30  # swallows the score it is written over; not minus infinity, for hidden scores are subtracted

Pair = tuple[Tensor, Tensor]  # left (query rows) and right (keys); the same tensor for a relation with itself


def solve(teacher: Pair, student: Pair, problems: list[Group], form: Form, learns: bool) -> tuple[Tensor, list[Tensor]]:
    """The weighted sum of all KLs and, if it learns, its derivative by both of the student's tensors.

    One row per token [B * T, W], as these. Float32 inside and outside, float64 for float64.
    """
    dtype = torch.float64 if student[0].dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=torch.float64, device=student[0].device)
    gradients = {x: torch.zeros_like(x, dtype=dtype) for x in student if learns}
    for group in problems:
        t, s = (_dense(pair, group, form.heads, dtype) for pair in (teacher, student))
        found = {x: torch.zeros_like(dense) for x, dense in zip(student, s, strict=True) if learns}
        kl = _group(t, s, form, _outside(group, form.heads), [found[x] for x in student if learns])
        weight = form.weight(group.lengths).repeat_interleave(form.heads)  # [S * heads]
        total += (kl * weight).sum()
        for x, gradient in found.items():
            _put(gradients[x], gradient * weight.to(dtype)[:, None, None], group)
    return total.to(dtype), [gradients[x] for x in student if learns]


def _group(teacher: Pair, student: Pair, form: Form, outside: Tensor | None, gradients: list[Tensor]) -> Tensor:
    """KL of every problem summed over its rows [P], float64; its derivative by the student is added to `gradients`."""
    (tl, tr), (sl, sr) = teacher, student  # [P, d, L]
    tl, sl = tl * form.scales[0], sl * form.scales[1]
    kl = torch.zeros(len(sl), dtype=torch.float64, device=sl.device)
    for p, rows, keys, buffers in _blocks(sl, form.sight):
        a, b, free = (_shaped(buffer, p, rows, keys) for buffer in buffers)
        torch.bmm(tl[p, :, rows].mT, tr[p, :, keys], out=a)
        torch.bmm(sl[p, :, rows].mT, sr[p, :, keys], out=b)  # [P', rows, keys]
        _hide((a, b), None if outside is None else outside[p, None, keys], form.sight.unseen(rows, keys, sl.device))
        row_kl, difference = MEASURES[form.measure](a, b, free)
        if outside is not None:
            row_kl.masked_fill_(outside[p, rows], 0)
            difference.masked_fill_(outside[p, rows, None], 0)
        kl[p] += row_kl.sum(-1, dtype=torch.float64)
        if gradients:
            left, right = gradients
            left[p, :, rows].baddbmm_(sr[p, :, keys], difference.mT, alpha=form.scales[1])
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


def _squares(a: Tensor, b: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The mean square of b - a over the keys that a row sees, and its derivative by b; overwrites all three."""
    seen = (b > HIDDEN / 2).sum(-1, keepdim=True, dtype=b.dtype)  # 2 / int is float32
    difference = b.sub_(a)  # zero where both are hidden
    return torch.mul(difference, difference, out=free).sum(-1) / seen.squeeze(-1), difference.mul_(2 / seen)


MEASURES = {"kl": _divergence, "mse": _squares}


def _hide(scores: Pair, *hidden: Tensor | None) -> None:
    """Remove keys before the softmax: those behind the end of a sequence, and those that a row does not see."""
    for mask in hidden:
        if mask is not None:
            for score in scores:
                score.masked_fill_(mask, HIDDEN)


def _blocks(x: Tensor, sight: Sight) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """Problems, query rows and keys of each block of [P, d, L], and three buffers that hold its scores."""
    problems, _, length = x.shape
    budget = SCORES if x.device.type == "cpu" else SCORES_ON_A_GPU
    rows = min(length, sight.window or length)  # with more, most keys of a block would be hidden from most rows
    keys = min(length, rows + sum(sight.reach(length)))
    rows = min(rows, max(1, budget // (HEADS * keys)))
    some = min(problems, max(1, budget // (rows * keys)))
    buffers = x.new_empty(3, some * rows * keys)
    for p in range(0, problems, some):
        for r in range(0, length, rows):
            block = slice(r, min(r + rows, length))
            yield slice(p, min(p + some, problems)), block, sight.keys(block, length), buffers


def _shaped(buffer: Tensor, *block: slice) -> Tensor:
    sizes = [s.stop - s.start for s in block]
    return buffer[: math.prod(sizes)].view(sizes)


# Between rows of tokens and dense problems


def _dense(pair: Pair, group: Group, heads: int, dtype: torch.dtype) -> Pair:
    """Both tensors as the problems of a group [S * heads, d, L]: features first, for thin products run faster so."""
    dense = {}
    for x in pair:
        if x not in dense:
            tokens = x[group.index].unflatten(2, (heads, -1))  # [S, L, heads, d]
            dense[x] = tokens.permute(0, 2, 3, 1).to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
    return dense[pair[0]], dense[pair[1]]


def _put(tokens: Tensor, dense: Tensor, group: Group) -> None:
    """Write the problems of a group [S * heads, d, L] to their places in [B * T, W]."""
    rows = dense.view(len(group.index), -1, dense.shape[2]).mT  # [S, L, W]
    tokens[group.index[group.real]] = rows[group.real]


def _outside(group: Group, heads: int) -> Tensor | None:
    """True where a problem has no token [S * heads, L]; None where every one is full."""
    return (~group.real).repeat_interleave(heads, 0) if group.ragged else None
