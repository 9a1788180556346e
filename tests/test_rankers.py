"""Rankers: scores against formulas written as loops, of every pair alone as in any batch, saved and read back."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
import transformers
from tokenizers import processors

from distill import layout, loading
from distill.ranking import colbert, encoding, export, kinds, rankers, vectors
from distill.ranking import ranker as base
from distill.ranking.joining import join_of
from distill.ranking.kinds import ColBERTKind, CrossKind, DualKind, Join, PreTTKind, TKKind
from growth import files
from growth.errors import UserError

FAMILIES = ("bert", "distilbert", "modernbert", "roberta")
KINDS = {
    "cross_encoder": CrossKind(join=Join(between=(2, 3), skip=0)),
    "dual_cls": DualKind(),
    "dual_mean": DualKind(pooling="mean", similarity="cosine", dims=7),
    "dual_last": DualKind(pooling="last", dims=5),
    "colbert": ColBERTKind(masks=2, mask_token=tiny.MASK, dims=11),
    "colbert_cosine": ColBERTKind(similarity="cosine"),
    "prett": PreTTKind(apart=2, query_length=10, passage_length=30),
    "tk": TKKind(),
}
PAIRS = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 3], [2, 0], [0, 3]])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def ranker_of(kind, family="bert", **changes):
    return rankers.build(kind, tiny.model(family, **changes).double(), seed=1)


def draw(side="right"):
    """Three queries and four passages, with more padding than any needs."""
    queries = tiny.batch([[5], [3], [8]], 11, side)
    return queries, tiny.batch([[12], [4], [23], [9]], 26, side, seed=1)


def row(batch, i):
    """One text without padding."""
    real = batch["segment_ids"][i] > 0
    return {key: batch[key][i][real][None] for key in ("input_ids", "segment_ids")}


def each_alone(ranker, queries, passages):
    one = torch.tensor([[0, 0]])
    return torch.cat([ranker(row(queries, q), row(passages, p), one) for q, p in PAIRS.tolist()])


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


# Laws of all rankers


def test_a_pair_has_the_same_score_alone_and_in_any_batch_padded_on_any_side(family, kind):
    ranker = ranker_of(kind, family)
    found = ranker(*draw(), PAIRS)
    near(found, each_alone(ranker, *draw()))
    near(ranker(*draw("left"), PAIRS), found)
    assert found.shape == (6,) and found.std() > 1e-3


def test_texts_encoded_once_have_the_gradients_of_pairs_scored_one_by_one(family, kind):
    ranker, weights = ranker_of(kind, family), torch.randn(6, generator=torch.Generator().manual_seed(0)).double()
    (ranker(*draw(), PAIRS) * weights).sum().backward()
    once = {name: p.grad for name, p in ranker.named_parameters() if p.grad is not None}
    ranker.zero_grad(set_to_none=True)
    (each_alone(ranker, *draw()) * weights).sum().backward()
    plain = {name: p.grad for name, p in ranker.named_parameters() if p.grad is not None}
    assert once.keys() == plain.keys() and len(once) > 10
    for name, gradient in plain.items():
        least = 1e-6 if family == "modernbert" else 1e-10  # it turns queries and keys in float32
        torch.testing.assert_close(once[name], gradient, atol=least * max(1, float(gradient.abs().max())), rtol=least)


def test_a_ranker_read_back_scores_the_same_to_the_bit(family, kind, tmp_path):
    ranker = rankers.build(kind, tiny.model(family), seed=1)
    again = rankers.load(rankers.save(ranker, tmp_path / "ranker"))
    assert again.kind == ranker.kind and not again.training
    assert torch.equal(again(*draw(), PAIRS), ranker(*draw(), PAIRS))
    plain = transformers.AutoModel.from_pretrained(tmp_path / "ranker" / "encoder")
    assert type(plain) is type(ranker.encoder)


def test_many_small_passes_are_one_big_one(kind, monkeypatch):
    ranker = ranker_of(kind)
    found = ranker(*draw(), PAIRS)
    monkeypatch.setattr(encoding, "PLACES", 1)
    monkeypatch.setattr(base, "NUMBERS", 1)
    near(ranker(*draw(), PAIRS), found)


def test_a_head_comes_from_its_seed(kind):
    one, same, other = (rankers.build(kind, tiny.model("bert"), seed=seed) for seed in (1, 1, 2))
    for name, tensor in one.head().items():
        assert torch.equal(tensor, same.head()[name])
        assert name == "mixture" or not torch.equal(tensor, other.head()[name])


@pytest.mark.parametrize("name", ["dual_cls", "colbert", "tk"])
def test_each_text_goes_through_the_encoder_once_with_little_padding(family, name, monkeypatch):
    ranker, seen, (queries, passages) = ranker_of(KINDS[name], family), [], draw()
    monkeypatch.setattr(encoding, "PLACES", 50)
    ranker.encoder.register_forward_pre_hook(lambda *call: seen.append(call[-1]["input_ids"]), with_kwargs=True)
    ranker(queries, passages, PAIRS)
    masks = 3 * 2 if name == "colbert" else 0
    tokens, places = (sum(count(side) for side in (queries, passages)) for count in (_tokens, _places))
    assert sum(int((ids > 0).sum()) for ids in seen) == tokens + masks
    assert sum(ids.numel() for ids in seen) < 0.75 * places and max(ids.numel() for ids in seen) <= 50


def _tokens(batch):
    return int((batch["segment_ids"] > 0).sum())


def _places(batch):
    return batch["segment_ids"].numel()


# Each against its formula


def test_a_cross_encoder_is_a_linear_score_of_the_first_token_of_both_texts(family):
    typed = family == "bert"
    ranker = ranker_of(CrossKind(join=Join(between=(3,), skip=1, typed=typed)), family)
    queries, passages = draw()
    for (q, p), found in zip(PAIRS.tolist(), ranker(queries, passages, PAIRS), strict=True):
        one, other = (row(side, i)["input_ids"] for side, i in ((queries, q), (passages, p)))
        ids = torch.cat([one, torch.tensor([[3]]), other[:, 1:]], 1)
        types = torch.tensor([[0] * (one.shape[1] + 1) + [1] * (other.shape[1] - 1)])
        how = {"token_type_ids": types} if typed else {}
        hidden = ranker.encoder(ids, attention_mask=torch.ones_like(ids), **how).last_hidden_state
        near(found, hidden[0, 0] @ ranker.linear.weight[0] + ranker.linear.bias[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_dual_encoder_is_a_product_of_pooled_vectors(pooling, similarity):
    ranker = ranker_of(DualKind(pooling=pooling, similarity=similarity, dims=7))
    queries, passages = draw()

    def vector(batch, i):
        hidden = ranker.encoder(row(batch, i)["input_ids"]).last_hidden_state[0]
        pooled = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(0)}[pooling] @ ranker.linear.weight.T
        return pooled / pooled.norm() if similarity == "cosine" else pooled

    expected = torch.stack([vector(queries, q) @ vector(passages, p) for q, p in PAIRS.tolist()])
    near(ranker(queries, passages, PAIRS), expected)
    assert ranker.margin_bound == (2 if similarity == "cosine" else None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_decoders_are_read_at_their_last_token(family):
    for kind in (CrossKind(join=Join(skip=0)), DualKind(pooling="last"), DualKind(pooling="mean")):
        ranker = ranker_of(kind, family)
        near(ranker(*draw("left"), PAIRS), each_alone(ranker, *draw()))
    ids = row(draw()[0], 0)["input_ids"]
    hidden = ranker.encoder(ids).last_hidden_state[0]
    dual = rankers.build(DualKind(pooling="last"), ranker.encoder)
    near(dual.vectors(encoding.texts(row(draw()[0], 0)))[0], hidden[-1])
    with pytest.raises(UserError, match="sees no other"):
        rankers.build(DualKind(pooling="cls"), tiny.model(family))


def ragged(negative: bool):
    """Vectors of two queries and three passages, their masks, in float64; with `negative` no similarity is above 0."""
    generator = torch.Generator().manual_seed(5)
    queries, passages = (torch.randn(n, t, 6, generator=generator).double() for n, t in ((2, 4), (3, 9)))
    if negative:
        queries, passages = queries.abs(), -passages.abs()
    lengths = torch.tensor([4, 2]), torch.tensor([3, 9, 1])
    masks = [torch.arange(x.shape[1]) < n[:, None] for x, n in zip((queries, passages), lengths, strict=True)]
    return queries.requires_grad_(), masks[0], passages.requires_grad_(), masks[1]


@pytest.mark.parametrize("negative", [True, False])
def test_maxsim_is_exact_with_similarities_below_zero_and_ragged_lengths(negative):
    queries, query_real, passages, passage_real = given = ragged(negative)
    pairs = torch.tensor([[q, p] for q in range(2) for p in range(3)])
    found = colbert.maxsim(*given, pairs)
    for (q, p), score in zip(pairs.tolist(), found.tolist(), strict=True):
        real = [passages[p][j].tolist() for j in range(9) if passage_real[p][j]]
        expected = sum(
            max(sum(a * b for a, b in zip(queries[q][i].tolist(), other, strict=True)) for other in real)
            for i in range(4)
            if query_real[q][i]
        )
        assert score == pytest.approx(expected, abs=1e-10)
        assert not negative or score < 0
    whole = queries[pairs[:, 0]] @ passages[pairs[:, 1]].mT
    whole = whole.masked_fill(~passage_real[pairs[:, 1]][:, None], -torch.inf).amax(-1)
    plain = whole.masked_fill(~query_real[pairs[:, 0]], 0).sum(-1)
    weights = torch.arange(1.0, 7).double()
    near(
        torch.autograd.grad(found @ weights, [queries, passages]),
        torch.autograd.grad(plain @ weights, [queries, passages]),
    )


def test_masks_stand_before_the_last_token_of_a_query_and_are_matched():
    ranker = ranker_of(KINDS["colbert"])
    queries, passages = draw()
    longer = []
    for i in range(3):
        ids = row(queries, i)["input_ids"]
        longer.append(torch.cat([ids[:, :-1], torch.tensor([[tiny.MASK] * 2]), ids[:, -1:]], 1)[0].tolist())
    plain = rankers.build(KINDS["colbert"].model_copy(update={"masks": 0}), ranker.encoder, seed=1)
    batch = {"input_ids": torch.zeros(3, 10).long(), "segment_ids": torch.zeros(3, 10).long()}
    for i, ids in enumerate(longer):
        batch["input_ids"][i, : len(ids)], batch["segment_ids"][i, : len(ids)] = torch.tensor(ids), 1
    near(ranker(queries, passages, PAIRS), plain(batch, passages, PAIRS))
    with pytest.raises(UserError, match="mask_token"):
        ranker_of(ColBERTKind(masks=8))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_prett_is_one_pass_whose_first_layers_do_not_look_across(family):
    ranker = ranker_of(KINDS["prett"], family)
    queries, passages = draw()
    base = ranker.encoder
    blocks = base.transformer.layer if family == "distilbert" else base.encoder.layer
    skip = tiny.PAD + 1 if family == "roberta" else 0
    for (q, p), found in zip(PAIRS.tolist(), ranker(queries, passages, PAIRS), strict=True):
        one, other = (row(side, i)["input_ids"] for side, i in ((queries, q), (passages, p)))
        n, m = one.shape[1], other.shape[1]
        places = torch.tensor([[*range(n), *range(10, 10 + m)]]) + skip
        hidden = base.embeddings(input_ids=torch.cat([one, other], 1), position_ids=places)
        apart = torch.zeros(1, 1, n + m, n + m, dtype=torch.bool)
        apart[..., :n, :n] = apart[..., n:, n:] = True
        for block in blocks[:2]:
            hidden = block(hidden, apart)
        hidden = torch.cat([hidden[:, :n], hidden[:, n + 1 :]], 1)  # without the passage's [CLS]
        for block in blocks[2:]:
            hidden = block(hidden, None)
        near(found, hidden[0, 0] @ ranker.linear.weight[0])


def test_prett_leaves_the_encoder_as_it_was(family):
    ranker = ranker_of(KINDS["prett"], family)
    before = ranker.encoder(**layout.inputs(ranker.encoder, draw()[0])).last_hidden_state
    ranker(*draw(), PAIRS)
    assert torch.equal(ranker.encoder(**layout.inputs(ranker.encoder, draw()[0])).last_hidden_state, before)
    assert not any("forward" in vars(module) for module in ranker.encoder.modules())


def test_tk_is_its_kernels_one_by_one():
    ranker = ranker_of(TKKind(centres=(1.0, 0.4, -0.6), width=0.2))
    queries, passages = draw()

    def words(batch, i):
        ids = row(batch, i)["input_ids"]
        hidden, table = ranker.encoder(ids).last_hidden_state[0], ranker.encoder.get_input_embeddings().weight[ids[0]]
        return [(v / v.norm()).tolist() for v in 0.5 * hidden + 0.5 * table]

    for (q, p), found in zip(PAIRS.tolist(), ranker(queries, passages, PAIRS).tolist(), strict=True):
        score = 0.0
        for weight, centre in zip(ranker.linear.weight[0].tolist(), (1.0, 0.4, -0.6), strict=True):
            for one in words(queries, q):
                cosines = [sum(a * b for a, b in zip(one, other, strict=True)) for other in words(passages, p)]
                score += weight * math.log(max(sum(math.exp(-((c - centre) ** 2) / 0.08) for c in cosines), 1e-10))
        assert found == pytest.approx(score, abs=1e-10)


# Joining as a tokenizer does


def tokenizer_with(single: str, pair: str, types: bool = False):
    known = tiny.tokenizer()
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    names = [("[CLS]", tiny.CLS), ("[SEP]", tiny.SEP)]
    known.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=names
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=known.backend_tokenizer, model_max_length=tiny.LENGTH, model_input_names=inputs, **special
    )


@pytest.mark.parametrize(
    "single, pair, types, expected",
    [
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", True, Join(skip=1, typed=True)),
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", False, Join(skip=1)),
        ("[CLS] $A [SEP]", "[CLS] $A [SEP] [SEP] $B [SEP]", False, Join(between=(tiny.SEP,), skip=1)),
        ("$A", "$A $B", False, Join(skip=0)),
    ],
)
def test_pairs_are_joined_as_their_tokenizer_joins_them(single, pair, types, expected):
    tokenizer = tokenizer_with(single, pair, types)
    assert join_of(tokenizer) == expected
    ranker = ranker_of(CrossKind(join=expected))
    one, other = "a tale", "of two words"
    both = tokenizer(one, other, return_tensors="pt")
    hidden = ranker.encoder(**both).last_hidden_state
    sides = [tokenizer(text, return_tensors="pt") for text in (one, other)]
    sides = [{"input_ids": s["input_ids"], "segment_ids": s["attention_mask"]} for s in sides]
    near(ranker(*sides, torch.tensor([[0, 0]])), ranker.linear(hidden[:, 0])[:, 0])


def test_a_tokenizer_that_joins_in_a_way_of_its_own_is_refused():
    with pytest.raises(UserError, match="a way of its own"):
        join_of(tokenizer_with("[CLS] $A [SEP]", "[CLS] $B [SEP] $A"))


# Words for TK


def test_tk_starts_from_a_file_of_word_vectors(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("the 1 2 3 4\n, 0.5 0 0 -1\nnew york 1 1 1 1\n")
    words, table = vectors.glove(path)
    assert words == ["the", ",", "new york"] and table.tolist()[1] == [0.5, 0, 0, -1]
    encoder = loading.load(vectors.tk_encoder(path, tmp_path / "tk", heads=2, ffn=7))
    assert encoder.config.num_hidden_layers == 2
    near(
        encoder.get_input_embeddings().weight[:3], torch.tensor([[0.0] * 4, [2.5 / 3, 1, 4 / 3, 4 / 3], [1.0, 2, 3, 4]])
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tk")
    assert tokenizer("The other, the")["input_ids"] == [2, 1, 3, 2]


def test_tk_starts_from_the_words_of_a_teacher(tmp_path):
    teacher = tiny.model("bert")
    source = tiny.save(teacher, tmp_path / "teacher", tiny.tokenizer())
    encoder = loading.load(vectors.tk_encoder(source, tmp_path / "tk", heads=6, ffn=9, layers=3, seed=4))
    assert torch.equal(encoder.get_input_embeddings().weight, teacher.get_input_embeddings().weight)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "tk").vocab_size == tiny.VOCAB
    with pytest.raises(UserError, match=r"heads=10 does not divide .* 48; 16, 12, 8"):
        vectors.tk_encoder(source, tmp_path / "other")


@pytest.mark.parametrize(
    "text, error",
    [
        ("the 1 2 3\nof 1 2\n", r"glove.txt:2: expected a word and 3 numbers"),
        ("the 1 2 3\nof 1 two 3\n", r"glove.txt:2: could not convert"),
        ("the 1 2 3\nof 1 nan 3\n", r"glove.txt:2: NaN"),
        ("the 1 2 3\nthe 1 2 3\n", r"glove.txt:2: .*'the' stood before"),
        ("400000 300\n", r"glove.txt:1: expected a word"),
        ("", "no word vectors"),
    ],
)
def test_a_file_of_word_vectors_that_is_broken_is_refused_by_its_line(text, error, tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=error):
        vectors.glove(path)


# What bad input gets


def test_what_is_no_batch_of_texts_is_refused():
    ranker = ranker_of(DualKind())
    queries, passages = draw()
    with pytest.raises(UserError, match="one text a row"):
        ranker(tiny.batch([[2, 3]], 9), passages, PAIRS[:1])
    with pytest.raises(UserError, match="text 1 of a batch has no token"):
        ranker(tiny.batch([[2], []], 9), passages, PAIRS[:1])
    with pytest.raises(UserError, match=r"\[P, 2\], not \[6\]"):
        ranker(queries, passages, PAIRS[:, 0])
    with pytest.raises(UserError, match="a text of 80 tokens, and this bert reads 70"):
        ranker(queries, tiny.batch([[80]], 80), PAIRS[:1])
    with pytest.raises(UserError, match="a query of 31 tokens; query_length is 30"):
        ranker(tiny.batch([[31]], 31), passages, PAIRS[:1])
    with pytest.raises(UserError, match="a passage of 201 tokens; passage_length is 200"):
        ranker(queries, tiny.batch([[201]], 203), PAIRS[:1])


def test_a_prett_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"no PreTT of gpt2.*bert, roberta, distilbert and modernbert"):
        ranker_of(PreTTKind(), "gpt2")
    with pytest.raises(UserError, match="leaves no layer to join, the encoder has 4"):
        ranker_of(PreTTKind(apart=4))
    with pytest.raises(UserError, match="is 230, this bert has 70 positions"):
        ranker_of(PreTTKind())


@pytest.mark.parametrize(
    "change, error",
    [
        ({"kind": "dual_encodr"}, "no kind 'dual_encodr'; did you mean 'dual_encoder'"),
        ({"version": 9}, "version 1 is expected"),
        ({"pooling": "max"}, "ranker.json: pooling"),
        ({"depth": 3}, "ranker.json: depth"),
        ({"dims": 8}, r"linear.weight is F32 \[7, 48\], ranker.json asks for float \[8, 48\]"),
        ({"dims": None, "kind": "colbert", "masks": 0, "pooling": None}, "ranker.json: pooling"),
    ],
)
def test_a_ranker_json_that_says_something_else_is_refused(change, error, tmp_path):
    path = rankers.save(rankers.build(KINDS["dual_mean"], tiny.model("bert")), tmp_path / "ranker")
    content = files.read_json(path / "ranker.json")
    files.write_json(path / "ranker.json", content | change)
    with pytest.raises(UserError, match=error):
        rankers.load(path)


def test_a_head_that_is_not_the_rankers_is_refused(tmp_path):
    ranker = rankers.build(KINDS["cross_encoder"], tiny.model("bert"))
    ranker.linear.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"linear.bias not finite"):
        rankers.load(rankers.save(ranker, tmp_path / "nan"))
    other = rankers.save(rankers.build(KINDS["tk"], tiny.model("bert")), tmp_path / "tk")
    (other / "head.safetensors").replace(tmp_path / "nan" / "head.safetensors")
    with pytest.raises(UserError, match=r"lacks linear.bias, .* made of linear.bias, linear.weight"):
        rankers.load(tmp_path / "nan")
    with pytest.raises(UserError, match=r"head.safetensors does not exist"):
        rankers.load(other)


@pytest.mark.parametrize("name, value", kinds.KINDS.items())
def test_ranker_json_is_read_as_it_is_written(name, value):
    content = kinds.written(value(query_length=7))
    assert content["kind"] == name and kinds.read(content, "here") == value(query_length=7)


# Beside sentence-transformers


TEXTS = ["a question", "another, longer one"], ["an answer", "no", "that has nothing to do with it"]


def exported(ranker, tmp_path, tokenizer):
    source = tiny.save(ranker.encoder, tmp_path / "source", tokenizer)
    return str(rankers.save(ranker, tmp_path / "exported", tokenizer=source))


def scored(ranker, tokenizer):
    """All queries with all passages [2, 3]."""
    sides = [tokenizer(list(texts), padding=True, return_tensors="pt") for texts in TEXTS]
    sides = [{"input_ids": s["input_ids"], "segment_ids": s["attention_mask"]} for s in sides]
    return ranker(*sides, torch.cartesian_prod(torch.arange(2), torch.arange(3))).view(2, 3).detach()


DUALS = [
    DualKind(pooling="cls"),
    DualKind(pooling="mean", similarity="cosine"),
    DualKind(pooling="mean", dims=7),
    DualKind(pooling="last", similarity="cosine", dims=9),
]


@pytest.mark.parametrize("kind", DUALS, ids=lambda k: f"{k.pooling}-{k.similarity}-{k.dims}")
def test_sentence_transformers_scores_an_exported_dual_encoder_the_same(kind, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    tokenizer = tokenizer_with("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    for family in FAMILIES:
        ranker = rankers.build(kind, tiny.model(family))
        model = library.SentenceTransformer(exported(ranker, tmp_path / family, tokenizer), device="cpu")
        found = model.similarity(model.encode_query(TEXTS[0]), model.encode_document(TEXTS[1]))
        torch.testing.assert_close(found, scored(ranker, tokenizer), atol=1e-4, rtol=1e-5)
        assert (model[0].query_length, model[0].document_length, model.similarity_fn_name) == (30, 200, kind.similarity)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_sentence_transformers_scores_an_exported_cross_encoder_the_same(family, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    typed = family == "bert"
    tokenizer = tokenizer_with("[CLS] $A [SEP]", f"[CLS] $A [SEP] $B:{+typed} [SEP]:{+typed}", typed)
    ranker = rankers.build(CrossKind(join=join_of(tokenizer), query_length=25, passage_length=40), tiny.model(family))
    model = library.CrossEncoder(exported(ranker, tmp_path, tokenizer), device="cpu")
    found = model.predict([(q, p) for q in TEXTS[0] for p in TEXTS[1]], convert_to_tensor=True)
    torch.testing.assert_close(found.view(2, 3), scored(ranker, tokenizer), atol=1e-5, rtol=1e-5)
    assert model.max_seq_length == 64


@pytest.mark.parametrize("kind", [ColBERTKind(dims=7), ColBERTKind(similarity="cosine")], ids=["dot", "cosine"])
def test_sentence_transformers_scores_an_exported_colbert_the_same(kind, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    tokenizer = tokenizer_with("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]")
    ranker = rankers.build(kind, tiny.model("modernbert"))
    model = library.MultiVectorEncoder(exported(ranker, tmp_path, tokenizer), device="cpu")
    found = model.similarity(model.encode_query(TEXTS[0]), model.encode_document(TEXTS[1]))
    torch.testing.assert_close(found, scored(ranker, tokenizer), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_directory_of_a_ranker_tells_sentence_transformers_where_its_parts_are(kind, tmp_path):
    """Without it: every module that is named is there, and the head stands in one of them as it is."""
    ranker = rankers.build(KINDS[kind], tiny.model("bert"))
    path = Path(exported(ranker, tmp_path, tiny.tokenizer()))
    told = kind not in ("colbert", "prett", "tk")  # [MASK] elsewhere; no class for them
    assert (path / "modules.json").exists() is told is (export.refusal(ranker) is None)
    if not told:
        return
    parts = files.read_json(path / "modules.json")
    assert parts[0]["path"] == "encoder" and [part["idx"] for part in parts] == list(range(len(parts)))
    assert all((path / part["path"] / "config.json").exists() for part in parts)
    assert files.read_json(path / "encoder" / "sentence_bert_config.json")["max_seq_length"] == ranker.kind.longest
    dense = [safetensors.torch.load_file(path / part["path"] / "model.safetensors") for part in parts[1:]
             if part["type"].endswith("Dense")]  # fmt: skip
    assert [set(found) for found in dense] == ([set(ranker.head())] if ranker.head() else [])
    assert all(torch.equal(found[name], tensor) for found in dense for name, tensor in ranker.head().items())
    configs = {part["type"].rpartition(".")[2]: files.read_json(path / part["path"] / "config.json") for part in parts}
    pooling = {"cross_encoder": "cls", "dual_cls": "cls", "dual_mean": "mean", "dual_last": "lasttoken"}.get(kind)
    assert configs.get("Pooling", {}).get("pooling_mode") == pooling
    assert ("Normalize" in configs) is (getattr(ranker.kind, "similarity", "") == "cosine")
