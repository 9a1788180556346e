"""Families that have no growth: what is tapped of them is what their attention used, and what may be packed is.

Every other family of transformers is refused by name, or its rows are padded.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from test_layout import DOCUMENTS, LENGTH, documents
from torch.testing import assert_close
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from distill import layout, loading, taps
from distill.models import facts
from distill.objectives.relation import INEXACT
from distill.taps import tap
from growth.errors import UserError

MODELS = Path(transformers.__file__).parent / "models"
LOCAL = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
ENCODERS = {
    "camembert": {}, "data2vec-text": {}, "ernie": {}, "eurobert": {"num_key_value_heads": 3},
    "nomic_bert": {}, "roberta-prelayernorm": {}, "xlm-roberta": {}, "xlm-roberta-xl": {},
}  # fmt: skip
DECODERS = {
    "arcee": {}, "cohere": {}, "cohere2": LOCAL, "ernie4_5": {"head_dim": 10}, "exaone4": LOCAL,
    "glm": {"head_dim": 10}, "glm4": {"head_dim": 10}, "gpt_bigcode": {"n_inner": 40},
    "granite": {"attention_multiplier": 0.3},
    "helium": {"head_dim": 8}, "hunyuan_v1_dense": {"head_dim": 10},
    "ministral": {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4, "head_dim": 10},
    "modernbert-decoder": {"num_key_value_heads": 6, "local_attention": 10, "global_attn_every_n_layers": 3},
    "nemotron": {}, "olmo": {}, "olmo3": LOCAL, "phi": {}, "seed_oss": {"head_dim": 10},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 28},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]}, "stablelm": {}, "starcoder2": {"sliding_window": 5},
}  # fmt: skip
TAPPED = ENCODERS | DECODERS
PACKED_ALONE = {"megatron-bert": {}, "mpnet": {}, "rembert": {"input_embedding_size": 26, "output_embedding_size": 30}}
OUTSIDE = {
    **PACKED_ALONE, "convbert": {"embedding_size": 26}, "fnet": {}, "mra": {}, "roformer": {"embedding_size": 48},
    "falcon": {"num_kv_heads": 6, "ffn_hidden_size": 40}, "gpt_neo": {"num_layers": 4, "num_heads": 6,
    "attention_types": [[["global", "local"], 2]], "window_size": 5}, "bloom": {"n_layer": 4, "n_head": 6},
    "big_bird": {"attention_type": "original_full"},
}  # fmt: skip
NO_BLOCKS = {"ibert": {}, "squeezebert": {"embedding_size": 48}}


def model(family, changes, seed=0):
    """As tiny has them, of a config whose keys are those of its class."""
    kind = transformers.CONFIG_MAPPING[family]
    known = {**tiny.GROUPED, **changes}
    settings = kind(**{key: value for key, value in known.items() if hasattr(kind(), key)})
    built = loading.class_of(settings, None)(settings)
    built.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in built.parameters():
            noise = 0.3 * torch.randn(p.shape, generator=generator)
            p.copy_(noise if p.dim() > 1 else p + noise)
    return built.eval()


def inputs(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": (batch["segment_ids"] > 0).long()}


def attended(seen, causal, real, window):
    """Attention written out from what was tapped of layer 1: [B, T, H d]."""
    q, k, v = (seen[role, 1].detach() for role in taps.IN_ATTENTION)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    place = torch.arange(real.shape[1])
    back = place[:, None] - place
    allowed = real[:, None, None, :] & ((back >= 0) | ~torch.tensor(causal)) & (back < window)
    return ((q @ k.mT * seen.scaling[1]).masked_fill(~allowed, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("family", TAPPED)
def test_attention_written_out_from_the_tapped_values_goes_into_one_of_the_block_s_own_layers(family):
    student, batch, given = model(family, TAPPED[family]), tiny.batch([[11], [7], [1]], 11), []
    before = student(**inputs(batch))[0]
    block = taps.blocks(student)[1]
    hooks = [
        part.register_forward_pre_hook(lambda part, arguments: given.extend(arguments[:1]))
        for part in block.modules()
        if not list(part.children())
    ]
    with tap(student, [*((role, 1) for role in taps.IN_ATTENTION), ("hidden", 1)]) as seen:
        states = student(**inputs(batch), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    real, causal = batch["segment_ids"] > 0, loading.causal(student.config)
    window = 5 if family in ("ministral", "modernbert-decoder", "starcoder2") else 99  # of layer 1
    ours = attended(seen, causal, real, window)[real]
    same_width = [x.reshape(3, 11, -1)[real] for x in given if torch.is_tensor(x) and x.numel() == 33 * ours.shape[1]]
    assert any(torch.allclose(x, ours, atol=1e-4, rtol=1e-4) for x in same_width)
    assert torch.equal(seen["hidden", 1], states[2]) and torch.equal(student(**inputs(batch))[0], before)


def outputs(student, batch):
    return student(**layout.inputs(student, batch))[0][batch["segment_ids"] > 0]  # [N, D]


@pytest.mark.parametrize("family", TAPPED | PACKED_ALONE)
def test_packed_documents_have_their_own_outputs_and_gradients(family):
    changes, packed, found = (TAPPED | PACKED_ALONE)[family], tiny.batch(DOCUMENTS, LENGTH), []
    assert layout.packable(model(family, changes).config)
    for batch in (packed, documents(packed)):
        student = model(family, changes).double()
        values = outputs(student, batch)
        values.square().mean().backward()
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        found.append((values.detach(), gradients))
    (ours, learned), (alone, expected) = found
    assert (ours - alone).abs().max() < 1e-5 * alone.abs().max() and learned.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert all((learned[name] - gradient).abs().max() < 1e-4 * largest for name, gradient in expected.items())


@pytest.mark.parametrize("family", OUTSIDE)
def test_attention_outside_the_interface_is_refused_by_name_and_hidden_states_can_be_had(family):
    student, batch = model(family, OUTSIDE[family]), tiny.batch([[11], [7]], 11)
    reason = "cannot be tapped for query: .* layer 1 does not pass through"
    with pytest.raises(UserError, match=reason), tap(student, [("query", 1)]):
        student(**inputs(batch))
    with tap(student, [("hidden", 1)]) as seen:
        states = student(**inputs(batch), output_hidden_states=True).hidden_states
    assert torch.equal(seen["hidden", 1], states[2])
    assert facts(student.config).heads is None and layout.packable(student.config) == (family in PACKED_ALONE)


@pytest.mark.parametrize("family", NO_BLOCKS)
def test_a_family_whose_blocks_are_not_known_is_refused_by_name(family):
    student = model(family, NO_BLOCKS[family])
    reason = f"{type(student).__name__} cannot be tapped: 0 blocks were found for its 4"
    with pytest.raises(UserError, match=reason), tap(student, [("hidden", 1)]):
        pass


def test_layers_that_see_other_places_than_the_batch_has_are_refused():
    """Longformer pads its rows to its window, Funnel pools them."""
    student = model("longformer", {"attention_window": [4] * 4})
    reason = "LongformerModel cannot be tapped for hidden: layer 1 has 12 places where"
    with pytest.raises(UserError, match=reason), tap(student, [("hidden", 1)]):
        student(**inputs(tiny.batch([[11]], 11)))


@pytest.mark.parametrize("family", ["gpt_neo", "opt"])
def test_rows_of_a_family_without_proof_are_padded(family):
    student, packed = model(family, {"ffn_dim": 40, **OUTSIDE.get(family, {})}), tiny.batch(DOCUMENTS, LENGTH)
    assert not layout.packable(student.config)
    with pytest.raises(UserError, match=f"{family} cannot keep packed documents apart; corpora need packed: false"):
        layout.inputs(student, packed)
    each = documents(packed)
    alone = [outputs(student, {key: x[i : i + 1, :n] for key, x in each.items()}) for i, n in enumerate(lengths(each))]
    assert_close(outputs(student, each), torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("family", ["bert", "bert-generation", "electra", "xlm-roberta"])
def test_what_may_decode_sees_what_its_config_says(family, decodes):
    student, batch = model(family, {"is_decoder": decodes}), tiny.batch([[11]], 11)
    before = student(**inputs(batch))[0]
    batch["input_ids"][0, -1] += 1
    sees_behind = not torch.equal(student(**inputs(batch))[0][0, 0], before[0, 0])
    assert decodes == loading.causal(student.config) == facts(student.config).causal != sees_behind


def test_no_family_has_more_than_query_and_key_in_its_scores_unless_it_is_listed():
    """Its own file says so where it calls the interface: sinks, a cap, a bias, chosen tokens."""
    known = auto.MODEL_MAPPING_NAMES.keys() & {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "t5", "mt5", "umt5"
    }  # fmt: skip
    folders = {family: model_type_to_module_name(family) for family in known}
    files = {family: MODELS / name / f"modeling_{name}.py" for family, name in folders.items()}
    calls = re.compile(r"ALL_ATTENTION_FUNCTIONS.*\n +(s_aux|softcap|position_bias|indices)=", re.DOTALL)
    more = {family for family, file in files.items() if file.exists() and calls.search(file.read_text())}
    assert more - {"phi4_multimodal"} <= INEXACT.keys()  # whose indices are those of images


def lengths(batch):
    return batch["segment_ids"].sum(1).tolist()


@pytest.mark.parametrize("family", ["ernie", "mpnet", "xlm-roberta", "gpt_bigcode"])
def test_a_table_of_positions_ends_where_it_ends(family):
    student = model(family, TAPPED.get(family, {}))
    longest = layout.longest(student.config)
    outputs(student, tiny.batch([[longest]], longest))
    with pytest.raises((IndexError, RuntimeError)):
        outputs(student, tiny.batch([[longest + 1]], longest + 1))
