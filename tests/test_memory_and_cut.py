"""Laws of operators on models in memory, of larger heads and vocabularies, and of every kind of cut."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from click.testing import CliRunner
from test_width import EXACT, FUSED, POST, RMS, gap, source  # noqa: F401  (a fixture)
from tiny_families import CONFIGS, load, logits

import growth
from growth.cli import main
from growth.errors import UsageError, UserError


def same(a, b):
    """Whether two checkpoints hold the same bytes under the same names."""
    a, b = growth.open(a), growth.open(b)
    return set(a) == set(b) and all(torch.equal(a.tensor(name), b.tensor(name)) for name in a)


# in memory


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_in_memory_grows_as_its_directory_does(source, tmp_path, kind):  # noqa: F811
    src = source(kind)
    model = load(src, dtype=torch.float64)
    for name, grow in {
        "stack": lambda s, d=None: growth.stack(s, d, factor=2),
        "widen": lambda s, d=None: growth.widen(s, d, ffn=57, noise=0.1),
        "cut": lambda s, d=None: growth.cut(s, d, 1, ffn=20),
    }.items():
        made = grow(model)
        grow(src, tmp_path / name)
        made.save_pretrained(tmp_path / f"{name}-saved")
        assert same(tmp_path / name, tmp_path / f"{name}-saved")
        assert made.growth["operator"] == name and type(made) is type(model)


def test_a_grown_model_shares_no_memory_with_its_source_and_keeps_its_ways(source):  # noqa: F811
    model = load(source("llama"), dtype=torch.float64).train()
    made = growth.stack(model)
    before = logits(model)
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert torch.equal(logits(model), before)
    assert made.training and made.dtype == torch.float64
    assert all(p.requires_grad for p in made.parameters())


def test_models_in_memory_are_verified_and_described_as_directories_are(source):  # noqa: F811
    model = load(source("mixtral"), dtype=torch.float64)
    wide, deep = growth.widen(model, hidden=72, noise=0.3), growth.stack(model)
    found = growth.verify(model, wide)
    assert found.promised == "exact" and found.max_abs <= EXACT * found.largest and found.kept
    found = growth.verify(model, deep)
    assert found.promised == "no" and found.max_abs > 0.1
    said = growth.inspect(wide)
    assert said.sizes["embed"] == 72 and said.history[0]["operator"] == "widen"
    assert said.parameters == sum(p.numel() for p in wide.parameters())


def test_a_model_wants_no_path_and_a_path_wants_one(source, tmp_path):  # noqa: F811
    with pytest.raises(UsageError, match="no path is wanted"):
        growth.widen(load(source("llama")), tmp_path / "x", ffn=57)
    with pytest.raises(UsageError, match="where to write"):
        growth.widen(source("llama"), ffn=57)


# larger heads, longer tables

HEADS = [
    *((kind, {}, {"head_size": 20}) for kind in RMS),
    *((kind, {}, {"head_size": 30, "hidden": 72, "kv_heads": 6}) for kind in ("llama", "qwen3", "gemma2")),
    ("llama", {"attention_bias": True}, {"head_size": 20}),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}, {"head_size": 20}),
    ("t5", {}, {"head_size": 7}),
    *((kind, {}, {"hidden": 60, "heads": 5, "head_size": 12}) for kind in (*POST, "gpt2")),
    ("modernbert", {}, {"hidden": 480, "heads": 5, "head_size": 96}),  # turned in float32: a power of two is exact
    ("gpt_neox", {"hidden_size": 40, "rotary_pct": 0.5}, {"hidden": 80, "heads": 5, "head_size": 16}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "asked"), HEADS)
def test_larger_heads_attend_alike(source, tmp_path, kind, changes, asked):  # noqa: F811
    src = source(kind, **changes)
    path = growth.widen(src, tmp_path / "x", **asked, noise=0.5)
    assert json.loads((path / "growth.json").read_text())["preserves"] == "exact"
    assert growth.inspect(path).sizes["head"] == asked["head_size"] and gap(src, path) <= EXACT


def test_old_channels_in_front_break_rotary_heads(source, tmp_path):  # noqa: F811
    from test_width import by_hand, with_maps

    from growth.maps import Units, kept_first

    in_front = with_maps(head=Units(kept_first(10, 20), 10))
    assert gap(source("llama"), by_hand(source("llama"), tmp_path / "x", {"head_size": 20}, in_front)) > 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_padded_vocabulary_says_the_same_of_every_old_token(source, tmp_path, kind):  # noqa: F811
    path = growth.widen(source(kind), tmp_path / "x", vocab=64)
    assert gap(source(kind), path) <= EXACT and growth.inspect(path).sizes["vocab"] == 64
    assert same(path, growth.widen(source(kind), tmp_path / "same", vocab_multiple=32))
    assert same(source(kind), growth.cut(path, tmp_path / "back", vocab=53))


@pytest.mark.parametrize(
    ("kind", "changes", "asked", "said"),
    [
        ("llama", {}, {"head_size": 14}, "in multiples of 10 only; 10 or 20"),
        ("llama", {}, {"head_size": 9}, "head-size 9 is less than"),
        ("bert", {}, {"head_size": 12}, "cannot have these sizes|not made of whole heads"),
        (
            *("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
            *({"head_size": 20}, "'yarn' depend on their size"),
        ),
    ],
)
def test_heads_that_cannot_grow_are_refused(source, tmp_path, kind, changes, asked, said):  # noqa: F811
    with pytest.raises(UserError, match=said):
        growth.widen(source(kind, **changes), tmp_path / "x", **asked)


# cuts


SMALLER = {
    **{kind: {"hidden": 24, "ffn": 17, "vocab": 52} for kind in (*FUSED, "t5")},
    **{kind: {"hidden": 36, "ffn": 17, "vocab": 52, "kv_heads": 2, "heads": 2} for kind in RMS},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_whatever_is_cut_loads_and_computes(source, tmp_path, kind):  # noqa: F811
    path = growth.cut(source(kind), tmp_path / "x", 2 if kind != "gpt2" else 1, **SMALLER[kind])
    assert logits(load(path)).shape[-1] == 52
    sizes = growth.inspect(path).sizes
    assert (sizes["embed"], sizes["ffn"], sizes["vocab"]) == tuple(SMALLER[kind][k] for k in ("hidden", "ffn", "vocab"))
    assert json.loads((path / "growth.json").read_text())["preserves"] == "no"


@pytest.mark.parametrize("kind", CONFIGS)
def test_keeping_everything_is_the_identity_and_two_cuts_are_one(source, tmp_path, kind):  # noqa: F811
    src = source(kind)
    assert same(src, growth.cut(src, tmp_path / "all", ffn=list(range(41)), vocab=53))
    once = growth.cut(src, tmp_path / "once", ffn=[3, 1, 4], vocab=[*range(10), 30, 20])
    half = growth.cut(src, tmp_path / "half", ffn=[9, 1, 4, 3], vocab=[*range(10), 20, 30, 40])
    assert same(once, growth.cut(half, tmp_path / "twice", ffn=[3, 1, 2], vocab=[*range(10), 11, 10]))


@pytest.mark.parametrize("kind", CONFIGS)
def test_neurons_that_do_nothing_are_the_first_to_go_and_every_layer_has_its_own(source, tmp_path, kind):  # noqa: F811
    """A neuron whose weights are zero is cut, and the function stays."""
    old = growth.open(source(kind))
    from growth.anatomy import dissect

    tensors = {name: old.tensor(name).clone() for name in old}
    for slot, name in dissect(old).places.items():
        for d, dim in enumerate(slot.dims):
            if dim[-1] == "ffn":
                dead = 7 + sum(i for _, i in slot.at)
                tensors[name].unflatten(d, (-1, 41)).select(d + 1, dead).zero_()
    src = growth.write(tmp_path / "src", old.config, tensors.items())
    path = growth.cut(src, tmp_path / "x", ffn=40)
    assert gap(src, path) <= EXACT
    kept = json.loads((path / "growth.json").read_text())["maps"]["ffn"]
    assert all(7 + sum(map(int, at.split("."))) not in units for at, units in kept.items())


def test_heads_without_effect_go_first_and_grouped_ones_go_together(source, tmp_path):  # noqa: F811
    old = growth.open(source("llama"))
    tensors = {name: old.tensor(name).clone() for name in old}
    for name in tensors:
        head, kv = slice(20, 40), slice(10, 20)  # the second of three, with its two queries
        if "q_proj" in name:
            tensors[name][head] = 0
        if "o_proj" in name:
            tensors[name][:, head] = 0
        if "k_proj" in name or "v_proj" in name:
            tensors[name][kv] = 0
    src = growth.write(tmp_path / "src", old.config, tensors.items())
    path = growth.cut(src, tmp_path / "x", kv_heads=2)
    assert gap(src, path) <= EXACT and growth.inspect(path).sizes["kv"] == 2
    assert gap(src, growth.cut(src, tmp_path / "y", heads=[0, 1, 4, 5], kv_heads=2)) <= EXACT
    with pytest.raises(UserError, match="equally many"):
        growth.cut(src, tmp_path / "z", heads=[0, 1, 4, 2], kv_heads=2)


def test_tokens_are_renumbered_in_the_config_and_a_tokenizer_that_no_longer_fits_stays_behind(source, tmp_path):  # noqa: F811
    src = source("gpt2")
    path = growth.cut(src, tmp_path / "x", vocab=[5, 1, 0])
    config = json.loads((path / "config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"], config["vocab_size"]) == (1, 2, 3)
    assert torch.equal(growth.open(path).tensor("transformer.wte.weight"),
                       growth.open(src).tensor("transformer.wte.weight")[[5, 1, 0]])  # fmt: skip
    with pytest.raises(UserError, match=r"needs token 1 \(bos_token_id\)"):
        growth.cut(src, tmp_path / "y", vocab=[5, 0])


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({}, UsageError, "nothing to cut"),
        ({"ffn": 50}, UserError, "50 of ffn cannot be kept: the model has 41"),
        ({"ffn": [1, 1]}, UserError, "listed twice"),
        ({"ffn": [41]}, UserError, "ffn 41 is not there"),
        ({"ffn": "many"}, UsageError, "a number or a list"),
        ({"hidden": 47}, UserError, "must be a multiple"),
        ({"heads": 5}, UserError, "cannot share 3"),
    ],
)
def test_cuts_that_cannot_be_are_refused(source, tmp_path, asked, error, said):  # noqa: F811
    with pytest.raises(error, match=said):
        growth.cut(source("llama"), tmp_path / "x", **asked)
    assert list(tmp_path.iterdir()) == []


def test_the_command_takes_numbers_and_lists(source, tmp_path):  # noqa: F811
    arguments = ["cut", str(source("llama")), str(tmp_path / "x"), "--layers", "0,-1", "--ffn", "20", "--heads", "3"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert same(tmp_path / "x", growth.cut(source("llama"), tmp_path / "y", [0, 3], ffn=20, heads=3))
    assert transformers.AutoConfig.from_pretrained(tmp_path / "x").num_attention_heads == 3
