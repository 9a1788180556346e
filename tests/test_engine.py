"""The engine keeps its promises on every ZeRO stage, alone and with two ranks: one launch each runs all the cases."""

from __future__ import annotations

import functools

import pytest
import torch
from engine_cases import BATCH, LR, OPTIM, flat, parts
from launch import launch

from distill.lesson import freeze_unreachable

CELLS = [(stage, ranks) for stage in range(4) for ranks in (1, 2)]
every_cell = pytest.mark.parametrize(("stage", "ranks"), CELLS)


@functools.cache
def results(stage: int, ranks: int) -> dict:
    return launch("engine_cases.py", stage, ranks=ranks)[0]


@functools.cache
def plain() -> tuple[torch.Tensor, torch.Tensor]:
    """Without an engine, each step one batch: the gradient of the first step, the weights after four."""
    lesson, targets, data = parts(BATCH)
    freeze_unreachable(lesson, targets, data)
    trained, gradients = {name: p for name, p in lesson.named_parameters() if p.requires_grad}, []
    groups = [{"params": p, "weight_decay": OPTIM["weight_decay"] if p.dim() > 1 else 0.0} for p in trained.values()]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=OPTIM["betas"], eps=OPTIM["eps"])
    for step in range(4):
        optimizer.zero_grad()
        loss(lesson, targets, *data(step)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.values()]))
        torch.nn.utils.clip_grad_norm_(trained.values(), OPTIM["clip"])
        optimizer.step()
    return gradients[0], flat(trained.items())


def loss(lesson, targets, batch) -> torch.Tensor:
    names = list(lesson.objectives)
    counts = {f"{n}.{k}": float(c) for n in names for k, c in lesson.objectives[n].count(batch).items()}
    return sum(value / counts[key] for key, value in lesson(batch, targets(batch, names), names).items())


@every_cell
def test_a_stopped_run_goes_on_bit_for_bit(stage, ranks):
    assert results(stage, ranks)["resumes"] == {"fp32": True, "bf16": True}


@every_cell
def test_the_gradient_is_that_of_plain_torch(stage, ranks):
    ours, theirs = torch.tensor(results(stage, ranks)["gradient"]), plain()[0]
    assert (ours - theirs).norm() / theirs.norm() <= 1e-6


@every_cell
def test_clipping_decay_and_adam_are_those_of_plain_torch(stage, ranks):
    ours, theirs = torch.tensor(results(stage, ranks)["weights"]), plain()[1]
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


@every_cell
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(stage, ranks):
    cuts = results(stage, ranks)["cuts"]
    assert len(cuts) == 3 and max(cuts.values()) <= 1e-6, cuts


@every_cell
def test_every_stage_and_number_of_ranks_gives_the_same_losses(stage, ranks):
    assert results(stage, ranks)["losses"] == pytest.approx(results(0, 1)["losses"], abs=1e-5)


@every_cell
def test_what_is_not_finite_changes_no_weight_and_is_said(stage, ranks):
    assert results(stage, ranks)["refuses"]
