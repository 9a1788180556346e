"""The preservation table of growth in width: what is promised exact is exact in float64, what is known to break breaks.

The rows that break guard the tolerance: a test of exactness that they pass would prove nothing.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch
from click.testing import CliRunner
from tiny_families import CONFIGS, load, save

import growth
from growth.anatomy import dissect
from growth.behind import first_order
from growth.cli import main
from growth.errors import UsageError, UserError
from growth.maps import Units, dealt, padded, sampled, tiled
from growth.reindex import units_stream
from growth.sizes import Sizes, new_sizes
from growth.verify import _outputs, verify
from growth.width import HOW, planned

EXACT = 1e-12
EPSILON = {
    **dict.fromkeys(("gpt2", "t5"), "layer_norm_epsilon"),
    **{"phi3": "rms_norm_eps", "modernbert": "norm_eps", "distilbert": None},
}
RMS = [
    kind
    for kind in CONFIGS
    if kind in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "mixtral", "qwen2_moe")
]
POST = ["bert", "roberta", "distilbert", "electra"]
FUSED = [*POST, "modernbert", "gpt2", "gpt_neox", "phi3"]  # heads times their size is the model's width


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Checkpoints in float64, with an epsilon that is felt, each made once."""
    home, made = tmp_path_factory.mktemp("sources"), {}

    def get(kind, cls=None, **changes):
        key = "-".join([kind, cls or "", *(f"{k}={v}" for k, v in changes.items())])
        epsilon = EPSILON.get(kind, "rms_norm_eps" if kind in RMS else "layer_norm_eps")
        if key not in made:
            felt = {epsilon: 1e-3} if epsilon else {}
            made[key] = save(home / key, kind, cls, dtype=torch.float64, **felt, **changes)
        return made[key]

    return get


TOKENS = torch.randint(4, 53, (2, 16), generator=torch.Generator().manual_seed(0))


@cache
def outputs(path):
    checkpoint = growth.open(path)
    return _outputs(checkpoint, dissect(checkpoint), TOKENS, torch.float64)


def gap(src, path):
    """The largest difference between two models, as `growth verify` computes it; sources are run once."""
    one, two = outputs(src), outputs.__wrapped__(path)
    assert one.keys() == two.keys() and max(value.abs().max() for value in one.values()) > 0.3
    return max(float((two[name][..., : value.shape[-1]] - value).abs().max()) for name, value in one.items())


def by_hand(src, dst, asked, change=lambda widening: widening, how="exact"):
    """Widening by maps that the operator would not make."""
    checkpoint = growth.open(src)
    anatomy = dissect(checkpoint)
    widening, _ = planned(anatomy, Sizes(**asked), how, 0.0, 0)
    widening = change(widening)
    config = anatomy.family.resized(anatomy.config, new_sizes(widening))
    return growth.write(dst, config, units_stream(checkpoint, anatomy, widening))


def with_maps(**maps):
    """Other maps by the axes they are of: `kv_group` is ("kv", "group")."""
    return lambda w: dataclasses.replace(
        w, maps={**w.maps, **{tuple(k.split("_")): units for k, units in maps.items()}}
    )


# every row of the table that is exact

