"""The engine keeps its promises on every ZeRO stage, alone and with two ranks: one launch each runs all the cases."""

from __future__ import annotations

import functools

import pytest
import torch
from engine_cases import BATCH, parts
from launch import launch

from distill.train import freeze_unreachable

CELLS = [(stage, ranks) for stage in range(4) for ranks in (1, 2)]
every_cell = pytest.mark.parametrize(("stage", "ranks"), CELLS)


@functools.cache
def results(stage: int, ranks: int) -> dict:
    return launch("engine_cases.py", stage, ranks=ranks)[0]


@functools.cache
def plain_gradient() -> torch.Tensor:
    """The same step without an engine: one batch, one backward pass."""
    lesson, targets, data = parts(BATCH)
    freeze_unreachable(lesson, targets, data)
    (batch,), names = data(0), list(lesson.objectives)
    terms = lesson(batch, targets(batch, names), names)
    counts = {f"{n}.{k}": float(c) for n in names for k, c in lesson.objectives[n].count(batch).items()}
    sum(value / counts[key] for key, value in terms.items()).backward()
    return torch.cat([p.grad.flatten() for p in lesson.parameters() if p.requires_grad])


@every_cell
def test_a_stopped_run_goes_on_bit_for_bit(stage, ranks):
    assert results(stage, ranks)["resumes"] == {"fp32": True, "bf16": True}


@every_cell
def test_the_gradient_is_that_of_plain_torch(stage, ranks):
    ours, plain = torch.tensor(results(stage, ranks)["gradient"]), plain_gradient()
    assert (ours - plain).norm() / plain.norm() <= 1e-6


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
