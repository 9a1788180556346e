"""Dead weights stay dead: exactly, on every ZeRO stage, alone and with two ranks (tests/mask_cases.py)."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import mask_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import launch
from mask_cases import BATCH, LR, OPTIM, SPOILT, STEPS, Changes, Net

from distill import sources
from distill.kinds import OptimSpec
from distill.language import Language
from distill.schedules import Progress
from distill.sparsity.choosing import Groups, largest, rewired
from distill.sparsity.optimizers import KEEP_ZEROS, of_engine, why_not
from distill.sparsity.rules import Rewire
from distill.sparsity.values import Sparsify
from growth.bits import FILE, Mask, write_masks
from growth.gradual import Gradual

pytestmark = pytest.mark.timeout(900)  # two launches run all the cells, on machines that do other things too
CELLS = [(stage, ranks, precision) for ranks in (1, 2) for stage in range(4) for precision in ("fp32", "bf16")]
both = pytest.mark.parametrize("ranks", [1, 2])
every_cell = pytest.mark.parametrize(("stage", "ranks", "precision"), CELLS)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """What all cells of a number of ranks have found; two ranks also resume what one has saved."""
    place, found = tmp_path_factory.mktemp("cells"), {}

    def of(ranks: int) -> dict:
        for each in range(1, ranks + 1):
            if each not in found:
                found[each] = launch("mask_cases.py", place, ranks=each, timeout=900)[0]
        return found[ranks]

    return of


@pytest.fixture(scope="module")
def results(launched):
    return lambda stage, ranks, precision: launched(ranks)[f"{stage} {precision}"]


@functools.cache
def plain() -> tuple[list[float], torch.Tensor]:
    """The same run written out in torch, each step one batch: norms of the live gradient, the weights at the end."""
    net = Net()
    named, masks = dict(net.named_parameters()), mask_cases.masks(net)
    dead, rule = {name: ~mask for name, mask in masks.items()}, Changes()
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
        done, weights = Progress(step + 1), [(name, named[name].detach()) for name in dead]
        if rule.due(done):
            new = rule.changed(done, lambda found=weights: found, dead, lambda found=whole: found)
            dead.update({name: ~mask for name, mask in new.items()})
        _clear(named, dead, optimizer)
    return norms, torch.cat([p.detach().flatten() for p in named.values()])


def _clear(named: dict, dead: dict, optimizer) -> None:
    for name, where in dead.items():
        for tensor in (named[name].data, *optimizer.state[named[name]].values()):
            if tensor.dim():
                tensor[where] = 0.0


@every_cell
def test_what_is_dead_is_zero_in_weight_master_and_both_moments_after_every_step(results, stage, ranks, precision):
    assert results(stage, ranks, precision)["dead"] == 0


@every_cell
def test_what_is_alive_learns_and_a_gradient_of_nan_on_what_is_dead_harms_nobody(results, stage, ranks, precision):
    found = results(stage, ranks, precision)
    assert found["moved"] and all(torch.tensor(found["weights"]).isfinite())


@every_cell
def test_norms_clipping_and_weights_are_those_of_plain_torch(results, stage, ranks, precision):
    found, (norms, weights) = results(stage, ranks, precision), plain()
    near = 1e-6 if precision == "fp32" else 0.02
    assert found["norms"] == pytest.approx(norms, rel=near)
    if precision == "fp32":
        assert (torch.tensor(found["weights"]) - weights).abs().max() <= 1e-6


@pytest.mark.parametrize(("stage", "precision"), mask_cases.RESUMED)
@both
def test_a_stopped_run_goes_on_bit_for_bit_with_the_masks_it_had(results, stage, ranks, precision):
    assert results(stage, ranks, precision)["resumes"] == {"whole": True, "far": 0.0}


@pytest.mark.parametrize("stage", range(4))
@both
def test_it_goes_on_under_another_stage_and_number_of_ranks_with_all_it_had(results, stage, ranks):
    """From the next stage on one rank; benchmarks/resume_matrix.py has all pairs."""
    found = results(stage, ranks, "fp32")["crosses"]
    assert found["whole"] and found["far"] <= 1e-6


@pytest.mark.parametrize("stage", range(4))
@both
def test_one_weight_that_came_back_is_found_and_named(results, stage, ranks):
    said = results(stage, ranks, "bf16")["guarded"]
    assert said.startswith("pairs.2.1.weight: 1 weights that its mask says are dead are not zero in the master;")


@both
def test_products_that_skip_dead_weights_train_as_dense_ones_do_where_matrices_are_gathered(launched, ranks):
    dense, sparse = (torch.tensor(launched(ranks)[key]) for key in ("dense", "skipping"))
    assert dense.abs().max() > 0.1 and (sparse - dense).abs().max() <= 1e-6


# Which weights live


def sorted_out(weights: dict, dead: dict, keep: int) -> torch.Tensor:
    """The largest live ones of all in one line, the first of equal ones."""
    live = torch.cat([~dead[name].flatten() for name in weights])
    sizes = torch.cat([w.abs().flatten() for w in weights.values()]).where(live, -1.0)
    mask = torch.zeros_like(live)
    mask[sizes.argsort(stable=True, descending=True)[:keep]] = True
    return mask & live


@given(st.integers(0, 2**31), st.integers(1, 60))
@settings(deadline=None, max_examples=60)
def test_the_threshold_over_all_tensors_is_exact_with_ties_and_zeros_of_any_size(seed, keep):
    g = torch.Generator().manual_seed(seed)
    weights = {
        n: torch.randn(m, 7, generator=g) * 10.0 ** (seed % 7 * m - 20) for n, m in (("a", 5), ("b", 1), ("c", 2))
    }
    weights["a"][torch.rand(5, 7, generator=g) < 0.3] = 0.0
    weights["c"] = weights["c"].sign() * weights["a"].abs().median()
    dead = {n: torch.rand(w.shape, generator=g) < 0.3 for n, w in weights.items()}
    found = largest(weights.items, dead, keep)
    assert torch.equal(torch.cat([found[n].flatten() for n in weights]), sorted_out(weights, dead, keep))


def test_rewiring_moves_the_smallest_to_the_best_scores_and_what_is_not_a_number_comes_last():
    weight = torch.tensor([[3.0, -0.1, 2.0, 0.0], [0.2, 0.0, -4.0, 0.0]])
    dead = torch.tensor([[False, False, False, True], [False, True, False, True]])
    scores = torch.tensor([[9.0, 0.5, 9.0, torch.nan], [0.1, 0.3, 9.0, torch.inf]])
    moved = rewired(weight, dead, scores, 0.4)  # 2 of 5: -0.1 and 0.2 die, -0.1 has the best score and stays, then 0.3
    assert moved.tolist() == [[True, True, True, False], [False, True, True, False]]
    assert torch.equal(rewired(weight, dead, scores, 0.1), ~dead)


@pytest.mark.parametrize(("dim", "shape"), [(-1, (6, 8)), (-2, (8, 6))])
def test_rewiring_keeps_a_pattern_along_what_is_summed_over(dim, shape):
    g, groups = torch.Generator().manual_seed(0), Groups(dim, 4)
    two = torch.zeros(12, 4, dtype=torch.bool).scatter_(1, torch.rand(12, 4, generator=g).argsort(1)[:, :2], True)
    mask = groups.back(two, torch.empty(shape))
    assert torch.equal(groups.rows(mask), two) and mask.shape == shape
    weight = torch.randn(shape, generator=g) * mask
    new = rewired(weight, ~mask, torch.rand(shape, generator=g), 0.3, groups)
    assert set(groups.rows(new).sum(1).tolist()) == {2} and 0 < int((new & ~mask).sum()) <= int(0.3 * 24)


def test_other_masks_of_the_same_weights_are_another_model_and_another_training(tmp_path):
    alive, found = torch.arange(8) < 4, []
    for name, bools in (("one", alive), ("again", alive), ("other", ~alive)):
        (tmp_path / name).mkdir()
        for file in ("model-1-of-1.safetensors", "config.json"):
            (tmp_path / name / file).write_bytes(b"{}")
        write_masks(tmp_path / name / FILE, {"w": Mask.of(bools)})
        trained = SimpleNamespace(lowrank=None, start=tmp_path / name, manifest={"tokenizer_digest": "t"})
        trained.corpus = trained.spec = trained.student = trained
        found.append((sources.identity(tmp_path / name), Language.belongs(trained)["masks"]))
    assert found[0] == found[1] and all(a != b for a, b in zip(found[0], found[2], strict=True))
    assert len({sources.weights_sha256(tmp_path / name) for name in ("one", "again", "other")}) == 1


# Optimizers


def spun(kind: type, **settings) -> int:
    """Dead weights that are not zero after ten steps of an optimizer."""
    net, g = torch.nn.Linear(7, 9, bias=False), torch.Generator().manual_seed(0)
    dead = torch.rand(9, 7, generator=g) < 0.75
    with torch.no_grad():
        net.weight.masked_fill_(dead, 0.0)
    optimizer = kind(net.parameters(), lr=0.01, **settings)
    for _ in range(10):
        net.weight.grad = torch.randn(9, 7, generator=g).masked_fill_(dead, 0.0)
        optimizer.step()
    return int(net.weight.detach()[dead].count_nonzero())


@pytest.mark.parametrize("name", sorted(KEEP_ZEROS))
def test_an_optimizer_that_is_allowed_keeps_zeros(name):
    asked = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}.get(name, {})
    decays = {} if name == "Rprop" else {"weight_decay": 0.1}
    assert spun(getattr(torch.optim, name), **asked, **decays) == 0 and why_not(name) is None


@pytest.mark.parametrize("name", ["muon", "Shampoo", "soap", "galore_adamw", "lion", "OneBitAdam", "1-bit adam"])
def test_a_recipe_that_asks_for_one_that_revives_dead_weights_is_told_so(name):
    with pytest.raises(ValueError, match=f"'{name}' is not one of adamw, and masks could not be kept with it: "):
        OptimSpec(name=name, batch=4)


def test_muon_and_what_is_not_known_are_refused_with_the_reason():
    assert spun(torch.optim.Muon) > 0
    assert "with Muon: its update is an orthogonalised matrix" in why_not("Muon")
    assert "whether zeros stay zero is not known of it; adamw can" in why_not("Lamb")
    told = {"optimizer": {"type": "OneBitAdam"}, "zero_optimization": {"zero_quantized_gradients": True}}
    assert [line.split(":")[0] for line in of_engine(told)] == [
        "engine.deepspeed.optimizer",
        "engine.deepspeed.zero_optimization.zero_quantized_gradients",
    ]


# When they change


def test_gradual_pruning_is_that_of_the_closed_form_and_a_schedule_written_out_ends_where_it_says():
    hook, plan = Sparsify(sparsity=0.8), Gradual(0.8, 25050)
    fallen = {step: d for step in range(25051) if (d := hook.falls(Progress(step, 25050))) is not None}
    assert list(fallen) == list(plan.prunes) and min(fallen) == 2500 and max(fallen) == 12600
    assert fallen[12600] == pytest.approx(0.2) and fallen[2500] == pytest.approx(0.2 ** (1 / 102))
    own = Sparsify(density={"unit": "fraction", "points": [[0, 1.0], [1, 0.25]], "shape": "geometric"}, every=4)
    fallen = {step: d for step in range(11) if (d := own.falls(Progress(step, 10))) is not None}
    assert list(fallen) == [0, 4, 8, 10] and fallen[10] == 0.25 and fallen[4] == pytest.approx(0.25**0.4)


def test_rewiring_slows_down_on_a_cosine_and_ends_after_three_quarters():
    hook = Sparsify(how="rigl", every=10)
    moved = {step: share for step in range(101) if (share := hook.moves(Progress(step, 100)))}
    assert list(moved) == [10, 20, 30, 40, 50, 60, 70]
    assert moved[30] == pytest.approx(0.15 * (1 + math.cos(math.pi * 30 / 75)))
    assert [step for step in range(100) if Rewire(hook, 0, {}).listens(Progress(step, 100))] == [s - 1 for s in moved]
    assert not Rewire(Sparsify(how="set", every=10), 0, {}).listens(Progress(9, 100))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "exactly one of sparsity, density is needed, found none"),
        ({"sparsity": 0.5, "density": 0.5}, "found sparsity and density"),
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": 0.5, "how": "rigl"}, "sparsity: rigl moves weights and keeps their number"),
        ({"density": 0.0}, "density: a share above 0"),
        ({"how": "set", "drop": 1.0}, "drop: a share from 0"),
        (
            {"how": "set", "drop": {"unit": "tokens", "points": [[0, 0.3], [9, 0.0]]}},
            "drop: in steps or fraction, not in",
        ),
    ],
)
def test_a_change_that_cannot_be_meant_is_refused(keys, words):
    with pytest.raises(ValueError, match=words):
        Sparsify(**keys)
