"""Modelled FLOPs against the paper's table and against what torch counts; the gradual schedule against its paper."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny_families
import torch
from tiny_families import CONFIGS, LANGUAGE_MODELS
from torch.utils.flop_counter import FlopCounterMode

import growth
from distill import models
from distill.cost import forward, work
from growth import families
from growth.accounting import density, matched, work_of
from growth.anatomy import dissect
from growth.errors import UsageError, UserError
from growth.gradual import Gradual, average
from growth.masks import read

GPT = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257, "n_positions": 2048}
SMALL = {**GPT, "n_layer": 12, "n_embd": 768, "n_head": 12}
XL = {**GPT, "n_layer": 24, "n_embd": 2048, "n_head": 16}
LEFT_OUT = {  # weights: what stands in front of a masked head, ELECTRA's projection, routers and gates
    **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert"), 30 * 30),
    **{"electra": 2 * 26 * 30, "mixtral": 4 * 5 * 48, "qwen2_moe": 4 * (5 + 1) * 48},
}


def config(kind: str, **changes):
    told = tiny_families.config_of(kind, **changes).to_dict()
    return {**told, "architectures": [LANGUAGE_MODELS[kind]]}


@pytest.mark.parametrize(
    ("model", "published"), [(SMALL, (1.99e12, 1.47e12, 1.20e12)), (XL, (1.86e13, 1.12e13, 0.746e13))]
)
def test_the_published_flops_come_out_within_a_percent(model, published):
    """Thangarasa et al. 2023, Table 1: a sequence of 2048 tokens at 0, 50 and 75 %."""
    for share, flops in zip((1, 0.5, 0.25), published, strict=True):
        assert work_of(model).flops(2048, share).total == pytest.approx(flops, rel=0.01)


def test_the_published_split_comes_out():
    """13.3 % attention and 6.8 % vocabulary for XL; for Small the totals of the paper say 23.4 % and 23.9 %."""
    for model, split in ((XL, (0.133, 0.068)), (SMALL, (0.234, 0.239))):
        flops = work_of(model).flops(2048)
        assert (flops.attention / flops.total, flops.vocabulary / flops.total) == pytest.approx(split, abs=5e-4)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dense_forward_pass_is_a_third_of_it_as_torch_counts(kind):
    """What is left out is named: routers, gates of shared experts, the transformation in front of a masked head."""
    told, length = config(kind), 16
    model = getattr(__import__("transformers"), LANGUAGE_MODELS[kind])._from_config(
        tiny_families.config_of(kind), attn_implementation="eager"
    )
    model.config._experts_implementation = "eager"
    tokens = torch.arange(2, 2 + length)[None]
    inputs = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs)
    assert counter.get_total_flops() == work_of(told).forward(length).total + 2 * length * LEFT_OUT.get(kind, 0)
    if kind != "t5":  # which nothing here trains
        assert counter.get_total_flops() == forward(work(models.facts(model.config), head=True), ((1, length),))


@pytest.mark.parametrize("kind", ["gpt2", "qwen2_moe", "t5"])
def test_masks_lower_the_linear_part_alone_and_by_what_they_drop(tmp_path, kind):
    path = growth.sparsify(tiny_families.save(tmp_path / "dense", kind), tmp_path / "sparse", sparsity=0.6)
    checkpoint, work = growth.open(path), work_of(config(kind))
    share = density(checkpoint.config, read(path), dissect(checkpoint).prefix)
    assert share == pytest.approx(0.4, abs=1e-3)
    dense, sparse = work.flops(9), work.flops(9, share)
    assert (sparse.attention, sparse.vocabulary) == (dense.attention, dense.vocabulary)
    assert sparse.linear == pytest.approx(dense.linear * share)


def test_a_model_without_a_language_head_has_no_part_of_the_vocabulary():
    assert work_of({**config("bert"), "architectures": ["BertModel"]}).vocabulary == 0
    assert work_of(config("bert")).vocabulary == 53 * 30


# The small dense model of equal FLOPs


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("share", [0.75, 0.5, 0.25])
def test_the_small_dense_model_costs_the_same_and_is_a_model(kind, share):
    told = config(kind)
    small = matched(told, 32, share)
    assert work_of(small).flops(32).total == pytest.approx(work_of(told).flops(32, share).total, rel=0.01)
    before, after = (families.of(one).sizes_of(one) for one in (told, small))
    same = ("vocab", "layers", "head")
    assert all(before[axis] == after[axis] for axis in same) and after["embed"] <= before["embed"]
    with torch.device("meta"):
        getattr(__import__("transformers"), LANGUAGE_MODELS[kind])(tiny_families.config_of(kind, **sized(small, told)))


def sized(small, told):
    return {key: value for key, value in small.items() if value != told.get(key)}


def test_proportions_are_kept_where_sizes_allow():
    for share in (0.5, 0.25):
        small = matched(XL, 2048, share)
        assert 3.5 < small["n_inner"] / small["n_embd"] < 5 and small["n_inner"] % 8 == 0
    assert matched(XL, 2048, 1.0)["n_embd"] == 2048


def test_what_no_dense_model_can_cost_is_said():
    with pytest.raises(UserError, match="no dense GPT-2 of this depth is as small"):
        matched({**config("gpt2"), "vocab_size": 3, "n_head": 1}, 2, 1e-4)


# The gradual schedule


@pytest.mark.parametrize(
    ("sparsity", "steps", "start", "end", "mean"),
    [
        (0.2, 11200, 0.223, 0.721, 0.893),
        (0.4, 13050, 0.192, 0.681, 0.766),
        (0.6, 16375, 0.153, 0.619, 0.610),
        (0.8, 25050, 0.100, 0.501, 0.399),
    ],
)
def test_a_quarter_and_three_quarters_of_the_compute_in_closed_form(sparsity, steps, start, end, mean):
    made = Gradual(sparsity, steps)
    assert made.fractions == pytest.approx((start, end), abs=6e-4) and made.mean == pytest.approx(mean, abs=6e-4)
    assert made.average == pytest.approx(mean, abs=2e-3)
    assert (made.share(made.start), made.share(made.end)) == pytest.approx((0.25, 0.75), abs=0.006)


def test_the_schedule_of_the_released_model_comes_out():
    """tjingrant/sparsellm-1b-80p: pruned from step 2500 to 12600 of 25050, an average density of 0.3984."""
    made = Gradual(0.8, 25050)
    assert (made.start, made.end, made.steps) == (2500, 12600, 25050)
    assert made.average == pytest.approx(0.399, abs=5e-4)
    assert made.share(made.start) == pytest.approx(0.25, abs=5e-4) and made.share(made.end) == pytest.approx(
        0.75, abs=2e-3
    )


def test_every_prune_keeps_the_same_share_and_the_last_one_all_that_is_asked():
    made = Gradual(0.8, 2000, every=10)
    densities = [made.density(step) for step in range(made.steps)]
    ratios = {round(b / a, 12) for a, b in pairwise(densities)}
    assert densities[made.start - 1] == 1 and len(ratios) == 2 and max(ratios) == 1
    assert (
        densities[made.end] == pytest.approx(0.2)
        and densities[made.end - 1] > 0.2
        and densities[-1] == densities[made.end]
    )
    assert [step for step in range(1, made.steps) if densities[step] < densities[step - 1]] == list(made.prunes)
    assert made.average == pytest.approx(sum(densities) / made.steps)


def test_other_shares_of_compute_are_met_as_well():
    made = Gradual(0.9, 40_000, every=5, dense=0.1, pruned=0.4)
    assert (made.share(made.start), made.share(made.end)) == pytest.approx((0.1, 0.4), abs=1e-3)


def test_an_average_over_phases_weighs_them_by_their_steps():
    assert average([(30, 1.0), (10, 0.2)]) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"sparsity": 0}, "a share between 0 and 1"),
        ({"sparsity": 1}, "a share between 0 and 1"),
        ({"steps": 100}, "100 steps leave no time to prune every 100: at most every 20"),
        ({"dense": 0.8}, "pruning from 0.8 to 0.75"),
        ({"every": 0}, "prune every 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(asked, words):
    with pytest.raises(UsageError, match=words):
        Gradual(**{"sparsity": 0.8, "steps": 1000, **asked})
