"""Laws of learned growth (LiGO), and of widths of zeros and of random parameters."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import tiny
import torch
from click.testing import CliRunner
from tiny_families import CONFIGS, load, save

import growth
from growth.batches import batches
from growth.cli import main
from growth.errors import UserError
from growth.families import of
from growth.learn import Grown, Growth
from growth.sizes import Sizes

GROUPED = [kind for kind, sizes in CONFIGS.items() if "num_key_value_heads" in sizes]
LAYERED = [kind for kind in CONFIGS if of({"model_type": kind}).norm == "layer"]
HIDDEN = {kind: next(sizes[key] for key in ("hidden_size", "n_embd", "dim", "d_model") if key in sizes)
          for kind, sizes in CONFIGS.items()}  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    home = tmp_path_factory.mktemp("sources")

    def get(kind, dtype=torch.float32, **changes):
        path = home / f"{kind}-{dtype}-{changes}"
        if not path.exists():
            start = {"decoder_start_token_id": 0} if kind == "t5" else {}
            save(path, kind, dtype=dtype, **start, **changes)
            tiny.tokenizer(53).save_pretrained(path)
        return path

    return get


def some(number, seed=0):
    """Batches of a language of two alternating words, with a label for every token."""
    draw = torch.Generator().manual_seed(seed)
    for _ in range(number):
        start = torch.randint(5, 52, (3, 1), generator=draw)
        ids = start + torch.arange(9) % 2
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def wider(kind):
    """Twice the channels, an odd number of neurons, and for grouped queries more heads of both sorts."""
    heads = {"heads": 12, "kv_heads": 6} if kind in GROUPED else {}
    return {"hidden": 2 * HIDDEN[kind], "ffn": 57, **heads}


def untrained(src, factor=1, noise=0.0, start="copies", **sizes):
    """The bigger model as its maps start."""
    made = Growth.of(growth.open(src), factor, "stack", Sizes.of(sizes), start, 3)
    made = dataclasses.replace(made, ligo=dataclasses.replace(made.ligo, noise=noise))
    made.ligo.prepare(made.sources, *made.works_in)
    return made


def assert_same(made, path):
    there, tensors = growth.open(path), dict(made.stream())
    assert tensors.keys() == set(there) and dict(made.config) == there.config
    for name, piece in tensors.items():
        torch.testing.assert_close(piece.make(), there.tensor(name), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", CONFIGS)
def test_maps_that_are_plain_copies_stack_as_stack_does(source, tmp_path, kind):
    src = source(kind, torch.float64)
    assert_same(untrained(src, factor=2), growth.stack(src, tmp_path / "x", factor=2))


@pytest.mark.parametrize("kind", CONFIGS)
def test_maps_that_are_plain_copies_widen_as_widen_does(source, tmp_path, kind):
    src = source(kind, torch.float64)
    assert_same(
        untrained(src, **wider(kind)), growth.widen(src, tmp_path / "x", how="fpi", noise=0.0, seed=3, **wider(kind))
    )


@pytest.mark.parametrize(("kind", "asked"), [("bert", {"hidden": 48}), ("llama", {"hidden": 72, "kv_heads": 6})])
def test_copies_of_some_units_and_groups_of_another_size_are_those_of_widen(source, tmp_path, kind, asked):
    src = source(kind, torch.float64, **({"tie_word_embeddings": True} if kind == "llama" else {}))
    assert_same(untrained(src, **asked), growth.widen(src, tmp_path / "x", how="fpi", noise=0.0, seed=3, **asked))


def test_readers_take_the_old_units_from_what_writers_make_whatever_the_map_is(source):
    made = untrained(source("bert", torch.float64), noise=0.5, hidden=60)
    write = made.ligo._write(next(iter(made.sources)), ("embed",))
    assert (write[:30] - torch.eye(30)).abs().max() == 0 and (write[30:] < 1).all()
    torch.testing.assert_close(made.ligo._read(write).T @ write, torch.eye(30, dtype=torch.float64))
    plain = untrained(source("bert", torch.float64), start="random", hidden=60).ligo
    assert plain._read(write) is write


def test_a_tensor_of_a_new_layer_is_the_sum_of_all_old_ones_by_weights_of_its_own(source):
    made = untrained(source("gpt2", torch.float64), factor=2, noise=0.3)
    old = [made.checkpoint.tensor(f"transformer.h.{i}.mlp.c_fc.weight") for i in range(2)]
    weights = {slot.key: made.ligo.entries["depth", slot.key] for slot in made.sources if made.ligo.depth(slot)}
    assert all(torch.isclose(each.sum(), each.new_tensor(1.0)) for each in weights.values())
    assert all((one - two).abs().max() > 0 for one, two in pairwise(weights.values()))
    slot = next(slot for slot in made.sources if slot.name == "transformer.h.3.mlp.c_fc.weight")
    a, b = weights[slot.key].tolist()
    assert b > a > 0
    torch.testing.assert_close(dict(made.stream())[slot.name].make(), a * old[0] + b * old[1])


@pytest.mark.parametrize(("kind", "start"), [("bert", "copies"), ("gpt2", "random"), ("gpt2", "copies")])
def test_the_gradient_of_every_kind_of_map_is_the_slope_of_the_loss(source, kind, start):
    made = untrained(source(kind, torch.float64), 2, 0.3, start, hidden=48 if kind == "gpt2" else 60, ffn=50)
    ids, grown = next(some(1))["input_ids"], Grown(made)

    def loss():
        return grown.filled()(input_ids=ids).logits.log_softmax(-1).gather(2, ids[..., None]).mean()  # in float64

    loss().backward()
    assert all(p.grad is None for p in grown.model.parameters())

    kinds = {(name[0], name[1] if name[0] == "width" else name[1][0]): name for name in made.ligo.entries}
    assert len(kinds) > 8
    for name in kinds.values():
        entry = made.ligo.entries[name]
        at = int(entry.grad.abs().argmax())
        flat = entry.data.view(-1)
        flat[at] += 1e-5
        up = float(loss().detach())
        flat[at] -= 2e-5
        slope = (up - float(loss().detach())) / 2e-5
        flat[at] += 1e-5
        assert slope == pytest.approx(float(entry.grad.view(-1)[at]), rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_learned_loads_in_transformers_and_has_a_lower_loss(source, tmp_path, kind):
    src = source(kind)
    before = growth.open(src).digest()
    out = growth.learn(src, tmp_path / "x", batches=some(4), factor=2, steps=4, lr=0.003, **wider(kind))
    story = json.loads((out / "growth.json").read_text())
    batch, (first, last) = next(some(1)), story["losses"]
    with torch.no_grad():
        assert float(load(out)(**batch).loss) == pytest.approx(last, rel=1e-4)
    assert last < first and story["preserves"] == "no" and story["new"]["embed"]["to"] == 2 * HIDDEN[kind]
    assert growth.open(src).digest() == before


def test_a_second_head_is_carried_along(tmp_path):
    src = save(tmp_path / "src", "bert", "BertForPreTraining")
    out = growth.learn(src, tmp_path / "x", batches=some(3), hidden=60, steps=3, lr=0.003)
    first, last = json.loads((out / "growth.json").read_text())["losses"]
    assert last < first and load(out, "BertForPreTraining").cls.seq_relationship.in_features == 60


def test_the_same_seed_learns_the_same_and_another_one_something_else(source, tmp_path):
    def digest(name, seed):
        path = growth.learn(source("bert"), tmp_path / name, batches=some(3), hidden=60, steps=3, seed=seed)
        return growth.open(path).digest()

    assert digest("a", 1) == digest("b", 1) != digest("c", 2)


def test_a_model_in_memory_learns_as_its_directory_does(source, tmp_path):
    path = growth.learn(source("llama"), tmp_path / "x", batches=some(2), factor=2, steps=2)
    model = growth.learn(load(source("llama")), batches=some(2), factor=2, steps=2)
    there = growth.open(path)
    assert model.growth["operator"] == "learn" and model.num_parameters() == load(path).num_parameters()
    state = model.state_dict()
    assert all(torch.equal(state[name], there.tensor(name)) for name in there)


def test_bfloat16_is_computed_in_float32_and_cast_once(source, tmp_path):
    made = untrained(source("llama", torch.bfloat16), hidden=96)
    assert made.works_in[0] == torch.float32 and {piece.dtype for _, piece in made.stream()} == {"BF16"}


def test_too_few_batches_and_models_without_a_loss_are_refused(source, tmp_path):
    with pytest.raises(UserError, match="3 steps were asked for, and there are 2 batches"):
        growth.learn(source("llama"), tmp_path / "x", batches=some(2), factor=2, steps=3)
    body = save(tmp_path / "body", "bert", "BertModel")
    with pytest.raises(UserError, match="BertModel"):
        growth.learn(body, tmp_path / "x", batches=some(2), factor=2, steps=2)
    (body / "config.json").write_text(json.dumps({**growth.open(body).config, "architectures": None}))
    with pytest.raises(UserError, match="names no class"):
        growth.learn(body, tmp_path / "x", batches=some(2), factor=2, steps=2)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing to learn"),
        ({"head_size": 20}, "head_size cannot be learned"),
        ({"factor": 2, "start": "ones"}, "one of copies, random"),
        ({"factor": 2, "steps": 0}, "at least 1"),
        ({"hidden": 30}, "embed|hidden 30 is less"),
    ],
)
def test_what_cannot_be_learned_is_said_at_once(source, tmp_path, asked, said):
    with pytest.raises(UserError, match=said):
        growth.learn(source("llama"), tmp_path / "x", batches=some(1), **asked)


def test_what_was_learned_cannot_be_undone_and_verify_says_how_far_it_is(source, tmp_path):
    out = growth.learn(source("gpt2"), tmp_path / "x", batches=some(2), hidden=48, steps=2)
    with pytest.raises(UserError, match=r"mix layers for good, so there is nothing to undo; the source was .*gpt2"):
        growth.undo(out, tmp_path / "y")
    found = growth.verify(source("gpt2"), out)
    assert found.promised == "no" and found.kept and not found.exact


# text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the cat sat on the mat. the dog sat on the log.\n" * 400)
    return path


def test_masked_text_hides_fifteen_percent_behind_masks_others_and_themselves(source, text):
    read = list(batches(source("bert"), text, number=40, seed=1))
    ids, labels = (torch.cat([batch[name].flatten() for batch in read]) for name in ("input_ids", "labels"))
    chosen = labels != -100
    shares = [(ids == tiny.MASK)[chosen], (ids == labels)[chosen], chosen]
    assert [float(share.float().mean()) for share in shares] == pytest.approx([0.8, 0.1, 0.15], abs=0.02)
    assert not set(labels[chosen].tolist()) & {tiny.PAD, tiny.CLS, tiny.SEP, tiny.MASK}
    again = list(batches(source("bert"), text, number=40, seed=1))
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(read, again, strict=True))


def test_causal_text_predicts_every_token_of_it(source, text):
    (batch,) = batches(source("llama"), text, number=1)
    special = (batch["input_ids"] == tiny.CLS) | (batch["input_ids"] == tiny.SEP)
    assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(special | (batch["attention_mask"] == 0), -100))


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_learns_from_a_file(source, tmp_path, text):
    done = run("learn", source("bert"), tmp_path / "x", "--hidden", 60, "--text", text, "--steps", 3)
    assert done.exit_code == 0 and "learning to grow" in done.stderr and "train it" in done.stderr
    assert growth.inspect(tmp_path / "x").sizes["embed"] == 60
    for kind, words in (("t5", "predicts neither next nor masked tokens"), ("bert", "nothing to learn")):
        done = run("learn", source(kind), tmp_path / "y", "--text", text)
        assert done.exit_code in (1, 2) and words in done.stderr


# widths of zeros and of random parameters


@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    """Every weight is seven, so that what is new shows."""
    home = tmp_path_factory.mktemp("sevens")

    def get(kind):
        if not (home / kind).exists():
            old = growth.open(save(home / f"{kind}-drawn", kind, dtype=torch.float64))
            growth.write(home / kind, old.config, [(name, torch.full_like(old.tensor(name), 7.0)) for name in old])
        return home / kind

    return get


def values(path):
    there = growth.open(path)
    return {name: there.tensor(name).flatten() for name in there}


@pytest.mark.parametrize("how", ["zero", "random"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_new_heads_and_neurons_are_zero_or_as_a_new_model_starts_and_old_ones_are_what_they_were(
    sevens, tmp_path, kind, how
):
    src = sevens(kind)
    heads = {"heads": 12, "kv_heads": 6} if kind in GROUPED else {}
    old, new = values(src), values(growth.widen(src, tmp_path / "x", how=how, noise=0.0, ffn=57, **heads))
    grown = [name for name in new if len(new[name]) > len(old[name])]
    kept = {name: new[name] == 7.0 for name in grown if "norm" not in name.lower()}
    assert len(grown) > 3 and all(int(kept[name].sum()) == len(old[name]) for name in kept)
    fresh = torch.cat([new[name][~kept[name]] for name in kept if name.endswith("weight")])
    assert float(fresh.std()) == (0 if how == "zero" else pytest.approx(0.02, rel=0.05))
    assert all(not new[name][~kept[name]].any() for name in kept if name.endswith("bias"))


@pytest.mark.parametrize("how", ["zero", "random"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_new_channels_are_made_for_every_family_and_the_way_back_is_the_source(source, tmp_path, kind, how):
    src = source(kind, torch.float64)
    out = growth.widen(src, tmp_path / "x", how=how, **wider(kind))
    slots = Growth.of(growth.open(src), 2, "stack", Sizes(), "copies", 0).sources
    table = next(slot for slot in slots if len(slot.dims) == 2 and ("embed",) in slot.dims)
    fresh = growth.open(load(out) and out).tensor(table.name).movedim(table.dims.index(("embed",)), 0)[HIDDEN[kind] :]
    assert float(fresh.std()) == (0 if how == "zero" else pytest.approx(0.02, rel=0.1))
    back, old = values(growth.undo(out, tmp_path / "y")), values(src)
    assert all((back[name] - old[name]).abs().max() < 1e-12 for name in old)
    found = growth.verify(src, out)
    kept = "no" if how == "random" or kind in LAYERED else "approximate" if kind == "olmo2" else "exact"
    assert found.promised == kept and found.kept and (kept == "no" or found.mean_abs < 1e-3)


def test_silent_neurons_and_heads_learn_from_the_first_step_on(source, tmp_path):
    """Zeros that read zeros would never move: what reads them has noise, and the function does not see it."""
    src = source("llama", torch.float64)
    out = growth.widen(src, tmp_path / "x", how="zero", ffn=57, heads=12, kv_heads=4)
    assert growth.verify(src, out).exact
    model = load(out, dtype=torch.float64)
    batch = next(some(1))
    model(**batch).loss.backward()
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight[41:].abs().max() == 0 and layer.self_attn.v_proj.weight[30:].abs().max() == 0
    assert (
        layer.self_attn.v_proj.weight.grad[30:].abs().min() > 0 and layer.self_attn.o_proj.weight.grad.abs().max() > 0
    )
