"""Laws of spans and of what is compared over them, with tokenisers of every kind and text of any script."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from distill.corpus import tokens, vocabulary
from distill.heads import Logits
from distill.objectives.span import Aligned
from distill.objectives.span_sum import (
    Predicted,
    aligned,
    likelihood_divergence,
    shared_divergence,
)
from distill.taps import trace
from distill.teachers.alignment import Alignment
from distill.teachers.spans import Tokens, Writing, shared, spans

PROSE = ["The cat sat on the mat, and the other cats did not. ", "naïve café straße x = 12 \n"] * 9
OTHER = ["日本語の文章 日本 naïveté cafés ½ ﬁne and the matter is other ", "🙂🙂 é e\u0301 the end. "] * 9
WORDS = ["the", "cat", "mat", "é", "e\u0301", "日本", "語", "🙂", "½", "ﬁ", "ß", "x12", "0", ".", "Ω", "<s>",
         " ", "  ", "\n"]  # fmt: skip
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)
EXACT, KINDS = ("bpe", "other_bpe"), ("bpe", "other_bpe", "wordpiece", "unigram", "fallback", "spaced_bpe", "letters")
PAIRS = st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS))
FEW = settings(max_examples=120, deadline=None)


@cache
def tokenizer(kind):
    if kind == "fallback":
        return llama()
    if kind == "letters":
        return tiny.tokenizer()
    if kind == "spaced_bpe":
        spaced = vocabulary.train("bpe", 300, PROSE)
        spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        return spaced
    name, texts = {"other_bpe": ("bpe", OTHER), "bpe": ("bpe", PROSE)}.get(kind, (kind, PROSE + OTHER))
    return vocabulary.train(name, 360, texts)


def llama():
    """Sentencepiece as Llama has it: a blank in front, bytes for what has no piece, no end put by itself."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁thecatsmné.", "▁the", "▁c", "at", "▁m"]
    raw = Tokenizer(models.Unigram([(p, 0.0 if p[0] == "<" else -float(len(pieces))) for p in pieces], 0, True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@cache
def writing(kind):
    return Writing(tokenizer(kind))


def members(of):
    """{span: its tokens}."""
    return {n: np.flatnonzero(of == n).tolist() for n in range(of.max(initial=-1) + 1)}


def plain(data: bytes) -> str:
    """What all these tokenisers take for the same."""
    text = unicodedata.normalize("NFKD", data.decode(errors="replace").lower())
    return "".join(c for c in text if not c.isspace() and not unicodedata.combining(c))


# Boundaries and spans


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_tokeniser(kind):
    @given(TEXT)
    @FEW
    def law(text):
        assert writing(kind).encode(text).ids.tolist() == tokens.encode(tokenizer(kind), [text])[0]

    law()


@given(st.sampled_from(KINDS), TEXT)
@FEW
def test_every_token_is_a_span_of_its_own_beside_the_same_tokeniser(kind, text):
    seen = writing(kind).encode(text)
    one, other = spans(seen, writing(kind).encode(text))
    known = ~seen.spoilt
    assert (one == other).all() and (one[known] == np.arange(known.sum())).all() and (one[~known] == -1).all()


@given(st.permutations(EXACT), TEXT)
@FEW
def test_spans_of_byte_level_tokenisers_end_where_both_have_written_the_same_bytes(kinds, text):
    sides = [writing(kind) for kind in kinds]
    seen = [side.encode(text) for side in sides]
    ends = [np.cumsum([len(side.bytes[i]) for i in s.ids]) for side, s in zip(sides, seen, strict=True)]
    common = np.intersect1d(*ends)
    for found, end in zip(spans(*seen), ends, strict=True):
        assert found.tolist() == np.searchsorted(common, end).tolist()


@given(PAIRS, TEXT)
@FEW
def test_both_sides_of_a_span_are_the_same_text(kinds, text):
    sides = [writing(kind) for kind in kinds]
    seen = [side.encode(text) for side in sides]
    found = [members(of) for of in spans(*seen)]
    assert found[0].keys() == found[1].keys()
    for span in found[0]:
        inside = [side[span] for side in found]
        assert all(places and places == list(range(places[0], places[-1] + 1)) for places in inside)
        one, other = (
            b"".join(side.bytes[s.ids[i]] for i in places) for side, s, places in zip(sides, seen, inside, strict=True)
        )
        assert one == other or plain(one) == plain(other)


@given(PAIRS, TEXT)
@FEW
def test_spans_do_not_depend_on_who_is_the_student(kinds, text):
    one, other = (writing(kind).encode(text) for kind in kinds)
    assert [x.tolist() for x in spans(one, other)] == [x.tolist() for x in spans(other, one)][::-1]


def test_spans_are_as_fine_as_they_can_be():
    shown = {
        ("bpe", "wordpiece"): ["The cat", [["The", "Ġcat"], ["the", "cat"]]],
        ("bpe", "unigram"): [" the cat", [["Ġthe", "Ġcat"], ["▁the", "▁cat"]]],
        ("bpe", "fallback"): ["é日", [["Ã©", "æ", "Ĺ", "¥"], ["é", "<0xE6>", "<0x97>", "<0xA5>"]]],
    }
    for kinds, (text, pieces) in shown.items():
        seen = [writing(kind).encode(text) for kind in kinds]
        if kinds[1] == "fallback":  # the blank that it puts in front is the same span as what follows
            assert spans(*seen)[1].tolist() == [0, 0, 1, 2, 3]
            continue
        for kind, s, found, expected in zip(kinds, seen, spans(*seen), pieces, strict=True):
            assert tokenizer(kind).convert_ids_to_tokens(s.ids) == expected and found.tolist() == [0, 1]


def written(*after):
    return Tokens(np.arange(len(after)), list(after), *np.zeros((2, len(after)), dtype=bool))


def test_a_boundary_within_a_character_is_no_boundary_beside_it():
    """' ½' normalised is ' 1' and '/2': what lies between them is not the blank that another tokeniser leaves out."""
    words = written(((5, b""), (6, b"")), ((8, b""), (8, b"")))
    normalised = written(((5, b" 1"), (5, b" 1")), ((8, b""), (8, b"")))
    assert [of.tolist() for of in spans(words, normalised)] == [[0, 0], [0, 0]]
    assert [of.tolist() for of in spans(normalised, normalised)] == [[0, 1], [0, 1]]


def test_a_blank_in_front_of_an_unknown_word_does_not_stand_for_it():
    assert [of.tolist() for of in spans(writing("bpe").encode("0"), writing("unigram").encode("0"))] == [[-1], [-1, -1]]


# Reading rows back


@given(st.sampled_from(EXACT), TEXT, st.data())
@FEW
def test_a_row_cut_anywhere_is_read_back_without_its_half_characters(kind, text, data):
    ids = writing(kind).encode(text).ids
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, len(ids))] * 2)))
    read, seen = writing(kind).read(ids[a:b])
    spelt = [writing(kind).bytes[i] for i in ids[a:b]]
    whole = b"".join(spelt)
    assert read in text and read == whole.decode(errors="ignore")
    ends = np.cumsum([0, *map(len, spelt)]) - whole.find(read.encode())
    assert not read or seen.spoilt.tolist() == ((ends[:-1] < 0) | (ends[1:] > len(read.encode()))).tolist()
    assert not read or [low for (low, _), _ in seen.after] == ends[1:].tolist()