ROWS = [
    *((kind, {}, {"hidden": 60}) for kind in FUSED),
    *((kind, {}, {"ffn": 57}) for kind in CONFIGS),
    *((kind, {}, asked) for kind in RMS for asked in ({"hidden": 96}, {"hidden": 72}, {"hidden": 66}, {"kv_heads": 6})),
    *((kind, {}, {"hidden": 96, "heads": 12, "kv_heads": 6, "ffn": 82}) for kind in RMS),
    *((kind, {"tie_word_embeddings": True}, {"hidden": n}) for kind in ("llama", "qwen2", "qwen3") for n in (96, 72)),
    ("gemma2", {"tie_word_embeddings": False}, {"hidden": 72}),
    ("mistral", {"sliding_window": 3}, {"hidden": 96, "heads": 12}),
    ("qwen3", {"attention_bias": True}, {"hidden": 72, "heads": 12}),
    ("llama", {"attention_bias": True, "mlp_bias": True}, {"hidden": 72, "kv_heads": 6, "ffn": 42}),
    *(("gpt2", {"tie_word_embeddings": tied}, {"hidden": n}) for tied in (True, False) for n in (36, 48, 78)),
    *(("gpt_neox", {"use_parallel_residual": p}, {"hidden": n}) for p in (True, False) for n in (60, 48)),
    ("gpt_neox", {"tie_word_embeddings": True}, {"hidden": 48, "ffn": 60}),
    ("modernbert", {"norm_bias": True, "attention_bias": True, "mlp_bias": True}, {"hidden": 60}),
    *(("t5", changes, {"hidden": n}) for changes in ({}, {"feed_forward_proj": "gated-gelu"}) for n in (60, 45, 37)),
    ("t5", {}, {"heads": 7, "ffn": 43}),
    ("electra", {"embedding_size": 30}, {"hidden": 60, "ffn": 43}),
    *(("phi3", {"num_attention_heads": 15, "num_key_value_heads": kv}, {"ffn": 43}) for kv in (3, 5)),
    ("phi3", {"tie_word_embeddings": True}, {"hidden": 60}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "asked"), ROWS)
def test_what_is_promised_exact_is_exact_with_any_noise_between_copies(source, tmp_path, kind, changes, asked):
    src = source(kind, **changes)
    path = growth.widen(src, tmp_path / "x", **asked, noise=0.5)
    assert json.loads((path / "growth.json").read_text())["preserves"] == "exact"
    assert gap(src, path) <= EXACT


@pytest.mark.parametrize("kind", RMS)
def test_zero_channels_keep_the_function_of_rms_norms(source, tmp_path, kind):
    assert gap(source(kind), growth.widen(source(kind), tmp_path / "x", hidden=108, how="zero", noise=0.5)) <= EXACT


@pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("bert", "BertForPreTraining"),
        ("bert", "BertForSequenceClassification"),
        ("bert", "BertModel"),
        ("bert", "BertForMultipleChoice"),
        ("bert", "BertForNextSentencePrediction"),
        ("roberta", "RobertaForSequenceClassification"),
        ("roberta", "RobertaForMultipleChoice"),
        ("roberta", "RobertaForTokenClassification"),
        ("distilbert", "DistilBertForQuestionAnswering"),
        ("distilbert", "DistilBertForSequenceClassification"),
        ("gpt2", "GPT2DoubleHeadsModel"),
        ("gpt2", "GPT2Model"),
        ("llama", "LlamaForSequenceClassification"),
        ("llama", "LlamaForQuestionAnswering"),
        ("gemma2", "Gemma2Model"),
        ("t5", "T5EncoderModel"),
        ("t5", "T5ForSequenceClassification"),
        ("modernbert", "ModernBertForTokenClassification"),
    ],
)
def test_every_head_reads_the_wider_model_alike(source, tmp_path, kind, cls):
    changes = {"pad_token_id": 0} if kind == "llama" else {}
    src = source(kind, cls, **changes)
    asked = {"hidden": 96} if kind in RMS else {"hidden": 60}
    assert gap(src, growth.widen(src, tmp_path / "x", **asked)) <= EXACT


