"""Losses whose gradient is known as soon as their value is: no graph, nothing of the size of the scores is kept."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        # scaled before it is rounded: upstream may carry the loss scale that keeps fp16 gradients representable
        given = [(g * upstream).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return None, None, *given


def known(value: Tensor, gradients: dict[Tensor, Tensor]) -> Tensor:
    """The scalar `value`; backward hands each tensor its gradient, times upstream, in the tensor's dtype."""
    tensors = [tensor for tensor in gradients if tensor.requires_grad]
    if not tensors or not torch.is_grad_enabled():
        return value
    return _Known.apply(value, [gradients[tensor] for tensor in tensors], *tensors)


def softmax_rows(scores: Tensor, out: Tensor) -> Tensor:
    """Softmax of the last axis into `out`; returns the log-sum-exp without a second exponential.

    The greatest probability is exp(max - lse), and it is at least 1 / row length: its logarithm loses nothing.
    """
    torch.softmax(scores, -1, out=out)
    return scores.amax(-1) - out.amax(-1).log_()
