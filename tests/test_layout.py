"""Packed or padded, on either side: a document gets the same outputs."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.testing import assert_close

from distill import layout, loading
from distill.objectives.ce import CrossEntropy
from distill.taps import trace
from growth.errors import UserError

CASES = [(family, attention) for family in tiny.EVERY for attention in tiny.attentions(family)]
DOCUMENTS = [[13, 3, 1, 9], [9, 14], [12]]  # a window of 5, one token alone, and padding behind two of the rows
LENGTH = 27


def documents(batch):
    """Each document of a packed batch in a padded row of its own."""
    ids, segments = batch["input_ids"], batch["segment_ids"]
    found = [ids[r][segments[r] == s] for r in range(len(ids)) for s in range(1, int(segments[r].max()) + 1)]
    rows = torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=tiny.PAD)
    lengths = torch.tensor([len(d) for d in found])
    return {"input_ids": rows, "segment_ids": (torch.arange(rows.shape[1]) < lengths[:, None]).long()}


def outputs(model, batch):
    """Of the real tokens: [N, D]."""
    return model(**layout.inputs(model, batch))[0][batch["segment_ids"] > 0]


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_packed_documents_do_not_see_each_other(family, attention):
    model, packed = tiny.model(family, attention=attention), tiny.batch(DOCUMENTS, LENGTH)
    assert layout.packable(model.config)
    alone = outputs(model, documents(packed))
    assert (outputs(model, packed) - alone).abs().max() < 1e-5 * alone.abs().max()


def learned(model, head, batch):
    """The loss, and its gradient by every parameter."""
    if head is None:
        loss = outputs(model, batch).square().mean()
    else:
        objective, labels = CrossEntropy(objective=head), batch["input_ids"].where(batch["segment_ids"] > 0, -100)
        batch = {**batch, "labels": labels}
        rows, _ = objective._scored(batch)
        loss = objective.terms(trace(model, batch, [], rows=rows), None, batch)[head] / len(rows)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", tiny.EVERY)
def test_packed_rows_have_the_loss_and_the_gradients_of_their_documents(family):
    """Also through routers (whose own loss, over all tokens of a batch, is off) and through windows."""
    head, packed = tiny.head(family), tiny.batch(DOCUMENTS, LENGTH)
    # Gemma-2's softmax is float32: the least number of float64 would be minus infinity in it
    dtype = torch.float32 if family == "gemma2" else torch.float64
    (loss, ours), (alone, theirs) = (
        learned(tiny.model(family, head).to(dtype), head, batch) for batch in (packed, documents(packed))
    )
    assert loss == pytest.approx(alone, rel=1e-6) and ours.keys() == theirs.keys()
    largest = max(gradient.abs().max() for gradient in theirs.values())
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).abs().max() < 1e-5 * largest, name


@pytest.mark.parametrize("window", [{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_keep_to_their_document(family, window):
    model, packed = tiny.model(family, **window), tiny.batch(DOCUMENTS, LENGTH)
    assert "sliding_attention" in model.config.layer_types
    assert_close(outputs(model, packed), outputs(model, documents(packed)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_padding_on_the_right_is_what_transformers_does_by_itself(family, attention):
    model, batch = tiny.model(family, attention=attention), tiny.batch([[13], [4], [1]], 13)
    alone = model(input_ids=batch["input_ids"], attention_mask=batch["segment_ids"])[0]
    ours, theirs = outputs(model, batch), alone[batch["segment_ids"] > 0]
    routed = family in ("mixtral", "qwen2_moe")  # an expert multiplies all its tokens at once, padding with them
    assert_close(ours, theirs, atol=1e-5, rtol=1e-5) if routed else assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_padding_on_the_left_changes_nothing(family, attention):
    model = tiny.model(family, attention=attention)
    left, right = (tiny.batch([[13], [4], [1]], 13, side=side) for side in ("left", "right"))
    assert_close(outputs(model, left), outputs(model, right), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [[[5, 4], [3]], [[5], [3]]])
@pytest.mark.parametrize("family", tiny.EVERY)
def test_padding_poisons_no_gradient(family, packed):
    model, batch = tiny.model(family), tiny.batch(packed, 12)
    outputs(model, batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_positions_start_again_with_each_document():
    segments = torch.tensor([[1, 1, 2, 3, 3, 3, 0, 0], [0, 0, 1, 1, 1, 1, 1, 2]])
    assert layout.positions(segments).tolist() == [[0, 1, 0, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_gemma_that_sees_both_ways_is_packed_and_is_not_causal(attention):
    """EmbeddingGemma."""
    model, packed = (
        tiny.model("gemma3_text", use_bidirectional_attention=True, attention=attention),
        tiny.batch(DOCUMENTS, LENGTH),
    )
    assert not loading.causal(model.config) and loading.causal(tiny.config("gemma3_text"))
    assert_close(outputs(model, packed), outputs(model, documents(packed)), atol=1e-5, rtol=1e-5)


def test_a_table_of_positions_ends_where_it_ends():
    assert layout.longest(tiny.config("albert")) == layout.longest(tiny.config("electra")) == tiny.LENGTH
    assert layout.longest(tiny.config("phi3")) is None


def test_a_bert_that_decodes_is_not_packed():
    assert not layout.packable(tiny.config("bert", is_decoder=True))


def test_packed_rows_are_refused_under_an_attention_that_was_not_proven():
    model = tiny.model("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert not layout.packable(model.config)
    with pytest.raises(UserError, match=r"need sdpa, eager or flex attention, not flash_attention_2"):
        layout.inputs(model, tiny.batch(DOCUMENTS, LENGTH))


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama", "qwen3", "gemma2", "gemma3_text"])
def test_flex_attention_keeps_packed_documents_apart(family):
    """Uncompiled, which is slow and the same."""
    packed = tiny.batch(DOCUMENTS, LENGTH)
    expected = outputs(tiny.model(family, attention="eager"), documents(packed))
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = outputs(tiny.model(family, attention="flex_attention"), packed)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