@pytest.mark.parametrize("stored", ["once", "thrice"])
def test_t5_with_a_head_of_its_own_grows_in_every_direction(source, tmp_path, stored):
    """T5 1.1: config.json says that nothing is tied; the embeddings of both stacks are one table all the same."""
    old = growth.open(source("t5", feed_forward_proj="gated-gelu"))
    tensors = {name: old.tensor(name) for name in old}
    head = torch.randn(53, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3
    copies = ("encoder", "decoder") if stored == "thrice" else ()
    tensors |= {
        "lm_head.weight": head,
        **{f"{stack}.embed_tokens.weight": tensors["shared.weight"] for stack in copies},
    }
    config = {key: value for key, value in old.config.items() if key != "scale_decoder_outputs"}
    src = growth.write(tmp_path / "src", {**config, "tie_word_embeddings": False}, tensors.items())
    assert torch.equal(load(src, dtype=torch.float64).lm_head.weight, head)
    for number, asked in enumerate(
        ({"hidden": 60}, {"hidden": 45, "ffn": 50, "heads": 7}, {"head_size": 6, "vocab": 64})
    ):
        path = growth.widen(src, tmp_path / str(number), **asked, noise=0.5)
        assert gap(src, path) <= EXACT and verify(src, path).kept
    assert gap(src, growth.insert(src, tmp_path / "deep", layers=2)) == 0
    twice = growth.open(growth.stack(src, tmp_path / "twice"))
    assert torch.equal(twice.tensor("lm_head.weight"), head) and gap(src, twice.path) > 0.1
    again = growth.open(growth.undo(tmp_path / "deep", tmp_path / "back"))
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "electra", "modernbert", "gpt2", "gemma2", "gemma3_text", "t5"]
)
def test_a_tied_table_that_is_stored_twice_stays_one_table(source, tmp_path, kind):
    """Many checkpoints hold it under both names; a head that differs from it is another matter."""
    old = growth.open(source(kind))
    twins = dissect(old).tied
    tensors = {name: old.tensor(name) for name in old} | {name: old.tensor(origin) for name, origin in twins.items()}
    src = growth.write(tmp_path / "src", old.config, tensors.items())
    hidden = 96 if kind in RMS else 60
    for made in (growth.widen(src, tmp_path / "wide", hidden=hidden, noise=0.5),
                 growth.vocabulary(src, tmp_path / "more", size=60, how="normal")):  # fmt: skip
        assert not twins.keys() & growth.open(made).keys() and gap(src, made) <= EXACT
    lone = next(name for name in twins if name.endswith("weight") and "embed_tokens" not in name)
    own = growth.write(tmp_path / "own", old.config, (tensors | {lone: tensors[lone] * 0.5}).items())
    wide = growth.widen(own, tmp_path / "wider", hidden=hidden, noise=0.5)
    assert lone in growth.open(wide) and gap(own, wide) <= EXACT


# every row of the table that breaks


def test_queries_repeated_one_way_and_keys_another_break(source, tmp_path):
    interleaved = Units(tuple(i for i in range(6) for _ in range(2)), 6)
    path = by_hand(source("llama"), tmp_path / "x", {"kv_heads": 6, "heads": 12}, with_maps(kv_group=interleaved))
    assert gap(source("llama"), path) > 0.1


@pytest.mark.parametrize(
    "units", [Units(tiled(48, 72), 48), Units(padded(48, 72), 48)], ids=["naive", "zero, unscaled"]
)
def test_an_uneven_width_without_its_scale_breaks(source, tmp_path, units):
    assert gap(source("llama"), by_hand(source("llama"), tmp_path / "x", {"hidden": 72}, with_maps(embed=units))) > 0.05


@pytest.mark.parametrize(
    ("kind", "hidden"),
    [
        ("llama", 96),
        ("llama", 72),
        ("gpt2", 60),
        ("gpt2", 48),
        ("bert", 60),
        ("distilbert", 60),
        ("modernbert", 60),
        ("t5", 60),
    ],
)
def test_a_tied_head_that_is_not_corrected_breaks(source, tmp_path, kind, hidden):
    src = source(kind, **({"tie_word_embeddings": True} if kind == "llama" else {}))
    uncorrected = by_hand(src, tmp_path / "x", {"hidden": hidden}, lambda w: dataclasses.replace(w, tied=False))
    assert gap(src, uncorrected) > 0.5
    assert gap(src, by_hand(src, tmp_path / "y", {"hidden": hidden})) <= EXACT


@pytest.mark.parametrize("hidden", [60, 45])
def test_t5_without_the_root_of_its_growth_breaks(source, tmp_path, hidden):
    plain = by_hand(source("t5"), tmp_path / "x", {"hidden": hidden}, lambda w: dataclasses.replace(w, root=1.0))
    assert gap(source("t5"), plain) > 0.1