@given(st.sampled_from(EXACT), TEXT)
@FEW
def test_what_is_read_back_has_the_boundaries_of_what_was_written(kind, text):
    written = writing(kind).encode(text)
    read, seen = writing(kind).read(written.ids)
    assert read == text and seen.after == written.after and not seen.spoilt.any() and not seen.silent.any()


@given(st.sampled_from(KINDS), TEXT)
@FEW
def test_any_tokeniser_finds_its_own_boundaries_in_the_text_that_it_reads_back(kind, text):
    ids = np.array(tokens.encode(tokenizer(kind), [text])[0], dtype=np.int64)
    read, seen = writing(kind).read(ids)
    assert (seen.silent == np.isin(ids, tokenizer(kind).all_special_ids)).all()
    again = writing(kind).encode(read)
    if (
        again.ids.tolist() == ids.tolist()
    ):  # nothing unknown, and no blank that the tokeniser does not tell from its own
        assert spans(seen, again)[0].tolist() == list(range(len(ids)))


# Rows


def packed(kind, texts, length=90):
    """One row of these documents as a corpus has them."""
    facts = tokens.facts(tokenizer(kind))
    cut = tokens.pieces(tokenizer(kind), texts, facts, length)
    pieces = [piece.ids for several in cut for piece in several]
    ids, segments = np.full((1, length), facts.pad), np.zeros((1, length), dtype=np.int64)
    at = 0
    for number, piece in enumerate(pieces, start=1):
        ids[0, at : at + len(piece)], segments[0, at : at + len(piece)] = piece, number
        at += len(piece)
    return ids, segments


