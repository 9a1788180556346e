"""Products with matrices of which two in every four weights along the sum are zero, by kernels that skip the zeros.

GPUs of compute capability 8.0 and later have such kernels. Forward products alone are sparse: the gradient of the input
sums over the other dimension, along which these masks have no pattern, and that of the weight multiplies two dense
matrices. The weight is compressed in every forward pass, since every step moves it.

Untested on a GPU so far: what runs there is torch's prototype (`torch.sparse.SparseSemiStructuredTensor`), which
tests/test_semi_structured.py compares with the dense product where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from growth.errors import UserError

PATTERN = "2:4"
Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [N, in], W [out, in], bias [out] -> [N, out]


class _Product(torch.autograd.Function):
    """x W^T + bias by a product that may skip zeros; W is the parameter as it is stored, so that ZeRO 3 finds it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool, product: Product):
        ctx.save_for_backward(x, weight)
        ctx.turned = turned
        return product(x.flatten(0, -2), _turned(weight, turned), bias).unflatten(0, x.shape[:-1])  # [..., out]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        wants, flat = ctx.needs_input_grad, dy.flatten(0, -2)  # [N, out]
        dx = dy @ _turned(weight, ctx.turned) if wants[0] else None
        dW = _turned(flat.T @ x.flatten(0, -2), ctx.turned) if wants[1] else None
        return dx, dW, flat.sum(0) if wants[2] else None, None, None


def _turned(W: Tensor, turned: bool) -> Tensor:
    return W.T if turned else W


class SemiStructured(nn.Module):
    """In the place of a Linear or a Conv1D, with its parameters by their names."""

    def __init__(self, layer: nn.Linear | Conv1D, product: Product):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.turned, self.product = isinstance(layer, Conv1D), product

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, self.turned, self.product)


def place(module: nn.Module, weights: Iterable[str], product: Product) -> None:
    """Let the layers of these weights multiply so, by `product`."""
    for weight in weights:
        name, _, own = weight.removesuffix(".weight").rpartition(".")
        parent = module.get_submodule(name)
        setattr(parent, own, SemiStructured(getattr(parent, own), product))


# By torch, on a GPU


def on_gpu(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")  # a prototype
        return nn.functional.linear(x, _kind().from_dense(W.contiguous()), bias)


def _kind():
    """How torch compresses, and by which library it multiplies."""
    own = torch.sparse.SparseSemiStructuredTensorCUSPARSELT, torch.sparse.SparseSemiStructuredTensorCUTLASS
    return own[0] if torch.backends.cusparselt.is_available() else own[1]


# What cannot be


def of_machine(device: torch.device) -> Iterator[str]:
    """Why this machine cannot."""
    if device.type != "cuda":
        yield "kernels for 2:4 are those of GPUs from compute capability 8.0 on, and here is none; `dense` runs"
    elif (found := torch.cuda.get_device_capability(device)) < (8, 0):
        yield f"this GPU has compute capability {found[0]}.{found[1]}, and kernels for 2:4 need 8.0; `dense` runs"


def refuse_misfits(module: nn.Module, weights: Iterable[str]) -> None:
    """Weights that no such product can be of, by their shapes."""
    rows, columns = multiples()
    for name in weights:
        layer = module.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear | Conv1D):
            raise UserError(f"execute 2:4: {name} is no matrix alone (experts are stacked); `scope: [attention]`")
        out, into = _turned(layer.weight, isinstance(layer, Conv1D)).shape
        if out % rows or into % columns:
            raise UserError(
                f"execute 2:4: {name} is {out} x {into}, and the kernels take multiples of {rows} x {columns} alone; "
                "`dense` runs"
            )


def multiples() -> tuple[int, int]:
    """Of what the sizes of a matrix [out, in] must be multiples, in 16 bits."""
    limits = _kind()._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]  # float16 has the same
    return limits.sparse_min_rows, limits.sparse_min_cols
