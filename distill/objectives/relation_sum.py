"""Relation KL (MiniLM): memory linear in the sequence length, gradient in the forward pass.

For one relation head of width d the student's scores are Z = L R^T / sqrt(d). With P the teacher's and Q the student's
softmax, dKL/dZ = Q - P =: G, so dL = G R / sqrt(d) and dR = G^T L / sqrt(d): sums over blocks of G.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.objectives import relation_blocks
from distill.objectives.given import divisors, one_of, placed, wrong_shapes
from distill.objectives.known import known
from distill.objectives.segments import Form, Group, Sight, groups, sequences
from growth.errors import UserError

How = Literal["auto", "blocks", "fused"]
Pair = tuple[Tensor, Tensor]  # left (query rows) and right (keys); the same tensor for a relation with itself


def relation_kl(
    teacher: Tensor | Pair,
    student: Tensor | Pair,
    segments: Tensor,
    heads: int,
    *,
    causal: bool = False,
    window: int | None = None,
    reduction: str = "sample",
    scaling: tuple[float, float] | None = None,
    how: How = "auto",
) -> Tensor:
    """How differently two models relate tokens to each other (MiniLMv2: Wang et al. 2020, arXiv 2012.15828).

    `teacher` and `student` are [B, T, width] or [B, heads, T, head], or a pair of these for a relation between two
    (queries and keys). Widths may differ; `heads` relation heads divide them all. `segments` [B, T]: 0 is padding, a
    token sees its own segment, with `causal` only up to itself, with `window` only tokens nearer than that.
    `reduction`: "sample" is the mean over sequences of the mean over heads and rows, "token" the mean over all rows
    and heads. `scaling` (teacher, student) replaces 1 / sqrt(head width). Float32 inside (float64 for float64); the
    teacher gets no gradient. `how`: "fused", one kernel of Triton's on a GPU; "blocks", anywhere; "auto", what fits.
    """
    sides, sight = _sides(teacher, student, segments, heads, window), Sight(causal, window)
    one_of("reduction", reduction, ("sample", "token"))
    one_of("form", how, get_args(How))
    total = relation_sum(*sides, groups(segments), heads, sight=sight, reduction=reduction, scaling=scaling, how=how)
    return _mean(total, segments, reduction)


def attention_mse(
    teacher: Pair,
    student: Pair,
    segments: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    scaling: tuple[float, float] | None = None,
) -> Tensor:
    """How far attention scores are apart before the softmax (TinyBERT: Jiao et al. 2019, arXiv 1909.10351).

    Queries and keys [B, heads, T, head] of both, of as many heads; `segments`, `causal`, `window` and `scaling` as
    above. The mean over sequences of the mean square over heads, tokens and the tokens that they see.
    """
    if teacher[0].dim() != 4 or teacher[0].shape[:3] != student[0].shape[:3]:
        raise wrong_shapes("queries are [B, heads, T, head], of as many heads", teacher=teacher[0], student=student[0])
    heads = student[0].shape[1]
    sides = _sides(teacher, student, segments, heads, window)
    how = {"sight": Sight(causal, window), "reduction": "sample", "scaling": scaling, "measure": "mse"}
    return _mean(relation_sum(*sides, groups(segments), heads, **how), segments, "sample")


def _mean(total: Tensor, segments: Tensor, reduction: str) -> Tensor:
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
    sight: Sight,
    reduction: str,
    scaling: tuple[float, float] | None = None,
    measure: str = "kl",
    how: How = "auto",
) -> Tensor:
    """Sum over sequences of [KL over heads and rows / (heads x rows)], for "token" of [KL over both / heads].

    `measure` mse: of the mean square of the scores in place of the KL.
    """
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in student)
    with torch.no_grad(), torch.autocast(student[0].device.type, enabled=False):
        sides = _tokens(teacher), _tokens(student)
        scales = scaling or tuple((left.shape[1] // heads) ** -0.5 for left, _ in sides)
        form = Form(heads, scales, sight, reduction, measure)
        total, found = _solver(how, *sides, form)(*sides, problems, form, learns)
    return known(total, {x: _as_given(gradient, x) for x, gradient in zip(student, found, strict=learns)})


def _solver(how: How, teacher: Pair, student: Pair, form: Form) -> Callable:
    """The kernel or, if that will not do, blocks."""
    if how == "blocks" or (how == "auto" and not student[0].is_cuda):
        return relation_blocks.solve
    refused = "it needs Triton, which PyTorch for CUDA brings along"
    if find_spec("triton"):
        from distill.objectives import relation_triton

        refused = relation_triton.refused(teacher, student, form)
        if not refused:
            return relation_triton.solve
    if how == "fused":
        raise UserError(f"relation in a fused kernel: {refused}; how='blocks' does without")
    return relation_blocks.solve


def _sides(
    teacher: Tensor | Pair, student: Tensor | Pair, segments: Tensor, heads: int, window: int | None
) -> tuple[Pair, Pair]:
    """Both models' pairs; refused, with what would do, where they cannot be related."""
    pairs = [(x, x) if isinstance(x, Tensor) else beside(*x) for x in (teacher, student)]
    for theirs, ours in zip(*pairs, strict=True):
        placed(segments, teacher=theirs, student=ours)
    widths = [[x.shape[-1] * (x.shape[1] if x.dim() == 4 else 1) for x in pair] for pair in pairs]
    for name, (left, right) in zip(("teacher", "student"), widths, strict=True):
        if left != right:
            raise UserError(f"the {name}'s two tensors are {left} and {right} wide; they need one width")
        if heads < 1 or left % heads:
            works = divisors(math.gcd(*(width for pair in widths for width in pair)), heads)
            raise UserError(f"heads={heads} does not divide the {name}'s width {left}; {works}")
    if window is not None and window < 1:
        raise UserError(f"window={window}: a token sees itself at least, which is 1")
    return tuple(pairs)


def beside(left: Tensor, right: Tensor) -> Pair:
    """Grouped keys and values [B, Hkv, T, d] are repeated for the queries [B, H, T, d] beside them."""
    if left.dim() == 3 or right.dim() == 3:
        return left, right
    heads = max(left.shape[1], right.shape[1])
    return tuple(x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in (left, right))


def _tokens(pair: Pair) -> Pair:
    """[B, T, W] or [B, H, T, d] as one row per token [B * T, W]."""
    rows = {x: (x if x.dim() == 3 else x.transpose(1, 2).flatten(2)).flatten(0, 1) for x in pair}
    return rows[pair[0]], rows[pair[1]]


def _as_given(rows: Tensor, x: Tensor) -> Tensor:
    """One row per token [B * T, W] in the layout of `x`."""
    return rows.view_as(x) if x.dim() == 3 else rows.view(x.transpose(1, 2).shape).transpose(1, 2)
