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


class _Deviation(torch.autograd.Function):
    """max |scale B A - W|. A row of B and a column of A make it: they alone are kept, and no parameter is read in
    backward, when ZeRO 3 may have taken it away."""

    @staticmethod
    def forward(ctx, B: Tensor, A: Tensor, W: Tensor, scale: float):
        wide = torch.promote_types(B.dtype, torch.float32)  # 16 bits would round by as much as it may be
        apart = (B.to(wide) @ A.to(wide)).mul_(scale).sub_(W).flatten()  # [out * in]
        at = apart.abs().argmax()
        i, j, slope = at // W.shape[1], at % W.shape[1], scale * apart[at].sign()
        ctx.save_for_backward(i, j, slope * B[i], slope * A[:, j])
        ctx.shapes = B.shape, A.shape
        return apart[at].abs()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        i, j, b, a = ctx.saved_tensors  # [rank]
        dB, dA = (b.new_zeros(shape) for shape in ctx.shapes)
        dB[i], dA[:, j] = upstream * a, upstream * b
        return dB, dA, None, None


class SparseLowRank(nn.Module):
    """In the place of a Linear or a Conv1D; owns its factors, so that ZeRO 3 gathers them around its forward pass.

    Given the matrix of its `origin`, every forward pass leaves in `deviation` how far the farthest weight is from it.
    """

    weight = None  # T5 asks whether there is one

    def __init__(self, factors: Factors, bias: nn.Parameter | None, origin: Tensor | None = None):
        super().__init__()
        self.B, self.A = (nn.Parameter(f.contiguous()) for f in (factors.B, factors.A))  # an SVD's lie by columns
        self.bias, self.scale = bias, factors.scale
        self.sizes = (*factors.shape, self.A.shape[0], factors.indices.numel())  # ZeRO 3 takes those of weights
        # two dimensions: entries of a matrix decay, vectors do not (engine.groups)
        self.values = nn.Parameter(factors.values[None]) if factors.values.numel() else None  # [1, n]
        self.register_buffer("indices", factors.indices, persistent=False)
        self.register_buffer("origin", origin, persistent=False)
        self.deviation: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.origin is not None:
            self.deviation = _Deviation.apply(self.B, self.A, self.origin, self.scale)
        if self.values is None:
            return nn.functional.linear(nn.functional.linear(x, self.A) * self.scale, self.B, self.bias)
        return _Product.apply(x, self.B, self.A, self.values, self.bias, self.indices, self.scale)

    def extra_repr(self) -> str:
        return "{1} -> {0}, rank {2}, {3} values".format(*self.sizes)


def deviations(module: nn.Module) -> Tensor:
    """Those that the last forward pass left, of all layers [n]."""
    layers = [layer for layer in module.modules() if isinstance(layer, SparseLowRank) and layer.origin is not None]
    found = torch.stack([layer.deviation for layer in layers])
    for layer in layers:
        layer.deviation = None  # it holds a graph
    return found
