"""The squared distance of hidden states [B, T, D], at places that segment ids [B, T] tell."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.objectives.segments import sequences


def hidden_mse(
    teacher: Tensor, student: Tensor, segments: Tensor, position: str = "first", reduction: str = "sum"
) -> Tensor:
    """The mean over documents (`first` and `mean` of their tokens) or tokens (`all`); zero where there are none."""
    total = hidden_sum(teacher, student, segments, position, reduction)
    return total / hidden_count(segments, position).clamp_min(1)


def hidden_sum(teacher: Tensor, student: Tensor, segments: Tensor, position: str, reduction: str) -> Tensor:
    """Over documents or tokens; `reduction` is that over the width. Float32, or float64 where the states are."""
    wide = torch.promote_types(student.dtype, torch.float32)
    difference = _at(student.to(wide) - teacher.to(wide), segments, position)  # [N, D]
    total = difference.square().sum()
    return total if reduction == "sum" else total / student.shape[-1]


def hidden_count(segments: Tensor, position: str) -> Tensor:
    positions, lengths = sequences(segments)
    return segments.new_tensor(len(positions if position == "all" else lengths)).double()


def _at(x: Tensor, segments: Tensor, position: str) -> Tensor:
    """[B, T, D] -> [N, D]; a mean of differences is the difference of means."""
    positions, lengths = sequences(segments)
    x = x.flatten(0, 1)
    if position == "first":
        return x[positions[lengths.cumsum(0) - lengths]]
    if position == "all":
        return x[positions]
    document = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    total = x.new_zeros(len(lengths), x.shape[1]).index_add(0, document, x[positions])
    return total / lengths[:, None]
