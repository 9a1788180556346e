"""The engine keeps its promises on every ZeRO stage, alone and with two ranks: one launch each runs all the cases."""

from __future__ import annotations

import functools

import hook_cases
import pytest
import tiny
import torch
from engine_cases import BATCH, LR, OPTIM, Rows, flat, parts
from launch import launch

from distill import hooks
from distill.corpus import unpack
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
    active = lesson.objectives
    counts = {f"{name}.{k}": float(n) for name, o in active.items() for k, n in o.count(batch).items()}
    return sum(value / counts[key] for key, value in lesson(batch, targets(batch, active), active).items())


@every_cell
def test_a_stopped_run_goes_on_bit_for_bit(stage, ranks):
    assert results(stage, ranks)["resumes"] == {"fp32": True, "bf16": True}


@every_cell
def test_a_teacher_in_shares_teaches_what_the_whole_one_teaches(stage, ranks):
    """Loss and gradient, from taps and from its head."""
    assert max(max(gaps) for gaps in results(stage, ranks)["placements"].values()) <= 1e-6


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


# Sub-models and held-out curves (tests/hook_cases.py)


@functools.cache
def plain_submodels() -> tuple[list[float], dict]:
    """The loop of bert2BERT written out: (gradient norms, weights); what is not updated has no gradient in torch."""
    model = tiny.model("bert", head="mlm", seed=1).double()
    layers, named = model.bert.encoder.layer, dict(model.named_parameters())
    groups = [{"params": p, "weight_decay": OPTIM["weight_decay"] if p.dim() > 1 else 0.0} for p in named.values()]
    optimizer, norms = torch.optim.AdamW(groups, lr=LR, betas=OPTIM["betas"], eps=OPTIM["eps"]), []
    for step in range(hook_cases.STEPS):
        part = hooks.drawn(hook_cases.PARTS, hook_cases.SEED, step)
        batch = unpack(Rows().at(range(3 + step * BATCH, 3 + (step + 1) * BATCH)))
        mask = (batch["segment_ids"] > 0)[:, None, None, :].expand(-1, 1, batch["segment_ids"].shape[1], -1)
        with torch.no_grad():
            x = model.bert.embeddings(input_ids=batch["input_ids"])
            for layer in layers[: part.first]:
                x = layer(x, mask)
        for layer in layers[part.first : part.depth]:
            x = layer(x, mask)
        scored = batch["labels"] != -100
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.cls(x)[scored], batch["labels"][scored]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), OPTIM["clip"])))
        optimizer.step()
    return norms, named


@every_cell
def test_a_submodel_learns_as_in_a_loop_of_plain_torch(stage, ranks):
    ours, (norms, named) = results(stage, ranks)["hooks"]["submodels"], plain_submodels()
    assert ours["norms"] == pytest.approx(norms, rel=1e-5)
    trained = {name: torch.tensor(values).double() for name, values in ours["weights"].items()}
    found, wanted = flat(trained.items()), flat((name, named[name]) for name in trained)
    assert (found - wanted).norm() / wanted.norm() <= 1e-4  # Adam makes full steps of gradients that are rounding
    start = dict(tiny.model("bert", head="mlm", seed=1).named_parameters())
    assert set(named) - set(trained) == set(ours["frozen"]) and len(ours["frozen"]) == 4
    assert all(torch.equal(named[name].float(), start[name]) for name in ours["frozen"])


@every_cell
def test_what_sits_a_step_out_stays_as_it_is_to_the_bit_and_its_moments_too(stage, ranks):
    ours = results(stage, ranks)["hooks"]["submodels"]
    assert ours["kept"] and ours["moved"]


@every_cell
def test_a_stopped_run_of_submodels_goes_on_bit_for_bit(stage, ranks):
    assert results(stage, ranks)["hooks"]["resumes"]


@every_cell
def test_a_held_out_curve_changes_no_bit_of_training_and_is_the_same_everywhere(stage, ranks):
    curve = results(stage, ranks)["hooks"]["curve"]
    assert curve["same"]
    lesson, batch = hook_cases.lesson(), hook_cases.Short().at(range(hook_cases.HELD))
    lesson.student.eval()
    assert curve["losses"][0] == pytest.approx(loss(lesson, lambda *_: {}, batch).item(), rel=1e-6)
    assert curve["losses"] == pytest.approx(results(0, ranks)["hooks"]["curve"]["losses"], rel=1e-5)
