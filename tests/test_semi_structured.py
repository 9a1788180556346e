"""Products that skip the zeros of 2:4 masks: what a dense layer with these masks computes, forward and backward.

Without a GPU the kernel is stood in for by `skipping`, which knows two weights of every four and no more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from mask_cases import skipping
from torch import nn
from torch.sparse import _semi_structured_conversions as cutlass
from transformers.pytorch_utils import Conv1D

import growth
from distill import models
from distill.cost import Cost
from distill.lesson import Lesson
from distill.objectives import OBJECTIVES
from distill.sparsity import semi_structured, stored
from distill.sparsity.semi_structured import SemiStructured
from distill.sparsity.student import Sparse
from distill.sparsity.values import Mask
from growth import masks
from growth.errors import UserError


def two_of_four(out: int, into: int) -> torch.Tensor:
    drawn = torch.rand(out, into // 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.zeros_like(drawn).bool().scatter_(-1, drawn.argsort(-1)[..., :2], True).flatten(-2)


def layer(kind: str, biased: bool = True) -> tuple[nn.Module, torch.Tensor]:
    """Of 12 -> 20 in float64, 2:4 along the 12, and its matrix [out, in]."""
    torch.manual_seed(1)
    made = nn.Linear(12, 20, bias=biased) if kind == "linear" else Conv1D(20, 12)
    W = torch.randn(20, 12) * two_of_four(20, 12)
    made.weight = nn.Parameter(W if kind == "linear" else W.T.contiguous())
    return made.double(), W.double()


@pytest.mark.parametrize(("kind", "biased"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_values_and_gradients_are_those_of_the_dense_layer(kind, biased):
    dense, _ = layer(kind, biased)
    sparse = SemiStructured(dense, skipping)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 20, dtype=torch.float64)
    assert [name for name, _ in sparse.named_parameters()] == [name for name, _ in dense.named_parameters()]
    found, wanted = (torch.autograd.grad(m(x), [x, *dense.parameters()], upstream) for m in (sparse, dense))
    assert torch.allclose(sparse(x), dense(x), atol=1e-12, rtol=0)
    assert all(torch.allclose(f, w, atol=1e-12, rtol=0) for f, w in zip(found, wanted, strict=True))
    frozen = SemiStructured(dense.requires_grad_(False), skipping)
    assert torch.equal(torch.autograd.grad(frozen(x), x, upstream)[0], found[0])


def test_a_third_weight_of_four_would_be_lost_and_masks_keep_it_from_being_there():
    _, W = layer("linear")
    x = torch.randn(7, 12, dtype=torch.float64)
    assert torch.equal(skipping(x, W, None), x @ W.T)
    assert not torch.allclose(skipping(x, W + 1.0, None), x @ (W + 1.0).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_masks_leave_is_what_torch_s_format_holds(dtype):
    """Its conversion to the layout of CUTLASS runs on a CPU too."""
    W = torch.randn(64, 128).to(dtype) * two_of_four(64, 128)
    assert torch.equal(cutlass.sparse_semi_structured_to_dense_cutlass(
        *cutlass.sparse_semi_structured_from_dense_cutlass(W)), W)  # fmt: skip


# A student


def sparse_student(tmp_path, family):
    """A checkpoint whose matrices are 2:4."""
    source = tiny.save(tiny.model(family, head="causal"), tmp_path / "m")
    return growth.sparsify(source, tmp_path / "sparse", pattern="2:4")


def taught(start, **keys) -> tuple[Sparse, dict]:
    """A student with its masks, and what one loss and its gradients are."""
    lesson = Lesson(models.load(start, "causal").double(), {"ce": OBJECTIVES["ce"](objective="causal")})
    sparse = Sparse([Mask(**keys)], lesson, start, 0, skipping)
    loss = lesson(tiny.batch([[9], [7]], 9), {}, lesson.objectives)["ce.causal"]
    loss.backward()
    return sparse, {"loss": loss.detach()} | {name: p.grad for name, p in lesson.named_parameters()}


def test_a_student_learns_as_with_dense_products_and_is_exported_by_the_same_names(tmp_path, monkeypatch):
    monkeypatch.setattr(semi_structured, "multiples", lambda: (4, 4))  # of what `skipping` takes
    start = sparse_student(tmp_path, "gpt2")
    (dense, wanted), (sparse, found) = taught(start), taught(start, execute="2:4")
    assert list(found) == list(wanted)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-9, rtol=0) for name in wanted)
    placed = [m for m in sparse.student.modules() if isinstance(m, SemiStructured)]
    assert len(placed) == len(masks.read(start))
    whole = Cost(models.facts(start), True, {}, frozenset(), texts=((2, 9),))
    halved = replace(whole, halved=stored.masked(start))
    forward = 2 * 18 * sum(mask.size for mask in masks.read(start).values())
    assert whole.step() - halved.step() == forward // 2  # what is executed; what is modelled stays
    told = [one.summary([one.told(cost)])["sparsity"] for one, cost in ((dense, whole), (sparse, halved))]
    assert [found.pop("executed_sparse") for found in told] == [False, "2:4"] and told[0] == told[1]


@pytest.mark.parametrize(
    ("family", "multiples", "words"),
    [
        ("gpt2", (16, 64), "attn.c_attn.weight is 144 x 48, and the kernels take multiples of 16 x 64 alone"),
        ("mixtral", (4, 4), r"experts.*is no matrix alone \(experts are stacked\); `scope: \[attention\]`"),
    ],
)
def test_matrices_that_no_kernel_takes_are_refused_by_name(tmp_path, monkeypatch, family, multiples, words):
    monkeypatch.setattr(semi_structured, "multiples", lambda: multiples)
    with pytest.raises(UserError, match=words):
        taught(sparse_student(tmp_path, family), execute="2:4")


def test_torch_says_what_its_kernels_take():
    assert semi_structured.multiples() in [(16, 16), (32, 64)]


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [256, 100])  # 100: padded by torch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_computes_what_the_dense_product_does(rows, dtype):
    assert not list(semi_structured.of_machine(torch.device("cuda")))
    g = torch.Generator().manual_seed(0)
    W, x, bias = (torch.randn(shape, generator=g).to(dtype) for shape in ((128, 256), (rows, 256), (128,)))
    dense = nn.Linear(256, 128).to("cuda", dtype)
    dense.weight, dense.bias = (nn.Parameter(t.cuda()) for t in (W * two_of_four(128, 256), bias))
    x, sparse = x.cuda().requires_grad_(), SemiStructured(dense, semi_structured.on_gpu)
    asked, upstream = [x, *dense.parameters()], torch.randn(rows, 128, generator=g).cuda().to(dtype)
    found, wanted = ([m(x), *torch.autograd.grad(m(x), asked, upstream)] for m in (sparse, dense))
    assert all(torch.allclose(f, w, rtol=0.02, atol=0.02 * w.abs().max()) for f, w in zip(found, wanted, strict=True))