@given(PAIRS, st.lists(TEXT.filter(str.strip), min_size=1, max_size=3))
@FEW
def test_a_packed_row_is_told_as_its_documents_are_alone(kinds, texts):
    alignment = Alignment(*map(tokenizer, kinds))
    together = alignment.tell(*packed(kinds[0], texts, 200))
    alone = [alignment.tell(*packed(kinds[0], [text], 200)) for text in texts]
    assert together.counts.sum() == sum(told.counts.sum() for told in alone)
    shift, student, teacher, ids = 0, [], [], []
    for told in alone:
        there = told.segments[0] > 0
        student += [n + shift if n >= 0 else -1 for n in told.student[0] if n >= 0]
        teacher += [n + shift if n >= 0 else -1 for n in told.teacher[0][there]]
        ids += told.ids[0][there].tolist()
        shift += int(told.counts[0])
    assert [n for n in together.student[0].tolist() if n >= 0] == student
    assert together.teacher[0][together.segments[0] > 0].tolist() == teacher
    assert together.ids[0][together.segments[0] > 0].tolist() == ids


@pytest.mark.parametrize("kinds", [("fallback", "bpe"), ("bpe", "fallback"), ("fallback", "fallback")])
def test_the_end_of_a_text_is_a_span_and_a_cut_is_not(kinds):
    alignment, end = Alignment(*map(tokenizer, kinds)), tokenizer(kinds[0]).eos_token_id
    ids, segments = packed(kinds[0], ["the cat"])
    told = alignment.tell(ids, segments)
    place = np.flatnonzero((ids[0] == end) & (segments[0] > 0))[-1]
    theirs = np.flatnonzero((told.ids[0] == tokenizer(kinds[1]).eos_token_id) & (told.segments[0] > 0))[-1]
    assert told.student[0, place] == told.teacher[0, theirs] == told.counts[0] - 1
    segments[0, place:] = 0
    cut = alignment.tell(ids, segments)
    assert cut.counts[0] == told.counts[0] - 1
    assert len(cut.ids[0]) == len(told.ids[0]) - len(tokens.facts(tokenizer(kinds[1])).end)


def test_what_nothing_predicts_is_in_no_span():
    """The first token of a document, where its tokeniser puts nothing before it."""
    for kinds, mine, theirs in ((("fallback", "bpe"), 0, 1), (("bpe", "fallback"), 1, 0)):
        told = Alignment(*map(tokenizer, kinds)).tell(*packed(kinds[0], ["the cat"]))
        assert told.student[0, mine] == told.teacher[0, theirs] == -1 and told.counts[0] > 1


@pytest.mark.parametrize("longest", range(1, 20))
def test_a_row_too_long_for_the_teacher_keeps_the_spans_that_it_reads_whole(longest):
    row = packed("bpe", ["the cats", "on the mat"])
    sides = tokenizer("bpe"), tokenizer("fallback")
    whole, cut = (Alignment(*sides, longest=n).tell(*row) for n in (None, longest))
    kept = [n for n in range(whole.counts[0]) if (np.flatnonzero(whole.teacher[0] == n) < longest).all()]
    assert cut.ids[0].tolist() == whole.ids[0, :longest].tolist() and cut.counts[0] == len(kept)
    for ours, theirs in ((cut.student, whole.student), (cut.teacher, whole.teacher[:, :longest])):
        assert ours[0].tolist() == [n if n in kept else -1 for n in theirs[0].tolist()]


