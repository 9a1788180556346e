"""Taps: what attention really used, without a trace in what the model computes."""

from __future__ import annotations

import time

import pytest
import tiny
import torch
import transformers
from launch import launch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.testing import assert_close
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill import layout, taps
from distill.attention import IMPLEMENTATIONS, PREFIX, _running, choose
from distill.models import facts
from distill.objectives.segments import Sight
from distill.taps import ROLES, Tap, tap, trace
from growth.errors import UserError

CASES = [(family, attention) for family in tiny.EVERY for attention in tiny.attentions(family)]
WITH_HEAD = [(f, a) for f, a in CASES if tiny.head(f)]
EVERY = [Tap(role, layer) for role in ROLES for layer in range(tiny.LAYERS)]
HEADS_TOGETHER = {  # where the heads' outputs, side by side, go into the output projection
    "bert": "attention.output.dense", "roberta": "attention.output.dense", "distilbert": "attention.out_lin",
    "electra": "attention.output.dense", "modernbert": "attn.Wo", "albert": "albert_layers.0.attention.dense",
    "gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "t5": "layer.0.SelfAttention.o",
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2}
SLIDING = ("qwen2", "qwen3", "qwen2_moe")  # not unless they are told to
PADDED = ([[11], [7], [1]], 11)


def outputs(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=(batch["segment_ids"] > 0).long())[0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_tapped_model_says_the_same_to_the_bit_and_keeps_nothing(family, attention, side):
    model = tiny.model(family, tiny.head(family), attention=attention)
    batch = tiny.batch(*PADDED, side=side)
    before = outputs(model, batch)
    with tap(model, EVERY) as seen:
        during = outputs(model, batch)
    assert torch.equal(during, before) and set(seen) == set(EVERY)
    assert model.config._attn_implementation == attention
    ours = ("forward", "_compiled_call_impl")
    assert not any(vars(m).keys() & ours or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def attend(model, layer, batch, seen):
    """Attention written out, from what was tapped: [B, T, H d]."""
    config, real = model.config, batch["segment_ids"] > 0
    q, k, v = (seen[role, layer].detach() for role in taps.IN_ATTENTION)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT * seen.scaling[layer]  # [B, H, T, T]
    if config.model_type == "t5":
        scores = scores + model.encoder.block[0].layer[0].SelfAttention.compute_bias(*scores.shape[-2:])
    if config.model_type == "gemma2":
        scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
    sight, everywhere = Sight(tiny.head(config.model_type) == "causal", seen.window[layer]), slice(0, real.shape[1])
    unseen = sight.unseen(everywhere, everywhere, real.device)
    hidden = ~real[:, None, None, :] if unseen is None else ~real[:, None, None, :] | unseen
    return (scores.masked_fill(hidden, -1e9).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize(("family", "attention"), CASES)
def test_attention_written_out_from_the_tapped_values_is_the_layers_own(family, attention, layer):
    model = tiny.model(family, attention=attention, **(WINDOW if family in SLIDING else {}))
    batch = tiny.batch(*PADDED, side="left")
    (block, turn), together = taps.layers(model)[layer], []
    output = block.get_submodule(HEADS_TOGETHER.get(family, "self_attn.o_proj"))
    output.register_forward_pre_hook(lambda module, arguments: together.append(arguments[0]))
    with tap(model, [(role, layer) for role in taps.IN_ATTENTION]) as seen:
        outputs(model, batch)
    real = batch["segment_ids"] > 0
    assert_close(attend(model, layer, batch, seen)[real], together[turn or 0][real], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny.EVERY)
def test_the_heads_of_a_tapped_value_are_those_of_the_model(family):
    model = tiny.model(family)
    with tap(model, [("query", 0), ("key", 0)]) as seen:
        outputs(model, tiny.batch(*PADDED))
    grouped = "num_key_value_heads" in tiny.FACTS[family][2]
    kv_heads = tiny.KV_HEADS if grouped else tiny.HEADS
    head = tiny.HEAD if family in ("qwen3", "gemma2", "gemma3_text", "t5") else tiny.HIDDEN // tiny.HEADS
    assert seen["query", 0].shape == (3, tiny.HEADS, 11, head) and seen["key", 0].shape == (3, kv_heads, 11, head)


@pytest.mark.parametrize("family", tiny.EVERY)
def test_hidden_i_is_the_output_of_block_i(family):
    model, batch = tiny.model(family), tiny.batch(*PADDED)
    with tap(model, [("hidden", 0), ("hidden", -2), ("hidden", 2)]) as seen:
        states = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states
    assert torch.equal(seen["hidden", 0], states[1])
    assert torch.equal(seen["hidden", 2], states[3]) and seen["hidden", -2] is seen["hidden", 2]


@pytest.mark.parametrize(("family", "attention"), WITH_HEAD)
def test_the_logits_of_rows_are_those_of_the_whole_head(family, attention):
    model = tiny.model(family, tiny.head(family), attention=attention)
    batch, rows = tiny.batch(*PADDED), torch.tensor([22, 4, 17, 4])
    whole = outputs(model, batch).flatten(0, 1)
    got = trace(model, batch, [("value", -1)], rows=rows)
    assert_close(got.logits, whole[rows], atol=1e-5, rtol=1e-5)
    assert trace(model, batch, [], rows=rows[:0]).logits.shape == (0, tiny.VOCAB)


def test_without_rows_the_head_does_not_run():
    model, ran = tiny.model("bert", "mlm"), []
    model.cls.register_forward_hook(lambda *_: ran.append(1))
    got = trace(model, tiny.batch(*PADDED), [("query", -1)])
    assert not ran and got.logits is None and list(got.taps) == [("query", -1)]
    assert got.scaling == {-1: pytest.approx((tiny.HIDDEN // tiny.HEADS) ** -0.5)}


def test_rows_of_a_model_without_a_head_are_refused():
    with pytest.raises(UserError, match="BertModel has no language-model head"):
        trace(tiny.model("bert"), tiny.batch(*PADDED), [], rows=torch.tensor([0]))


def gradients(model, batch, checkpointing, inside=False):
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    torch.manual_seed(0)  # the same dropout
    with tap(model, [Tap(r, layer) for r in ROLES for layer in (0, -1)]) as seen:
        last = model(input_ids=batch["input_ids"])[0]
        recorded, loss = dict(seen), sum(value.square().mean() for value in seen.values()) + last.square().mean()
        if inside:
            loss.backward()
        assert all(seen[t] is recorded[t] for t in recorded)  # recomputation did not record again
    if not inside:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.*checkpoint.*")
@pytest.mark.parametrize("inside", [True, False], ids=["backward within the tap", "backward after it"])
@pytest.mark.parametrize("family", tiny.FAMILIES)  # ALBERT has none
def test_activation_checkpointing_changes_no_gradient_of_tapped_values(family, inside):
    batch = tiny.batch(*PADDED)
    plain, recomputed = (gradients(tiny.model(family).double(), batch, c, inside) for c in (False, True))
    assert plain.keys() == recomputed.keys() and any("q" in n or "attn" in n for n in plain)
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient, atol=1e-9, rtol=1e-9)


def test_checkpointing_under_zero_3_changes_no_gradient_of_tapped_values():
    (gaps,) = launch("taps_zero3.py", "bert", "llama", "t5", "albert", "!bert", "!llama", "!t5")
    assert len(gaps) == 7 and max(gaps.values()) < 1e-6


def test_gradients_through_a_tap_are_those_through_the_projection():
    model, batch = tiny.model("bert"), tiny.batch(*PADDED)
    projected = []
    query = model.encoder.layer[2].attention.self.query
    hook = query.register_forward_hook(lambda module, arguments, output: projected.append(output))
    with tap(model, [("query", 2)]) as seen:
        outputs(model, batch)
    hook.remove()
    tapped = torch.autograd.grad(seen["query", 2].pow(3).sum(), query.weight, retain_graph=True)
    assert_close(tapped, torch.autograd.grad(projected[0].pow(3).sum(), query.weight))


def test_a_new_forward_pass_replaces_the_tensors_of_the_one_before():
    model = tiny.model("llama", "causal")
    with tap(model, [("key", 1)]) as seen:
        outputs(model, tiny.batch([[5]], 5))
        first = seen["key", 1]
        outputs(model, tiny.batch([[5]], 5, seed=1))
    assert seen["key", 1].shape == first.shape and not torch.equal(seen["key", 1], first)


def test_a_teacher_leaves_no_graph():
    model = tiny.model("bert").requires_grad_(False)
    assert not any(value.requires_grad for value in trace(model, tiny.batch(*PADDED), EVERY).taps.values())


def test_a_failing_forward_leaves_the_model_as_it_was():
    model = tiny.model("bert")
    with pytest.raises(IndexError), tap(model, EVERY):
        model(input_ids=torch.tensor([[tiny.VOCAB]]))
    model.encoder.layer[1].intermediate.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), tap(model, EVERY):
        outputs(model, tiny.batch(*PADDED))
    assert model.config._attn_implementation == "sdpa" and not _running.listeners


def test_tapping_costs_less_than_a_millisecond():
    model, wanted = tiny.model("llama", num_hidden_layers=32), [Tap(r, layer) for r in ROLES for layer in (0, -1)]

    def once():
        start = time.perf_counter()
        with tap(model, wanted):
            pass
        return time.perf_counter() - start

    assert min(once() for _ in range(30)) < 1e-3


def test_every_implementation_has_a_mask_function_under_our_name():
    ours = {PREFIX + name for name in IMPLEMENTATIONS}
    assert ours <= set(ALL_ATTENTION_FUNCTIONS) and ours <= set(ALL_MASK_ATTENTION_FUNCTIONS)


SHARED = tiny.config("albert", inner_group_num=2)
OUTSIDE = transformers.GPTJConfig(vocab_size=31, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
DEBERTA = dict(
    **dict(vocab_size=tiny.VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, intermediate_size=40),
    **dict(relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False),
)
CAPPED = tiny.config("gpt2", reorder_and_upcast_attn=True)
CAPPED._attn_implementation = "eager"


def deberta(family, head="Model", **changes):
    settings = transformers.AutoConfig.for_model(family, **DEBERTA, **changes)
    stem = {"deberta": "Deberta", "deberta-v2": "DebertaV2"}[family]
    torch.manual_seed(0)
    return getattr(transformers, stem + head)(settings).eval()


REFUSED = [
    (lambda: transformers.AlbertModel(SHARED), "query", 0, "AlbertModel cannot be tapped: .* several attentions"),
    (lambda: transformers.GPTJModel(OUTSIDE), "query", 0, "GPTJModel cannot be tapped.*does not pass through"),
    (lambda: deberta("deberta"), "key", 1, "DebertaModel cannot be tapped for key: .* layer 1 does not pass through"),
    (lambda: deberta("deberta-v2"), "value", -1, "DebertaV2Model .* for value: .* hidden states and logits can be had"),
    (lambda: transformers.T5Model(tiny.config("t5")), "query", 0, "load its encoder alone"),
    (lambda: transformers.GPT2Model(CAPPED), "query", 0, "reorder_and_upcast_attn"),
    (lambda: tiny.model("bert"), "queries", 0, "no tap 'queries'; did you mean 'query'"),
    (lambda: tiny.model("bert"), "query", 4, "layers 0 to 3"),
    (lambda: torch.nn.Linear(2, 3), "query", 0, "not a Linear"),
]


@pytest.mark.parametrize(("build", "role", "layer", "reason"), REFUSED)
def test_what_cannot_be_tapped_is_refused_by_name_with_the_reason(build, role, layer, reason):
    model = build()
    with pytest.raises(UserError, match=reason), tap(model, [(role, layer)]):
        model(input_ids=torch.tensor([[3, 4, 5]]))


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_attention_of_its_own_leaves_hidden_states_and_logits_to_be_tapped(family):
    """DeBERTa adds position terms to query . key in a function of its own."""
    model, batch, rows = deberta(family, "ForMaskedLM"), tiny.batch(*PADDED), torch.tensor([22, 4, 17])
    with torch.no_grad():
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["segment_ids"], output_hidden_states=True)
        got = trace(model, batch, [("hidden", 0)], rows=rows)
    assert torch.equal(got.taps["hidden", 0], whole.hidden_states[1])
    assert_close(got.logits, whole.logits.flatten(0, 1)[rows])
    known = facts(model.config)
    assert (known.heads, known.kv_heads, known.widths) == (None, None, {"hidden": 48})


def test_logits_made_behind_the_output_embeddings_are_refused():
    with pytest.raises(UserError, match="DebertaV2ForMaskedLM makes its logits behind its output embeddings"):
        trace(deberta("deberta-v2", "ForMaskedLM", legacy=False), tiny.batch(*PADDED), [], rows=torch.tensor([0]))


def test_a_layer_of_shared_weights_has_no_block_of_its_own():
    with pytest.raises(UserError, match="AlbertModel runs one AlbertLayerGroup in several layers"):
        taps.blocks(tiny.model("albert"))


@pytest.mark.filterwarnings("ignore:.*checkpoint.*")
def test_reentrant_checkpointing_is_refused():
    model = tiny.model("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="re-entrant"), tap(model, [("query", -1)]):
        pass


# Compiled models, and attention implementations that are not here


def taken(model, batch):
    """(what is tapped, gradients) of one forward and backward pass."""
    model.zero_grad()
    with tap(model, [*((role, -1) for role in taps.IN_ATTENTION), ("input", 0), ("hidden", 0)]) as seen:
        model(**layout.inputs(model, batch))
    sum(value.square().mean() for value in seen.values()).backward()
    return dict(seen), [p.grad for p in model.parameters()]


def assert_same(ours, theirs, **within):
    assert ours[0].keys() == theirs[0].keys()
    for key, value in ours[0].items():
        assert_close(value, theirs[0][key], **within)
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, **within)


@pytest.mark.parametrize("used", [False, True], ids=["new", "used before"])
@pytest.mark.parametrize("how", ["torch.compile", "model.compile"])
def test_a_model_compiled_as_a_whole_is_tapped_as_written_and_says_so(how, used):
    plain, compiled = (tiny.model("bert", num_hidden_layers=2) for _ in range(2))
    batch = tiny.batch(*PADDED)
    if how == "torch.compile":
        compiled = torch.compile(compiled, backend="eager")
    else:
        compiled.compile(backend="eager")
    if used:
        outputs(compiled, batch)
    with pytest.warns(UserWarning, match="BertModel is compiled as a whole, and inside a tap runs as if it were not"):
        found = taken(compiled, batch)
    assert_same(found, taken(plain, batch), atol=0, rtol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_compiled_blocks_stay_compiled_in_a_tap_whatever_the_length(family):
    """All but the last, whose attention is tapped: one graph, and one more when lengths begin to differ.

    Compiled, the last would have gradients of zeros behind its attention.
    """
    plain, compiled = (tiny.model(family, num_hidden_layers=3).double() for _ in range(2))
    torch._dynamo.reset()
    counters.clear()
    counted = CompileCounterWithBackend("aot_eager")
    for block in taps.blocks(compiled):
        block.compile(backend=counted)
    graphs = []
    for lengths in ([[6, 5], [9]], [[4, 3], [7]], [[9, 8], [5]], [[2, 8], [13]]):
        batch = tiny.batch(lengths, max(map(sum, lengths)))
        assert_same(taken(compiled, batch), taken(plain, batch), atol=1e-9, rtol=1e-9)
        graphs.append(counted.frame_count)
    assert graphs == [1, 2, 2, 2] and not counters["graph_break"]


def test_flash_attention_gets_what_it_asks_for(monkeypatch):
    """A stub in its place: [B, H, T, d], the padding mask as it is, lengths of packed documents, its own name."""
    given = []

    def flash(module, query, key, value, mask, scaling=None, **kwargs):
        given.append((query.shape, mask, module.config._attn_implementation, module.is_causal, kwargs))
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = (query @ key.mT * scaling).masked_fill(torch.ones(query.shape[-2], key.shape[-2]).triu(1) > 0, -1e9)
        return (scores.masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1) @ value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model, batch = tiny.model("llama"), tiny.batch(*PADDED)
    expected = outputs(model, batch)
    model.config._attn_implementation = "flash_attention_2"
    lengths = {"cu_seq_lens_q": torch.tensor([0, 11, 18, 19]), "max_length_q": 11}
    mask = (batch["segment_ids"] > 0).long()
    with tap(model, [("key", 1)]) as seen:
        found = model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False, **lengths)[0]
    assert_close(found[mask > 0], expected[mask > 0], atol=1e-5, rtol=1e-5)
    shape, told, name, causal, others = given[1]
    assert shape == (3, tiny.HEADS, 11, 8) and torch.equal(told, mask) and name == "flash_attention_2" and causal
    assert others["max_length_q"] == 11 and torch.equal(others["cu_seq_lens_q"], lengths["cu_seq_lens_q"])
    assert seen["key", 1].shape == (3, tiny.KV_HEADS, 11, 8) and len(given) == tiny.LAYERS


def test_an_implementation_that_is_not_here_is_refused_by_name():
    with pytest.raises(UserError, match=r"engine.attention: BertModel cannot take flash_attention_2 here: "):
        choose(tiny.model("bert"), "flash_attention_2")
    with pytest.raises(UserError, match=r"flex_attention has no backward pass on a CPU"):
        choose(tiny.model("gemma2"), "flex_attention")
