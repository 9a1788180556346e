"""Activation checkpointing: the same gradients to the bit, whatever else is done to a student, for less memory.

On ZeRO 0 to 3 and with two ranks: tests/engine_cases.py, and tests/taps_zero3.py where parameters are let go of.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from test_rankers import KINDS, PAIRS, draw, ranker_of
from torch.autograd.graph import saved_tensors_hooks

from distill import taps
from distill.forwards import recomputed
from distill.hooks import Part
from distill.lesson import Lesson
from distill.lowrank import students
from distill.lowrank.spec import LowRankSpec
from distill.objectives import OBJECTIVES
from distill.taps import ROLES, Tap, trace
from growth.errors import UserError

EVERY = [Tap(role, layer) for role in ROLES for layer in (0, 2, -1)]


def blocks(model):
    return [block for block, _ in taps.layers(model.base_model)]


def gradients(model, loss):
    """(loss, gradient by name) of `loss(model)`, with the same dropout every time."""
    torch.manual_seed(0)
    model.zero_grad()
    value = loss()
    value.backward()
    return value.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    return (one[0], one[1].keys()) == (other[0], other[1].keys()) and all(
        torch.equal(gradient, other[1][name]) for name, gradient in one[1].items()
    )


def tapped(model, batch):
    return sum(value.square().mean() for value in trace(model, batch, EVERY).taps.values())


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("family", tiny.EVERY)
def test_no_bit_of_a_gradient_changes_with_taps_and_packed_rows(family, dropout):
    model = tiny.model(family).train(dropout)
    batch = tiny.batch([[5, 1, 4], [9]], 11)
    kept = gradients(model, lambda: tapped(model, batch))
    with recomputed(blocks(model)):
        again = gradients(model, lambda: tapped(model, batch))
    assert same(kept, again) and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rankers_have_the_same_gradients(kind):
    ranker, sides = ranker_of(kind), draw()
    kept = gradients(ranker, lambda: ranker(*sides, PAIRS).square().sum())
    with recomputed(blocks(ranker)):
        assert same(kept, gradients(ranker, lambda: ranker(*sides, PAIRS).square().sum()))


@pytest.mark.parametrize("factors", [False, True], ids=["matrices", "factors"])
def test_submodels_and_factors_have_the_same_gradients(factors):
    student = tiny.model("bert", "mlm").train()
    if factors:
        spec = LowRankSpec(rank=4, density=0.03, alpha=8)
        for weight, f in students.factors_of(student, spec, 0, random=True).items():
            students.hold(student, weight.removesuffix(".weight"), f)
    active, batch = {"ce": OBJECTIVES["ce"](objective="mlm")}, tiny.batch([[5, 1, 4], [9]], 11)
    kept, again = (
        gradients(student, lambda lesson=lesson: lesson(batch, {}, active, Part(depth=3, first=1))["ce.mlm"])
        for lesson in (Lesson(student, active), Lesson(student, active, checkpointing=True))
    )
    assert same(kept, again)


def kept_bytes(model, checkpointing):
    """What autograd holds on to between the passes, the inside of recomputed blocks left out."""
    held = {}

    def hold(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(hold, lambda tensor: tensor), recomputed(blocks(model) if checkpointing else ()):
        loss = tapped(model, tiny.batch([[60]] * 3, 60))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert loss.requires_grad
    return sum(size for place, size in held.items() if place not in own)


def test_what_happens_inside_a_block_is_not_kept():
    model = tiny.model("bert", num_hidden_layers=8)
    assert kept_bytes(model, True) < 0.4 * kept_bytes(model, False)


def test_a_block_that_would_fill_a_cache_twice_is_refused():
    model = tiny.model("llama")
    with pytest.raises(UserError, match="set use_cache=False"), recomputed(blocks(model)):
        model(input_ids=torch.tensor([[5, 6, 7]]))