def test_a_fused_projection_doubled_as_one_block_breaks(source, tmp_path):
    block = with_maps(qkv_heads_head=Units(tiled(90, 180), 90))
    assert gap(source("gpt2"), by_hand(source("gpt2"), tmp_path / "x", {"hidden": 60}, block)) > 0.1


def test_a_projection_fused_per_head_and_doubled_by_thirds_breaks(source, tmp_path):
    thirds = Units(tuple(third * 30 + i for third in range(3) for i in tiled(30, 60)), 90)
    path = by_hand(source("gpt_neox"), tmp_path / "x", {"hidden": 60}, with_maps(heads_qkv_head=thirds))
    assert gap(source("gpt_neox"), path) > 0.1


@pytest.mark.parametrize(
    ("kind", "hidden"), [("gpt2", 48), ("gpt_neox", 48), ("bert", 48), ("llama", 72), ("modernbert", 48)]
)
def test_fpi_at_an_uneven_width_is_called_approximate_and_is_not_exact(source, tmp_path, kind, hidden):
    path = growth.widen(source(kind), tmp_path / "x", hidden=hidden, how="fpi")
    assert json.loads((path / "growth.json").read_text())["preserves"] == "approximate"
    assert gap(source(kind), path) > 0.05


def test_mean_channels_come_nearer_than_fpi_in_a_bert_encoder_but_not_home(source, tmp_path):
    src = source("bert", "BertModel")
    gaps = {}
    for how in ("mean", "fpi"):
        path = growth.widen(src, tmp_path / how, hidden=48, how=how, noise=0.0)
        gaps[how] = (outputs(path)["pooler_output"][..., :30] - outputs(src)["pooler_output"]).abs().max()
    assert 1e-3 < gaps["mean"] < gaps["fpi"] / 3


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_mean_is_told_behind_an_activation_and_not_in_front_of_it(source, tmp_path, kind):
    """A masked language model's head norms what a gelu makes of its channels."""
    src = source(kind)
    near = gap(src, growth.widen(src, tmp_path / "mean", hidden=48, how="mean", noise=0.0))
    naive = by_hand(src, tmp_path / "naive", {"hidden": 48}, how="mean")  # the mean of the rows: gelu of a mean
    assert near < 0.6 * gap(src, naive)


@pytest.mark.parametrize("f", [torch.nn.functional.gelu, torch.nn.functional.relu])
def test_the_channel_that_tells_a_mean_is_right_to_first_order(f):
    """Against samples of what a layer norm writes: the same on average, and most of what differs between inputs."""
    draw = torch.Generator().manual_seed(0)
    weight, bias, gain, shift = (
        torch.randn(*n, generator=draw, dtype=torch.float64) * 0.3 for n in ((40, 30), (40,), (30,), (30,))
    )
    bias, gain = bias + 0.3, gain + 1
    row, at = first_order(weight, bias, gain, shift, f)
    n = torch.randn(200_000, 30, generator=draw, dtype=torch.float64)
    x = gain * (n - n.mean(1, keepdim=True)) + shift
    mean, said = f(x @ weight.T + bias).mean(1), f(x @ row[0] + at)
    assert abs(float(said.mean() - mean.mean())) < 0.1 * mean.std()
    assert torch.corrcoef(torch.stack([mean, said]))[0, 1] > 0.6 and (said - mean).std() < 0.8 * mean.std()


def test_mean_channels_are_exact_in_an_encoder_with_constant_gains(source, tmp_path):
    src = source("bert", "BertModel", num_hidden_layers=2)
    old = growth.open(src)
    flat = {n: torch.full_like(old.tensor(n), 0.7) if n.endswith("LayerNorm.weight") else old.tensor(n) for n in old}
    src = growth.write(tmp_path / "flat", old.config, flat.items())
    path = growth.widen(src, tmp_path / "x", hidden=48, how="mean", noise=0.5)
    one, two = (load(p, "BertModel", torch.float64) for p in (src, path))
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        a, b = one(tokens).last_hidden_state, two(tokens).last_hidden_state
    assert (b[..., :30] / (48 / 30) ** 0.5 - a).abs().max() <= EXACT  # the stream, which is the output, carries a scale


