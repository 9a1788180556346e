"""A linear layer whose matrix is `scale * B A` and values at fixed places (SLTrain, Han et al. 2024, arXiv 2406.02214).

A method to save memory, not FLOPs: the matrix is built anew in every forward and backward pass, and only the gradients
and moments of B, A and the values are ever kept. Without values the two thin products are done instead, which do save
FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from growth.factored import Factors, merged


class _Product(torch.autograd.Function):
    """x W^T + bias. Keeps its inputs alone; in backward one dense matrix stands at a time: W, then its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, B: Tensor, A: Tensor, values: Tensor, bias: Tensor | None, indices: Tensor, scale):
        ctx.save_for_backward(x, B, A, values, indices)
        ctx.scale = scale
        y = x @ merged(B, A, values.view(-1), indices, scale).T  # [..., out]
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, B, A, values, indices = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dx = dy @ merged(B, A, values.view(-1), indices, ctx.scale) if wants[0] else None
        flat = dy.flatten(0, -2)  # [N, out]
        dB = dA = dV = None
        if any(wants[1:4]):
            G = flat.T @ x.flatten(0, -2)  # [out, in]
            dB = (G @ A.T).mul_(ctx.scale)
            dA = (B.T @ G).mul_(ctx.scale)
            dV = G.view(-1).index_select(0, indices).view_as(values)
        return dx, dB, dA, dV, flat.sum(0) if wants[4] else None, None, None


class SparseLowRank(nn.Module):
    """In the place of a Linear or a Conv1D; owns its factors, so that ZeRO 3 gathers them around its forward pass."""

    weight = None  # T5 asks whether there is one

    def __init__(self, factors: Factors, bias: nn.Parameter | None):
        super().__init__()
        self.B, self.A = (nn.Parameter(f.contiguous()) for f in (factors.B, factors.A))  # an SVD's lie by columns
        self.bias, self.scale = bias, factors.scale
        # two dimensions: entries of a matrix decay, vectors do not (engine.groups)
        self.values = nn.Parameter(factors.values[None]) if factors.values.numel() else None  # [1, n]
        self.register_buffer("indices", factors.indices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.values is None:
            return nn.functional.linear(nn.functional.linear(x, self.A) * self.scale, self.B, self.bias)
        return _Product.apply(x, self.B, self.A, self.values, self.bias, self.indices, self.scale)

    def extra_repr(self) -> str:
        (out, rank), n = self.B.shape, self.indices.numel()
        return f"{self.A.shape[1]} -> {out}, rank {rank}, {n} values"
