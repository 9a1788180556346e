"""The distance of hidden states [B, T, D], at places that segment ids [B, T] tell."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.given import one_of, placed, wrong_shapes
from distill.objectives.segments import sequences


def hidden(
    teacher: Tensor,
    student: Tensor,
    segments: Tensor,
    kind: str = "mse",
    position: str = "all",
    reduction: str = "mean",
) -> Tensor:
    """The mean over documents (`first` and `mean` of their tokens) or tokens (`all`); zero where there are none."""
    one_of("kind", kind, ("mse", "cosine"))
    one_of("position", position, ("first", "mean", "all"))
    if kind == "mse":
        one_of("reduction", reduction, ("mean", "sum"))
    placed(segments, teacher=teacher, student=student)
    if teacher.shape != student.shape:
        raise wrong_shapes("states are of one width; a linear map serves between two", teacher=teacher, student=student)
    total = hidden_sum(teacher, student, segments, kind, position, reduction)
    return total / hidden_count(segments, position).clamp_min(1).to(total.dtype)


def hidden_sum(teacher: Tensor, student: Tensor, segments: Tensor, kind: str, position: str, reduction: str) -> Tensor:
    """Over documents or tokens; `reduction` is that of mse over the width. Float32, or float64 where the states are."""
    wide = torch.promote_types(student.dtype, torch.float32)
    ours, theirs = (_at(x.to(wide), segments, position) for x in (student, teacher))  # [N, D]
    if kind == "cosine":
        return (1 - torch.cosine_similarity(ours, theirs, dim=-1)).sum()
    total = (ours - theirs).square().sum()
    return total if reduction == "sum" else total / student.shape[-1]


def hidden_count(segments: Tensor, position: str) -> Tensor:
    positions, lengths = sequences(segments)
    return segments.new_tensor(len(positions if position == "all" else lengths)).double()


def _at(x: Tensor, segments: Tensor, position: str) -> Tensor:
    """[B, T, D] -> [N, D]."""
    positions, lengths = sequences(segments)
    x = x.flatten(0, 1)
    if position == "first":
        return x[positions[lengths.cumsum(0) - lengths]]
    if position == "all":
        return x[positions]
    document = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    total = x.new_zeros(len(lengths), x.shape[1]).index_add(0, document, x[positions])
    return total / lengths[:, None]