def test_identity_blocks_break_when_one_writer_or_one_bias_is_left(source, tmp_path):
    for kind, left in (("llama", "model.layers.1.mlp.down_proj.weight"), ("gpt2", "transformer.h.1.mlp.c_proj.bias")):
        new, old = growth.open(growth.insert(source(kind), tmp_path / kind, after=[0])), growth.open(source(kind))
        tensors = {name: old.tensor(name.replace(".1.", ".0.")) if name == left else new.tensor(name) for name in new}
        path = growth.write(tmp_path / f"{kind}-left", new.config, tensors.items())
        assert gap(source(kind), new.path) == 0 and gap(source(kind), path) > 0.05


# what else is promised


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_aki_takes_new_units_from_the_layer_above_and_old_ones_as_fpi_does(source, tmp_path, kind):
    src = source(kind)
    asked = (
        {"hidden": 48, "seed": 3, "noise": 0.0}
        if kind == "bert"
        else {"hidden": 72, "ffn": 57, "seed": 3, "noise": 0.0}
    )
    fpi, aki = (growth.open(growth.widen(src, tmp_path / how, how=how, **asked)) for how in ("fpi", "aki"))
    name = {"bert": "bert.encoder.layer.{}.output.dense.weight", "llama": "model.layers.{}.mlp.down_proj.weight"}[kind]
    n = growth.inspect(src).sizes["embed"]
    for layer, above in ((0, 1), (1, 2)):
        assert torch.equal(aki.tensor(name.format(layer))[:n], fpi.tensor(name.format(layer))[:n])
        assert torch.equal(aki.tensor(name.format(layer))[n:], fpi.tensor(name.format(above))[n:])
    last = name.format(growth.inspect(src).sizes["layers"] - 1)
    assert torch.equal(aki.tensor(last), fpi.tensor(last))
    norms = [name for name in aki if "orm." in name]
    assert norms and all(torch.equal(aki.tensor(name), fpi.tensor(name)) for name in norms)
    assert json.loads((tmp_path / "aki" / "growth.json").read_text())["preserves"] == "no" and gap(src, aki.path) > 0.05


