"""Every family's table is complete and exact to the shape, for every class that transformers builds on it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers
from tiny_families import CONFIGS, classes, config_of
from transformers.core_model_loading import revert_weight_conversion

from growth import axes
from growth.anatomy import dissect
from growth.axes import fits, parse
from growth.errors import UserError
from growth.families import FAMILIES, of
from growth.ranges import Entry

VARIANTS = {
    "bert": [dict(tie_word_embeddings=False)],
    "electra": [dict(embedding_size=30)],
    "modernbert": [dict(attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True, decoder_bias=False)],
    "gpt2": [dict(tie_word_embeddings=False)],
    "gpt_neox": [dict(attention_bias=False), dict(tie_word_embeddings=True, use_parallel_residual=False)],
    "llama": [dict(attention_bias=True, mlp_bias=True), dict(tie_word_embeddings=True)],
    "qwen3": [dict(attention_bias=True)],
    "gemma2": [dict(attention_bias=True)],
    "gemma3_text": [dict(attention_bias=True)],
    "phi3": [dict(num_attention_heads=6, num_key_value_heads=3), dict(tie_word_embeddings=True)],
    "olmo2": [dict(attention_bias=True)],
    "t5": [dict(feed_forward_proj="gated-gelu")],
}


CASES = [
    pytest.param(model_type, changes, cls, id=f"{cls.__name__}-{'-'.join(changes) or 'default'}")
    for model_type in CONFIGS
    for changes in [{}, *VARIANTS.get(model_type, [])]
    for cls in classes(model_type)
]


class Stored(dict):
    """What `growth.open` would give for the tensors of a model on the meta device."""

    def __init__(self, config, shapes):
        super().__init__({name: Entry("F32", shape, None, 0, 0) for name, shape in shapes.items()})
        self.path, self.config = "memory", config


def stored(model_type, cls, changes):
    config = config_of(model_type, **changes)
    with torch.device("meta"):
        model = cls(config)
    names = revert_weight_conversion(model, model.state_dict())
    json = {**config.to_dict(), "architectures": [cls.__name__]}
    return Stored(json, {name: tuple(tensor.shape) for name, tensor in names.items()})


@pytest.mark.parametrize(("model_type", "changes", "cls"), CASES)
def test_every_tensor_of_every_class_has_a_place_of_its_shape(model_type, changes, cls):
    whole = stored(model_type, cls, changes)
    anatomy = dissect(whole)
    assert {slot.name for slot in anatomy.places} == set(whole)
    heads = {row.group for row in anatomy.family.rows if not row.body and any(s.row is row for s in anatomy.places)}
    assert heads or cls.__name__.endswith(("Model", "EncoderModel"))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_missing_tensor_is_missed_by_name_unless_another_one_stands_for_it(model_type):
    for cls in classes(model_type):
        whole = stored(model_type, cls, {})
        anatomy = dissect(whole)
        groups = Counter(slot.row.group for slot in anatomy.places)
        for slot, name in anatomy.places.items():
            rest = Stored(whole.config, {n: e.shape for n, e in whole.items() if n != name})
            whole_head = slot.row.group and groups[slot.row.group] == 1  # then there is simply no such head
            if slot.row.required and not name.endswith(tuple(anatomy.family.tied)) and not whole_head:
                with pytest.raises(UserError, match=f"lacks 1 tensor of .* first: {name}"):
                    dissect(rest)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_no_two_axes_of_the_test_models_have_one_size(model_type):
    config = config_of(model_type).to_dict()
    by_construction = {"pool", "transform", "qkv", "gates", "pair"}  # as wide as the model, or fixed small numbers
    sizes = {k: n for k, n in of(config).sizes_of(config).items() if n is not None and k not in by_construction}
    assert len(set(sizes.values())) == len(sizes), sizes


@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_config_with_defaults_left_out_means_what_transformers_takes(model_type):
    config = config_of(model_type)
    full, family = config.to_dict(), of(config.to_dict())
    for key in family.defaults:
        if key in full and key not in CONFIGS[model_type]:
            assert getattr(family.view({**full, key: None}), key) == full[key], key


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "qwen2", "qwen3", "modernbert"])
def test_an_absent_list_of_layer_kinds_is_what_transformers_makes_of_it(model_type):
    for changes in ({}, dict(num_hidden_layers=7, use_sliding_window=True, sliding_window=8, max_window_layers=3)):
        if model_type == "modernbert" and changes:
            changes = dict(num_hidden_layers=7, global_attn_every_n_layers=2)
        config = config_of(model_type, **changes)
        bare = {**config.to_dict(), **changes, "layer_types": None}
        assert of(bare).view(bare).layer_types == config.layer_types


@pytest.mark.parametrize("model_type", CONFIGS)
def test_the_parameters_are_counted_to_the_last(model_type):
    cls = classes(model_type)[0]
    whole = stored(model_type, cls, {})
    slots = dissect(whole).places
    with torch.device("meta"):
        model = cls(config_of(model_type))
    names = {name for name, _ in revert_weight_conversion(model, dict(model.named_parameters())).items()}
    counted = sum(torch.Size(whole[name].shape).numel() for slot, name in slots.items() if name in names)
    assert counted == sum(p.numel() for p in model.parameters())


def test_fused_and_grouped_matrices_are_told_apart_by_their_axes():
    sizes = of({"model_type": "llama"}).sizes_of(config_of("llama").to_dict())
    assert (sizes["kv"], sizes["group"], sizes["head"]) == (3, 2, 10)
    q = parse("(kv group head) <- embed + bias if attention_bias")
    assert axes.shape(q.dims, sizes) == (60, 48) and q.out == ("kv", "group", "head") and q.bias == "attention_bias"
    assert parse("embed -> (qkv heads head)").read == ("embed",)
    assert parse("vocab | embed").looked_up == 0 and parse("vocab | embed").read == ()


@pytest.mark.parametrize("text", ["a <- b <- c", "(a <- b", "a + bias when x", "a ! b", ""])
def test_a_notation_that_says_nothing_is_refused(text):
    with pytest.raises(ValueError):
        parse(text)


def test_an_unknown_architecture_and_an_unknown_tensor_are_named_with_what_would_help():
    with pytest.raises(UserError, match="no table for model_type 'lama'; did you mean 'llama'"):
        of({"model_type": "lama"})
    other = stored("llama", transformers.LlamaForCausalLM, {})
    other.config["model_type"] = "lamb3"
    with pytest.raises(
        UserError, match=r"39 of its 39 tensors are named as those of Llama: try replace\(LLAMA, model_type"
    ):
        dissect(other)
    other["model.layers.1.mlp.gate_up.weight"] = Entry("F32", (41, 48), None, 0, 0)
    with pytest.raises(UserError, match=r'not model\.layers\.1\.mlp\.gate_up.*\.gate_up": "ffn <- embed"'):
        dissect(other)
    with pytest.raises(UserError, match=r"^no table for model_type 'x'; known: [^;]*$"):
        dissect(Stored({"model_type": "x"}, {"weights": (3, 4)}))
    whole = stored("bert", transformers.BertForMaskedLM, {})
    whole["bert.encoder.layer.1.adapter.weight"] = Entry("F32", (41, 30), None, 0, 0)
    with pytest.raises(UserError, match=r"1 tensor that BERT's table .* bert\.encoder\.layer\.1\.adapter") as error:
        dissect(whole)
    assert '"encoder.layer.{layers}.adapter": "ffn <- embed"' in str(error.value)


def test_shapes_that_contradict_the_config_are_both_named():
    whole = stored("gpt2", transformers.GPT2LMHeadModel, {})
    whole.config["vocab_size"] = 50
    with pytest.raises(
        UserError, match=r"wte\.weight is \[53, 30\], but config\.json says \[50, 30\] \(vocab x embed\)"
    ):
        dissect(whole)
    whole.config["vocab_size"] = "fifty"
    with pytest.raises(UserError, match="vocab = 'fifty'"):
        dissect(whole)
    del whole.config["n_embd"], whole.config["vocab_size"]
    with pytest.raises(UserError, match="no 'vocab_size'"):
        dissect(whole)


def test_sizes_of_a_config_that_contradict_each_other_are_both_named():
    whole = stored("llama", transformers.LlamaForCausalLM, {})
    whole.config["num_attention_heads"] = 7
    with pytest.raises(UserError, match="says num_attention_heads 7, but its other sizes make 6"):
        dissect(whole)


def test_integers_in_the_place_of_weights_are_refused():
    whole = stored("gpt2", transformers.GPT2Model, {})
    whole["ln_f.weight"] = Entry("I32", (30,), None, 0, 0)
    with pytest.raises(UserError, match=r"ln_f\.weight holds I32"):
        dissect(whole)


def test_old_names_and_buffers_are_understood():
    whole = stored("bert", transformers.BertModel, {})
    old = Stored(whole.config, {n.replace("LayerNorm.weight", "LayerNorm.gamma"): e.shape for n, e in whole.items()})
    old["embeddings.position_ids"] = Entry("I64", (1, 37), None, 0, 0)
    anatomy = dissect(old)
    assert anatomy.buffers == {"embeddings.position_ids"}
    assert {slot.name for slot in anatomy.places} == set(whole)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_names_are_understood_with_and_without_the_prefix_of_the_base_model(model_type):
    """Checkpoints on the hub have `bert.`, `model.`, `transformer.` or nothing, whatever class their config names."""
    family = FAMILIES[model_type]
    for cls in classes(model_type):
        whole = stored(model_type, cls, {})
        anatomy = dissect(whole)
        own = {name: slot.row.body for slot, name in anatomy.places.items()}
        for prefix in (*family.prefixes, ""):
            shapes = {(prefix if own[n] else "") + n.removeprefix(anatomy.prefix if own[n] else ""): e.shape
                      for n, e in whole.items()}  # fmt: skip
            again = dissect(Stored(whole.config, shapes))
            assert again.prefix == prefix and len(again.places) == len(anatomy.places)
            assert again.tied_head == anatomy.tied_head


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_buffer_that_old_versions_stored_is_left_out(model_type):
    whole = stored(model_type, classes(model_type)[0], {})
    family, config = FAMILIES[model_type], whole.config
    buffers = family.buffer_names(config, dissect(whole).prefix)
    assert buffers or model_type == "modernbert"
    old = Stored(config, {name: e.shape for name, e in whole.items()} | dict.fromkeys(buffers, (1, 37)))
    assert dissect(old).buffers == buffers and len(dissect(old).places) == len(whole)


def test_two_names_for_one_tensor_and_more_layers_than_tensors_are_refused():
    whole = stored("bert", transformers.BertModel, {})
    whole["embeddings.LayerNorm.gamma"] = Entry("F32", (30,), None, 0, 0)
    with pytest.raises(UserError, match=r"LayerNorm\.weight and embeddings\.LayerNorm\.gamma are two names"):
        dissect(whole)
    whole.config["num_hidden_layers"] = 10**12
    with pytest.raises(UserError, match="says 1000000000000 layers, but there are"):
        dissect(whole)


def test_sizes_that_an_architecture_cannot_have_are_refused():
    config = config_of("bert").to_dict()
    assert of(config).resized(config, {"ffn": 50, "layers": 6})["intermediate_size"] == 50
    with pytest.raises(UserError, match=r"BERT cannot have these sizes together.* head 7 for 6"):
        of(config).resized(config, {"embed": 35, "pool": 35, "transform": 35})
    llama = config_of("llama").to_dict()
    assert of(llama).resized(llama, {"kv": 6})["num_attention_heads"] == 12


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_block_names_what_it_adds_to_the_residual_stream(model_type):
    family = FAMILIES[model_type]
    assert len(family.writers()) == {"t5": 5, "qwen2_moe": 3}.get(model_type, 2)
    assert all(any(row.name.endswith(role) for row in family.rows) for role in family.roles.values())
    assert fits((3, 4), (3, None)) and not fits((3, 4), (3,)) and not fits((3, 4), (4, 4))
