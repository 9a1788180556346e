"""Dead weights stay dead: exactly, on every ZeRO stage, alone and with two ranks (tests/mask_cases.py)."""

from __future__ import annotations

import functools

import mask_cases
import pytest
import torch
from launch import launch
from mask_cases import BATCH, LR, OPTIM, SPOILT, STEPS, Net

CELLS = [(stage, ranks, precision) for ranks in (1, 2) for stage in range(4) for precision in ("fp32", "bf16")]
every_cell = pytest.mark.parametrize(("stage", "ranks", "precision"), CELLS)


@functools.cache
def launched(ranks: int) -> dict:
    return launch("mask_cases.py", ranks=ranks)[0]


def results(stage: int, ranks: int, precision: str) -> dict:
    return launched(ranks)[f"{stage} {precision}"]


@functools.cache
def plain() -> tuple[list[float], torch.Tensor]:
    """The same run written out in torch, each step one batch: norms of the live gradient, the weights at the end."""
    net = Net()
    named, masks = dict(net.named_parameters()), mask_cases.masks(net)
    dead = {name: ~mask for name, mask in masks.items()}
    groups = [{"params": p, "weight_decay": OPTIM["weight_decay"] if p.dim() > 1 else 0.0} for p in named.values()]
    optimizer, norms = torch.optim.AdamW(groups, lr=LR, betas=OPTIM["betas"], eps=OPTIM["eps"]), []
    _clear(named, dead, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        (net(*mask_cases.rows(step, 0, BATCH)) / BATCH).backward()
        whole = {name: named[name].grad.clone() for name in dead}
        whole[SPOILT].view(-1)[dead[SPOILT].flatten().nonzero()[0]] = torch.nan
        for name in dead:
            named[name].grad[dead[name]] = 0.0
        norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), OPTIM["clip"])))
        optimizer.step()
        new = mask_cases.changed(step, lambda: [(n, named[n].detach()) for n in dead], dead, lambda found=whole: found)
        dead.update({name: ~mask for name, mask in new.items()})
        _clear(named, dead, optimizer)
    return norms, torch.cat([p.detach().flatten() for p in named.values()])


def _clear(named: dict, dead: dict, optimizer) -> None:
    for name, where in dead.items():
        for tensor in (named[name].data, *optimizer.state[named[name]].values()):
            if tensor.dim():
                tensor[where] = 0.0


@every_cell
def test_what_is_dead_is_zero_in_weight_master_and_both_moments_after_every_step(stage, ranks, precision):
    assert results(stage, ranks, precision)["dead"] == 0


@every_cell
def test_what_is_alive_learns_and_a_gradient_of_nan_on_what_is_dead_harms_nobody(stage, ranks, precision):
    found = results(stage, ranks, precision)
    assert found["moved"] and all(torch.tensor(found["weights"]).isfinite())


@every_cell
def test_norms_clipping_and_weights_are_those_of_plain_torch(stage, ranks, precision):
    found, (norms, weights) = results(stage, ranks, precision), plain()
    near = 1e-6 if precision == "fp32" else 0.02
    assert found["norms"] == pytest.approx(norms, rel=near)
    if precision == "fp32":
        assert (torch.tensor(found["weights"]) - weights).abs().max() <= 1e-6


@every_cell
def test_a_stopped_run_goes_on_bit_for_bit_with_the_masks_it_had(stage, ranks, precision):
    assert results(stage, ranks, precision)["resumes"]


@every_cell
def test_one_weight_that_came_back_is_found_and_named(stage, ranks, precision):
    said = results(stage, ranks, precision)["guarded"]
    assert said.startswith("pairs.2.1.weight: 1 weights that its mask says are dead are not zero in the master;")