def test_noise_tells_copies_apart_and_an_even_split_does_not(source, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    even, apart = (
        growth.open(growth.widen(source("llama"), tmp_path / str(noise), hidden=96, noise=noise)).tensor(name)
        for noise in (0.0, 0.1)
    )
    assert torch.equal(even[:, :48], even[:, 48:])
    assert (apart[:, :48] - apart[:, 48:]).std() > 0.01
    torch.testing.assert_close(apart[:, :48] + apart[:, 48:], even[:, :48] * 2)


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(source, tmp_path):
    made = [
        growth.widen(source("bert"), tmp_path / str(i), hidden=48, how="fpi", seed=s) for i, s in enumerate((1, 1, 2))
    ]
    digests = [growth.open(path).digest() for path in made]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_doubling_is_exact_in_any_type_and_types_stay(tmp_path, dtype):
    src = save(tmp_path / "src", "llama", dtype=dtype)
    path = growth.widen(src, tmp_path / "x", hidden=96, noise=0.0)
    assert {e.dtype for e in growth.open(path).values()} == {e.dtype for e in growth.open(src).values()}
    assert gap(src, path) <= EXACT  # powers of two round nothing
    assert verify(src, growth.widen(src, tmp_path / "y", hidden=72), length=16).kept


def test_what_is_not_widened_is_copied_as_bytes(source, tmp_path):
    path, src = growth.widen(source("llama"), tmp_path / "x", ffn=57), source("llama")
    old, new = growth.open(src), growth.open(path)
    changed = {name for name in old if new[name].shape != old[name].shape}
    assert changed == {name for name in old if ".mlp." in name}
    assert all(torch.equal(old.tensor(name), new.tensor(name)) for name in set(old) - changed)


def test_maps_keep_every_old_unit_and_read_undoes_write():
    for units in (Units(tiled(5, 13), 5), Units(sampled(5, 13, 0), 5), Units(padded(5, 13), 5)):
        write = torch.zeros(13, 5).index_put_((torch.arange(13), torch.tensor(units.index)), torch.tensor(1.0))
        write[[i for i, old in enumerate(units.index) if old < 0]] = 0
        read = write * torch.tensor([1 / c if c else 0 for c in units.copies])[:, None]
        assert torch.equal((read.T @ write).round(decimals=6), torch.eye(5))
    with pytest.raises(ValueError):
        Units((0, 1, 1), 3)
    assert dealt(Units((0, 1, 0, 1), 2), 2, 1) == (0, 2, 1, 3)


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("bert", {"hidden": 48}, "only multiples of 30 keep the function: 30 or 60; --how fpi, aki or mean"),
        ("modernbert", {"hidden": 48}, "only multiples of 30"),
        ("bert", {"hidden": 50}, "not made of whole heads of 6 channels; 48 or 54 is"),
        (
            "bert",
            {"heads": 10},
            "10 heads of 6 channels are 60, not hidden 30; with --hidden 60 they fit",
        ),
        ("gpt2", {"heads": 5, "hidden": 60}, "are 30, not hidden 60; with --hidden 30 or --head-size 12 they fit"),
        ("bert", {"heads": 7, "hidden": 60}, "7 heads of 6 channels are 42, not hidden 60; with --hidden 42 they fit"),
        ("bert", {"kv_heads": 10}, "BERT has no key-value heads"),
        ("llama", {"hidden": 67}, "hidden_size 67 must be a multiple of num_attention_heads 6, such as 72"),
        ("llama", {"heads": 10}, "10 heads cannot share 3 key-value heads evenly; 9 or 12 can"),
        ("llama", {"kv_heads": 6, "heads": 6, "hidden": 30}, "hidden 30 is less than the source's 48"),
        ("llama", {"kv_heads": 4, "heads": 4}, "leave no place for some of the 2 that share one now; 8 heads would do"),
        ("olmo2", {"kv_heads": 4, "heads": 8}, "only whole multiples of them keep the function"),
        ("llama", {"hidden": 72, "how": "mean"}, "mean channels do not suit the rms norms of Llama; weighted"),
        ("gpt2", {"hidden": 48, "how": "weighted"}, "weighted channels do not suit the layer norms of GPT-2; mean"),
    ],
)
def test_widths_that_cannot_be_are_refused_with_the_nearest_that_can(source, tmp_path, kind, asked, said):
    with pytest.raises(UserError, match=said):
        growth.widen(source(kind), tmp_path / "x", **asked)
    assert list(tmp_path.iterdir()) == []


def test_asking_for_nothing_or_in_an_unknown_way_is_a_usage_error(source, tmp_path):
    for asked in ({}, {"hidden": 48}, {"ffn": 50, "how": "magic"}, {"ffn": 0}, {"ffn": 50.0}, {"fnn": 50}):
        with pytest.raises(UsageError):
            growth.widen(source("llama"), tmp_path / "x", **asked)
    assert "exact" in HOW


# the commands


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_commands_say_what_is_kept_and_verify_holds_them_to_it(source, tmp_path):
    src = source("llama")
    done = run("widen", src, tmp_path / "x", "--hidden", "72", "--ffn", "60")
    assert done.exit_code == 0 and "computes the same as before" in done.stderr
    done = run("verify", src, tmp_path / "x")
    assert (
        done.exit_code == 0
        and "equal up to rounding  yes" in done.output
        and "promised              exact" in done.output
    )
    growth.stack(src, tmp_path / "deep")
    done = run("verify", src, tmp_path / "deep")
    assert done.exit_code == 0 and "equal up to rounding  no" in done.output
    story = json.loads((tmp_path / "deep" / "growth.json").read_text())
    (tmp_path / "deep" / "growth.json").write_text(json.dumps({**story, "preserves": "exact"}))
    done = run("verify", src, tmp_path / "deep")
    assert done.exit_code == 1 and "promises to compute what" in done.stderr
