"""What changes during training, what it costs, where its rows come from; the engine's side is in test_engine.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill import extent, hooks, models, recipe
from distill.cost import Cost
from distill.hooks import Freeze, Part, Submodel
from distill.lesson import Data, Lesson, freeze_unreachable
from distill.objectives import OBJECTIVES
from distill.taps import trace
from distill.teachers.targets import Online, Targets
from growth.errors import UsageError, UserError

HEADED = pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if tiny.head(family)])


def logits(model, part=None) -> torch.Tensor:
    """Of every place of two rows of one document each: every family takes those."""
    with hooks.taking_part(model, part):
        return trace(model, tiny.batch([[9], [7]], 9), (), torch.arange(16)).logits


# Sub-models


@HEADED
def test_a_part_of_a_student_is_the_shallower_model(family):
    whole, depth = tiny.model(family, head=tiny.head(family)), 3
    shallow = tiny.model(family, head=tiny.head(family), **{_layers_key(family): depth})
    shallow.load_state_dict({name: whole.state_dict()[name] for name in shallow.state_dict()})
    before = logits(whole)
    assert torch.equal(logits(whole, Part(depth)), logits(shallow))
    assert torch.equal(logits(whole), before) and not torch.equal(logits(shallow), before)


def _layers_key(family: str) -> str:
    return {"gpt2": "n_layer", "distilbert": "n_layers"}.get(family, "num_hidden_layers")


@HEADED
def test_gradients_reach_the_top_blocks_that_ran_and_what_is_behind_them(family):
    model, part = tiny.model(family, head=tiny.head(family)), Part(3, 1)
    logits(model, part).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    when = hooks.updated_in(model, [part])
    assert len({name for name in when if when[name]}) and {name for name in when if when[name]} == reached & when.keys()
    head = model.get_output_embeddings().weight
    tables = [
        m.weight for m in model.base_model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is not head
    ]
    assert head.grad is not None and all(table.grad is None for table in tables)


def test_the_depth_of_a_step_is_a_function_of_seed_and_step_and_all_come_as_often():
    parts = Submodel(depths=[2, 3, 4], train_top=2).parts()
    assert parts == (Part(2, 0), Part(3, 1), Part(4, 2))
    draws = [hooks.drawn(parts, 7, step) for step in range(600)]
    assert [hooks.drawn(parts, 7, step) for step in reversed(range(600))] == draws[::-1]
    assert draws != [hooks.drawn(parts, 8, step) for step in range(600)]
    assert all(150 < n < 250 for n in Counter(draws).values())
    block = frozenset(parts[1:])
    assert hooks.updates(parts, 7, 100, block) == sum(draw in block for draw in draws[:100])
    assert hooks.updates(parts, 7, 100, None) == 100 and hooks.drawn((), 7, 3) is None


def test_a_submodel_that_cannot_be_is_refused_before_weights_are_loaded():
    student = models.facts(tiny.config("bert"))
    ce = OBJECTIVES["ce"]()
    relation = OBJECTIVES["relation_kl"](target="t", heads=6)
    assert not Submodel(depths=[2, 4], train_top=2).check(student, [ce])
    assert "depth 5, but the student has 4 blocks" in Submodel(depths=[2, 5], train_top=2).check(student, [ce])[0]
    assert "a tapped layer may not run" in Submodel(depths=[2], train_top=2).check(student, [ce, relation])[0]
    with pytest.raises(ValueError, match="depths must grow, from train_top=3 or more"):
        Submodel(depths=[2, 4], train_top=3)


# Freezing


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_what_a_growth_made_is_trained(tmp_path):
    model = tiny.model("bert", head="mlm")
    (tmp_path / "growth.json").write_text(json.dumps({"new": {"layers": [1, 3]}}))
    Freeze(train="new").prepare(model, tmp_path)
    assert trained(model) == {n for n, _ in model.named_parameters() if ".layer.1." in n or ".layer.3." in n}


def test_without_a_lineage_nobody_knows_what_is_new(tmp_path):
    with pytest.raises(UserError, match=r"has no growth.json; only what a growth made"):
        Freeze(train="new").prepare(tiny.model("bert"), tmp_path)
    (tmp_path / "growth.json").write_text(json.dumps({"new": {"embed": [48, 49], "layers": []}}))
    with pytest.raises(UserError, match=r"tells of no new layers; what grew is embed"):
        Freeze(train="new").prepare(tiny.model("bert"), tmp_path)


def test_named_layers_and_tables_are_frozen(tmp_path):
    model = tiny.model("bert", head="mlm")
    Freeze(layers=[0, 2], embeddings=True).prepare(model, tmp_path)
    frozen = {n for n, _ in model.named_parameters()} - trained(model)
    tables = {f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    assert frozen == {n for n, _ in model.named_parameters() if ".layer.0." in n or ".layer.2." in n} | tables
    assert Freeze(layers=[4]).check(models.facts(tiny.config("bert")), []) == ["no layer 4: the student has 0 to 3"]


class Fixed:
    device = torch.device("cpu")

    def smallest(self):
        return tiny.batch([[9]], 9)


def test_when_nothing_trained_reaches_a_loss_it_is_said(tmp_path):
    lesson = Lesson(tiny.model("bert"), {"kl": OBJECTIVES["relation_kl"](target="t", heads=6, student_layer=1)})
    (tmp_path / "growth.json").write_text(json.dumps({"new": {"layers": [3]}}))
    Freeze(train="new").prepare(lesson.student, tmp_path)
    targets = Targets({"t": Online(models.freeze(tiny.model("bert", seed=1)))}, lesson.objectives)
    with pytest.raises(UserError, match="the hooks freeze too much"):
        freeze_unreachable(lesson, targets, Fixed())


# What it costs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_a_table_counts_where_it_multiplies(family, tied):
    model = tiny.model(family, head=tiny.head(family), tie_word_embeddings=tied)
    found = models.facts(model.config)
    read = [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    assert found.body + found.head == sum(weight.numel() for weight in read)
    assert found.head >= tiny.VOCAB * tiny.HIDDEN


def test_of_experts_those_count_that_a_token_is_sent_to():
    sizes = {"vocab_size": 61, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 6, "num_key_value_heads": 3, "num_local_experts": 5}  # fmt: skip
    two, three = (models.facts({"model_type": "mixtral", **sizes, "num_experts_per_tok": n}) for n in (2, 3))
    expert = 3 * 48 * 40
    assert three.body - two.body == 2 * expert and three.blocks[0] - two.blocks[0] == expert
    assert three.head == two.head == 61 * 48


def test_a_submodel_costs_its_forward_pass_and_twice_what_it_updates():
    bert = models.facts(tiny.config("bert"))
    block, rest = bert.blocks[0], bert.body + bert.head - sum(bert.blocks)
    cost = Cost(bert, True, {}, frozenset(), texts=((2, 5),), parts=(Part(2, 1), Part(4, 1)))
    pairs = 2 * 5 * bert.widths["query"]  # a block's, for each token
    assert cost.step() == 10 * 6 * (rest + 4 * (block + pairs))
    assert cost.step(Part(3, 1)) == 10 * (2 * (rest + 3 * (block + pairs)) + 4 * (rest + 2 * (block + pairs)))
    assert cost.mean == (cost.step(Part(2, 1)) + cost.step(Part(4, 1))) / 2


# Where rows come from


class Rows:
    def at(self, positions, mask=None):
        return {"sample_ids": torch.tensor(positions)}


class Corpus(list):
    def __init__(self, rows: int, tokens: int):
        super().__init__(range(rows))
        self.tokens = tokens


def test_a_stream_goes_on_where_an_earlier_stage_stopped():
    first, second = (Data(Rows(), 6, 2, True, torch.device("cpu"), offset) for offset in (0, 18))
    seen = [n for data, steps in ((first, 3), (second, 4)) for step in range(steps)
            for batch in data(step) for n in batch["sample_ids"].tolist()]  # fmt: skip
    assert seen == list(range(42))


@pytest.fixture
def context(tmp_path):
    """Of a recipe whose stages are done and measured so much."""

    def made(equal: str, metrics: dict[str, dict]):
        return SimpleNamespace(metrics=metrics.__getitem__, recipe=recipe.load(written(tmp_path, equal)))

    return made


def written(place: Path, equal: str) -> Path:
    train = {"data": "text", "loss": [{"ce": {}}], "optim": {"batch": 4}, "lr": 0.1, "stop": {"steps": 2}}
    stages = [
        {"id": "small", "train": train | {"student": {"new": {"like": "m"}}}},
        {"id": "big", "train": train | {"student": {"from": "small"}}},
        {"id": "other", "train": train | {"student": {"new": {"like": "big"}}}},
        {"id": "late", "train": train | {"student": {"from": "big.start"}, "data": {"from": "text", "after": "big"}}},
        {"id": "twin", "train": train | {"student": {"new": {"like": "m"}}, "stop": {"like": "big"}}},
    ]
    path = place / f"{equal}.yaml"
    document = {"recipe": "r", "equal": equal, "models": {"m": "m"}, "stages": stages,
                "corpora": {"text": {"source": "stdlib", "tokenizer": "m"}}}  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    return path


def test_the_stages_that_weights_come_from_are_followed_and_architectures_are_not(context):
    made = context("steps", {}).recipe.made_from
    chains = {name: [stage.id for stage in made(name)] for name in ("small", "big", "other", "late", "m", "big.start")}
    assert chains == {
        "small": ["small"],
        "big": ["big", "small"],
        "other": ["other"],
        "late": ["late", "small"],
        "m": [],
        "big.start": ["small"],
    }


@pytest.mark.parametrize(
    ("equal", "steps", "words"),
    [
        ("steps", 30, "as many steps as big and what it was made from: 30, 30 steps"),
        ("tokens", 13, "as many tokens as big and what it was made from: 1.0 k, 13 steps"),
        ("flops", 8, "as many FLOPs as big and what it was made from: 7.5e+03, 8 steps"),
    ],
)
def test_as_much_as_a_stage_is_that_with_all_it_was_made_from(equal, steps, words, context, capsys):
    done = {"small": {"steps": 10, "tokens": 400, "flops": 2500}, "big": {"steps": 20, "tokens": 640, "flops": 5001}}
    here, cost = context(equal, done), SimpleNamespace(mean=1000)
    rows = Corpus(100, 2000)
    assert extent.steps("twin", here.recipe.stage("twin").train, here, rows, cost) == steps
    said = capsys.readouterr().err
    assert f"twin: {words}" in said
    assert ("rows repeat" in said) == (steps * 4 > 100)


def test_rows_that_must_repeat_are_told_with_numbers(context, capsys):
    here = context("steps", {"big": {"position": 90}})
    rows = Corpus(60, 100)
    spec = here.recipe.stage("late").train
    assert extent.steps("late", spec, here, rows, None) == 2
    assert "late: needs 0.1 epochs of text, and big has seen 1.5: rows repeat" in capsys.readouterr().err


# What a recipe may say


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("twin", {"stop": {"like": "twin"}}, "no earlier train stage 'twin'; known: small, big, other, late"),
        ("late", {"data": {"from": "more", "after": "big"}}, "stage 'big' trains on corpus 'text', not on 'more'"),
        ("late", {"data": {"from": "text", "after": "bigg"}}, "no earlier train stage 'bigg'; did you mean 'big'?"),
        ("late", {"hooks": [{"submodl": {}}]}, "no key 'submodl'; did you mean 'submodel'?"),
        ("late", {"hooks": [{"freeze": {}}]}, "one of train, layers, embeddings is needed"),
        ("late", {"hooks": [{"freeze": {"layers": [1]}}] * 2}, "freeze stands twice"),
        ("late", {"evaluate_every": 5, "loss": [{"relation_kl": {"target": "t", "heads": 2}}], "targets":
                  {"t": {"from": "m"}}}, "evaluate_every is the held-out loss of `ce`"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_meant_is_refused(stage, change, words, tmp_path):
    path = written(tmp_path, "steps")
    document = yaml.safe_load(path.read_text())
    document["corpora"]["more"] = {"source": "synthetic", "tokenizer": "m"}
    next(s for s in document["stages"] if s["id"] == stage)["train"].update(change)
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(UsageError) as refused:
        recipe.load(path)
    assert words in str(refused.value)


def test_seconds_cannot_be_made_equal(context):
    with pytest.raises(UsageError, match="seconds differ from run to run"):
        context("seconds", {})


# A whole run


TRAIN = {
    "student": {"new": {"like": "m"}},
    "data": "text",
    "loss": [{"ce": {}}],
    "optim": {"batch": 4},
    "lr": 0.01,
    "stop": {"steps": 3},
    "evaluate_every": 2,
}
RUN = {
    "recipe": "hooked",
    "equal": "flops",
    "engine": {"micro_batch": 2},
    "models": {"m": "m"},
    "corpora": {"text": {"source": "synthetic", "tokenizer": "m", "length": 32, "heldout": 0.2, "limit": 100}},
    "stages": [
        {"id": "parts", "train": TRAIN | {"hooks": [{"submodel": {"depths": [1, 2, 4], "train_top": 1}}]}},
        {"id": "full", "train": TRAIN | {"student": {"from": "parts"}, "data": {"from": "text", "after": "parts"},
                                         "hooks": [{"freeze": {"layers": [1]}}]}},
        {"id": "twin", "train": TRAIN | {"stop": {"like": "full"}}},
    ],
}  # fmt: skip


def test_a_run_counts_what_ran_and_its_twin_gets_as_much(tmp_path):
    tiny.save(tiny.model("bert", head="mlm"), tmp_path / "m", tiny.tokenizer())
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    command = [sys.executable, "-W", "ignore", "-m", "distill.cli", "run", "r.yaml", "--out", "out"]
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                           text=True, timeout=250)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    parts, full, twin = (json.loads((tmp_path / f"out/{s}/stage.json").read_text())["metrics"] for s in
                         ("parts", "full", "twin"))  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "out/parts/log.jsonl").read_text().splitlines()]
    bert = models.facts(tmp_path / "m")
    cost = Cost(bert, True, {}, frozenset(), ((4, 32),))
    assert log[0].keys() == {"step", "tokens", "flops", "teacher_flops", "heldout"}
    assert [entry["step"] for entry in log if "heldout" in entry] == [0, 2, 3]
    assert parts["flops"] == sum(cost.step(Part(e["depth"], e["depth"] - 1)) for e in log[1:])
    assert (full["flops"], full["flops_before"]) == (3 * cost.step(), parts["flops"])
    assert (parts["position"], full["position"], twin["flops_before"]) == (12, 24, 0)
    assert 0 <= twin["flops"] - (parts["flops"] + full["flops"]) < cost.step()
    before, after = (load_file(tmp_path / f"out/full/{d}/model.safetensors") for d in ("start", "model"))
    assert {n for n in before if torch.equal(before[n], after[n])} == {n for n in before if ".layer.1." in n}
    assert set(full["frozen"]) == {n for n in before if ".layer.1." in n}