def test_rows_without_text_have_no_spans():
    told = Alignment(tokenizer("bpe"), tokenizer("unigram")).tell(np.ones((2, 5), int), np.zeros((2, 5), int))
    assert told.counts.tolist() == [0, 0] and (told.student == -1).all() and told.ids.shape == (2, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokeniser_shares_every_piece_with_itself(kind):
    ids = shared(writing(kind), writing(kind))
    assert (ids[0] == ids[1]).all() and sorted(ids[0]) == sorted(tokenizer(kind).get_vocab().values())


def test_shared_pieces_are_the_same_bytes_or_have_the_same_role():
    one, other = writing("bpe"), writing("fallback")
    ids = shared(one, other)
    named = {
        one.tokenizer.convert_ids_to_tokens(int(a)): other.tokenizer.convert_ids_to_tokens(int(b)) for a, b in ids.T
    }
    assert named["Ġthe"] == "▁the" and named["t"] == "t" and named["Ġ"] == "▁" and named["Ã"] == "<0xC3>"
    assert named["</s>"] == "</s>" and named["x"] == "<0x78>" and "<pad>" not in named
    ends = transformers.PreTrainedTokenizerFast(tokenizer_object=one.tokenizer.backend_tokenizer, eos_token="<pad>")
    assert [2, 1] in shared(one, Writing(ends)).T.tolist()  # </s> and <pad> have the same role


# What is compared


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def predicted(vocab, spans, seed):
    targets = torch.randint(vocab, (len(spans),), generator=torch.Generator().manual_seed(seed))
    return Predicted(Logits(draw(len(spans), vocab, seed=seed).mul_(2).requires_grad_()), targets, torch.tensor(spans))


def brute(student, teacher, kind, temperature, shared=None):
    """One span at a time, in plain probabilities."""
    numbers = sorted(({*student.spans.tolist()} & {*teacher.spans.tolist()}) - {-1})
    return sum(brute_span(student, teacher, n, kind, temperature, shared) for n in numbers) / max(len(numbers), 1)


def brute_span(student, teacher, n, kind, temperature, shared):
    sides = []
    for side in (student, teacher):
        places = [i for i, m in enumerate(side.spans.tolist()) if m == n]
        if kind == "likelihood":
            whole = torch.stack([side.head.hidden[i].softmax(0)[side.targets[i]] for i in places]).prod() ** (
                1 / temperature
            )
            sides.append(torch.stack([whole, 1 - whole]))
        else:
            sides.append((side.head.hidden[places[0]] / temperature).softmax(0))
    q, p = sides
    p = p.detach()
    if kind == "sorted":
        p, q = (sorted(side, reverse=True) for side in (p, q))
        return sum(abs((p[i] if i < len(p) else 0) - (q[i] if i < len(q) else 0)) for i in range(max(len(p), len(q))))
    if kind == "shared":
        p, q = (torch.stack([*side[ids], 1 - side[ids].sum()]) for side, ids in ((p, shared[1]), (q, shared[0])))
    return (p * (p / q).log()).sum()


SHARED = torch.tensor([[0, 2, 3], [6, 1, 4]])
FORMS = [(kind, temperature) for kind in ("likelihood", "shared", "sorted") for temperature in (1.0, 2.5)]


@pytest.mark.parametrize(("kind", "temperature"), FORMS)
def test_loss_and_gradient_are_those_of_one_span_at_a_time(kind, temperature):
    student = predicted(5, [-1, 0, 0, 1, 2, 2, 2, -1, 5, 3], seed=1)
    teacher = predicted(7, [0, 1, 1, -1, 2, 4, 3, 3], seed=2)  # spans 4 and 5 are on one side alone
    ours, theirs = (f(student, teacher, kind, temperature, SHARED) for f in (aligned, brute))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    one, other = (torch.autograd.grad(loss, student.head.hidden)[0] for loss in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert one.abs().sum() > 0 and not torch.autograd.grad(ours, teacher.head.hidden, allow_unused=True)[0] is not None


@pytest.mark.parametrize(("kind", "temperature"), FORMS)
def test_with_equal_tokenisers_spans_are_tokens_and_the_loss_is_the_tokens_own(kind, temperature):
    student, teacher = predicted(6, list(range(9)), seed=3), predicted(6, list(range(9)), seed=4)
    teacher = teacher._replace(targets=student.targets)
    every = torch.arange(6).expand(2, -1)
    p, q = ((side.head.hidden / temperature).softmax(-1) for side in (teacher, student))
    gold = [
        side.head.hidden.softmax(-1).gather(1, side.targets[:, None]) ** (1 / temperature)
        for side in (teacher, student)
    ]
    coins = [torch.cat([side, 1 - side], 1) for side in gold]
    expected = {
        "shared": (p * (p / q).log()).sum(-1).mean(),
        "likelihood": (coins[0] * (coins[0] / coins[1]).log()).sum(-1).mean(),
        "sorted": (p.sort().values - q.sort().values).abs().sum(-1).mean(),
    }[kind]
    found = aligned(student, teacher, kind, temperature, every)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    equal = aligned(student, student, kind, temperature, every)
    assert abs(equal.item()) < 1e-12
    assert torch.autograd.grad(equal, student.head.hidden)[0].abs().max() < 1e-12 or kind == "sorted"


@pytest.mark.parametrize(("kind", "temperature"), FORMS)
def test_heads_give_what_their_logits_give(kind, temperature):
    """Scales, caps, biases: loss and gradient; the logits of `likelihood` never all exist."""
    spans, n = torch.tensor([0, 0, 1, 2, 2, -1, 3]), 7
    parts = [draw(n, 3, seed=1), draw(8, 3, seed=2), draw(8, seed=3)]
    hidden, weight, bias = (part.requires_grad_() for part in parts)
    logits = 2.0 * torch.tanh(0.7 * (hidden @ weight.T + bias) / 2.0)
    teacher, targets = predicted(7, [0, 1, 1, 2, 3, 3], seed=4), torch.randint(8, (n,))
    found = [
        aligned(Predicted(head, targets, spans), teacher, kind, temperature, SHARED)
        for head in (Logits(hidden, weight, bias, 0.7, 2.0), Logits(logits))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(loss, parts, retain_graph=True) for loss in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        assert ours.abs().sum() > 0


@pytest.mark.parametrize("kind", ["likelihood", "shared", "sorted"])
def test_without_any_row_the_loss_is_zero_and_backward_reaches_the_head(kind):
    weight = draw(5, 3).requires_grad_()
    student = Predicted(Logits(draw(0, 3), weight), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    loss = aligned(student, predicted(7, [0, 1], seed=2), kind, 1.0, SHARED)
    assert loss.item() == 0 and not torch.autograd.grad(loss, weight)[0].any()


@given(st.floats(-60, 0), st.floats(-60, 0), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=200, deadline=None)
def test_the_divergence_of_likelihoods_is_finite_and_never_negative(p, q, dtype):
    p, q = torch.tensor([p], dtype=dtype), torch.tensor([q], dtype=dtype, requires_grad=True)
    value = likelihood_divergence(p, q)
    assert torch.isfinite(value) and value > -1e-6 and torch.isfinite(torch.autograd.grad(value.sum(), q)[0])


def test_what_a_teacher_rules_out_is_no_nan():
    student, teacher = predicted(5, [0, 1], seed=1), predicted(7, [0, 1], seed=2)
    logits = teacher.head.hidden.detach().clone()
    logits[0, teacher.targets[0]], logits[:, SHARED[1, 1]] = -torch.inf, -torch.inf
    for kind in ("likelihood", "shared", "sorted"):
        loss = aligned(student, teacher._replace(head=Logits(logits)), kind, 1.0, SHARED)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, student.head.hidden)[0]).all()


def test_without_a_common_span_the_loss_is_zero_and_backward_runs():
    student, teacher = predicted(5, [0, -1], seed=1), predicted(7, [-1, 1, 2], seed=2)
    for kind in ("likelihood", "shared", "sorted"):
        loss = aligned(student, teacher, kind, 1.0, SHARED)
        loss.backward()
        assert loss.item() == 0 and not student.head.hidden.grad.any()


def test_a_teacher_of_fewer_tokens_bounds_the_divergence_from_below():
    """The log-sum inequality: what is told apart less is less different; exact with all tokens."""
    teacher, student = (draw(4, 9, seed=s).log_softmax(-1) for s in (1, 2))
    order = teacher.argsort(-1, descending=True)
    values = [shared_divergence(teacher.gather(1, order[:, :k]), student, order[:, :k]) for k in range(1, 10)]
    assert all((a <= b + 1e-12).all() for a, b in pairwise(values))
    torch.testing.assert_close(values[-1], (teacher.exp() * (teacher - student)).sum(-1), rtol=0, atol=1e-12)


# Models


def batch(kinds, texts, vocab):
    """Rows of the student and what its teacher reads, as objectives take them."""
    alignment = Alignment(*map(tokenizer, kinds))
    ids, segments = (np.concatenate(side) for side in zip(*(packed(kinds[0], [t, t[:9]]) for t in texts), strict=True))
    told = alignment.tell(ids, segments)
    columns = {
        "input_ids": ids, "segment_ids": segments, "labels": np.where(segments > 0, ids, -100),
        "t.ids": told.ids, "t.segments": told.segments, "t.spans": told.student, "t.teacher_spans": told.teacher,
        "t.shared": alignment.shared[None],
    }  # fmt: skip
    return {name: torch.from_numpy(values) for name, values in columns.items()}, told


def traced(model, ids, segments):
    rows = torch.zeros_like(segments, dtype=torch.bool)
    rows[:, :-1] = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    inputs = {"input_ids": ids, "segment_ids": segments, "labels": ids}
    return trace(model, inputs, (), rows.flatten().nonzero().squeeze(1))


@pytest.fixture(scope="module")
def pair():
    """A student and a teacher that know different tokenisers."""
    sizes = [len(tokenizer(kind)) for kind in ("bpe", "unigram")]
    return [
        tiny.model("llama", "causal", seed=s, vocab_size=n, max_position_embeddings=256) for s, n in enumerate(sizes)
    ]


@pytest.mark.parametrize("kind", ["likelihood", "shared", "sorted"])
def test_a_student_learns_from_a_teacher_of_another_tokeniser(pair, kind):
    rows, told = batch(("bpe", "unigram"), PROSE[:2], pair[0].config.vocab_size)
    objective = Aligned(target="t", kind=kind)
    student, teacher = pair
    with torch.no_grad():
        target = traced(teacher, rows["t.ids"], rows["t.segments"])
    seen = traced(student, rows["input_ids"], rows["segment_ids"])
    count = objective.count(rows)[kind]
    assert count == told.counts.sum() > 10
    loss = objective.terms(seen, target, rows)[kind]
    loss.backward()
    assert loss > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    student.zero_grad()


def log_likelihoods(side, count):
    """Of each span, token by token."""
    spans = zip(side.spans.tolist(), side.log_probs, strict=True)
    sums = side.log_probs.new_zeros(count)
    for span, value in spans:
        if span >= 0:
            sums[span] += value
    return sums


def test_the_chain_rule_holds_over_a_text_and_a_cache_gives_the_same_loss(pair):
    rows, told = batch(("bpe", "unigram"), PROSE[:1], pair[0].config.vocab_size)
    with torch.no_grad():
        seen, target = (
            traced(model, *(rows[name] for name in names))
            for model, names in zip(pair, (("input_ids", "segment_ids"), ("t.ids", "t.segments")), strict=True)
        )
    student = Predicted.of(seen.head, rows["labels"], rows["segment_ids"], rows["t.spans"])
    teacher = Predicted.of(target.head, rows["t.ids"], rows["t.segments"], rows["t.teacher_spans"])
    count = int(told.counts.sum())
    cached = log_likelihoods(teacher, count)
    inside = teacher.spans >= 0
    picked = target.logits.log_softmax(-1).gather(1, teacher.targets[:, None]).squeeze(1)
    torch.testing.assert_close(cached.sum(), picked[inside].sum())
    online = aligned(student, teacher, "likelihood", 1.0)
    torch.testing.assert_close(likelihood_divergence(cached, log_likelihoods(student, count)).mean(), online)
    narrow = student._replace(head=Logits(seen.logits.bfloat16()))
    torch.testing.assert_close(aligned(narrow, teacher), online, rtol=0.1, atol=0.02)


def test_a_masked_model_cannot_be_asked_for_spans():
    from distill.models import facts

    causal, masked = facts(tiny.config("llama")), facts(tiny.config("bert"))
    assert not Aligned(target="t").check(causal, causal)
    assert ["the teacher (bert) does not predict" in line for line in Aligned(target="t").check(causal, masked)] == [
        True
    ]
