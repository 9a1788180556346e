"""Laws of the objectives, against brute force in float64: one sequence, one head, one row at a time, without masks."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.utils._python_dispatch import TorchDispatchMode

from distill.heads import Logits
from distill.objectives import (
    OBJECTIVES,
    RANKING,
    CrossEntropy,
    RelationKL,
    aligned,
    attention_mse,
    cross_entropy,
    divergence,
    hidden,
    margin_mse,
    relation_kl,
    scored,
    token_sum,
)
from distill.objectives import relation_blocks as blocks
from distill.objectives.known import known
from distill.objectives.span_sum import Predicted
from growth.errors import UserError

HEADS, TEACHER, STUDENT = 3, 12, 6
PACKED = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 0], [1] * 11, [2, 2, 1, 1, 2, 2, 0, 0, 1, 1, 3]])
FORMS = [
    {"causal": causal, "reduction": reduction, "window": window}
    for causal in (False, True)
    for reduction, window in (("sample", None), ("token", None), ("sample", 3))
]


def brute(teacher, student, segments, heads, *, causal=False, window=99, reduction="sample", scaling=(None, None)):
    """Relation KL of pairs of [B, T, W]."""
    means, rows = [], 0
    for b, numbers in enumerate(segments.tolist()):
        for number in {n for n in numbers if n}:
            places = [t for t, n in enumerate(numbers) if n == number]
            for h in range(heads):
                sides = [x[b].unflatten(1, (heads, -1))[:, h] for x in (*teacher, *student)]  # [T, d]
                for n, i in enumerate(places):
                    keys = [j for m, j in enumerate(places) if abs(m - n) < (window or 99) and (m <= n or not causal)]
                    kl = brute_row(*sides, i, keys, *scaling)
                    means.append(kl / (heads * (len(places) if reduction == "sample" else 1)))
            rows += 1 if reduction == "sample" else len(places)
    return sum(means) / rows


def brute_row(tl, tr, sl, sr, i, keys, teacher_scale, student_scale):
    a = tr[keys] @ tl[i] * (teacher_scale or tl.shape[1] ** -0.5)
    b = sr[keys] @ sl[i] * (student_scale or sl.shape[1] ** -0.5)
    p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
    return (p * (p.log() - q.log())).sum()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sides(shape, mixed=False, dtype=torch.float64):
    """A teacher and a student [*shape, width], each a pair; the student's tensors want gradients."""
    teacher = [draw(*shape, TEACHER, seed=s, dtype=dtype) for s in (1, 2)]
    student = [draw(*shape, STUDENT, seed=s, dtype=dtype).requires_grad_() for s in (3, 4)]
    return tuple((pair[0], pair[mixed]) for pair in (teacher, student))


def gradient(loss, student):
    return torch.autograd.grad(loss, list(dict.fromkeys(student)), retain_graph=True)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# Relations


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loss_and_gradient_are_those_of_brute_force(form, mixed):
    teacher, student = sides(PACKED.shape, mixed)
    ours, theirs = (f(teacher, student, PACKED, HEADS, **form) for f in (relation_kl, brute))
    assert_same(ours, theirs)
    assert_same(gradient(ours, student), gradient(theirs, student))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_change_neither_loss_nor_gradient(causal, window, mixed, monkeypatch):
    teacher, student = sides(PACKED.shape, mixed)
    whole = relation_kl(teacher, student, PACKED, HEADS, causal=causal, window=window)
    for scores, heads in ((1, 1), (20, 1), (50, 2), (300, 8)):
        monkeypatch.setattr(blocks, "SCORES", scores)
        monkeypatch.setattr(blocks, "HEADS", heads)
        cut = relation_kl(teacher, student, PACKED, HEADS, causal=causal, window=window)
        assert_same(cut, whole)
        assert_same(gradient(cut, student), gradient(whole, student))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradient_agrees_with_differences(form):
    (teacher, other), (left, right) = sides((2, 5), mixed=True)
    segments = torch.tensor([[1, 1, 1, 2, 2], [0, 1, 1, 1, 1]])

    def loss(left, right):
        return relation_kl((teacher, other), (left, right), segments, HEADS, **form)

    assert torch.autograd.gradcheck(loss, (left, right))


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_as_long_as_a_sequence_is_none(causal):
    teacher, student = sides(PACKED.shape, mixed=True)
    wide, whole = (relation_kl(teacher, student, PACKED, HEADS, causal=causal, window=w) for w in (11, None))
    assert_same(wide, whole)
    assert_same(gradient(wide, student), gradient(whole, student))
    assert relation_kl(teacher, student, PACKED, HEADS, causal=causal, window=1) < 1e-15


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    before=st.integers(0, 4),
    after=st.integers(0, 4),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 2, 5]),
    reduction=st.sampled_from(["sample", "token"]),
)
def test_packed_and_padded_sequences_are_the_same(lengths, before, after, causal, window, reduction):
    """Padding is NaN here: what is read of it would show."""
    form = {"causal": causal, "window": window, "reduction": reduction}
    teacher, student = sides((1, sum(lengths)), mixed=True)
    segments = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)])[None]
    packed = relation_kl(teacher, student, segments, HEADS, **form)
    longest = max(lengths)

    def padded(x):
        ends = [(0, 0, before, longest - n + after) for n in lengths]
        return torch.stack(
            [F.pad(part, end, value=math.nan) for part, end in zip(x[0].split(lengths), ends, strict=True)]
        )

    real = torch.stack([F.pad(torch.ones(n, dtype=torch.long), (before, longest - n + after)) for n in lengths])
    apart = relation_kl(tuple(map(padded, teacher)), tuple(map(padded, student)), real, HEADS, **form)
    assert_same(apart, packed)
    assert_same(gradient(apart, student), gradient(packed, student))


def test_the_teacher_itself_has_nothing_to_learn():
    _, (student, _) = sides(PACKED.shape)
    loss = relation_kl(student.detach(), student, PACKED, HEADS)
    assert loss == 0
    assert torch.equal(gradient(loss, [student])[0], torch.zeros_like(student))


def test_a_rotation_inside_a_relation_head_changes_nothing():
    (teacher, _), (student, _) = sides(PACKED.shape)
    turn = torch.linalg.qr(draw(HEADS, 4, 4, seed=9))[0]
    turned = torch.einsum("bthd,hde->bthe", teacher.unflatten(2, (HEADS, 4)), turn).flatten(2)
    assert not torch.allclose(turned, teacher)
    assert_same(*(relation_kl(t, student, PACKED, HEADS) for t in (turned, teacher)))


def test_repeated_key_heads_relate_as_the_heads_themselves():
    (teacher, _), (student, _) = sides(PACKED.shape)
    repeated = [x.unflatten(2, (HEADS, -1)).repeat_interleave(4, 2).flatten(2) for x in (teacher, student)]
    assert_same(relation_kl(*repeated, PACKED, 4 * HEADS), relation_kl(teacher, student, PACKED, HEADS))


def test_the_layout_of_attention_is_the_same_relation():
    (teacher, _), (student, _) = sides(PACKED.shape)
    by_heads = teacher.unflatten(2, (6, 2)).transpose(1, 2), student.unflatten(2, (2, 3)).transpose(1, 2)
    ours, theirs = relation_kl(*by_heads, PACKED, HEADS), relation_kl(teacher, student, PACKED, HEADS)
    assert_same(ours, theirs)
    assert_same(gradient(ours, [student]), gradient(theirs, [student]))


def test_a_lone_token_adds_nothing_and_counts():
    (teacher, _), (student, _) = sides((1, 5))
    one, two = torch.tensor([[1, 1, 1, 1, 0]]), torch.tensor([[1, 1, 1, 1, 2]])
    alone, beside = (relation_kl(teacher, student, segments, HEADS) for segments in (one, two))
    assert_same(beside, alone / 2)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_batch_of_padding_gives_exactly_zero(form):
    (teacher, _), (student, _) = sides((2, 4))
    loss = relation_kl(teacher, student, torch.zeros(2, 4, dtype=torch.long), HEADS, **form)
    assert loss == 0
    assert torch.equal(gradient(loss, [student])[0], torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    (teacher, _), (student, _) = sides(PACKED.shape, dtype=dtype)
    wide = student.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = relation_kl(teacher, student, PACKED, HEADS)
    theirs = relation_kl(teacher.float(), wide, PACKED, HEADS)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    assert torch.equal(gradient(ours, [student])[0], gradient(theirs, [wide])[0].to(dtype))


def test_float32_is_as_near_to_float64_as_the_plain_formula():
    (teacher, _), (student, _) = sides((2, 40), dtype=torch.float32)
    segments = torch.ones(2, 40, dtype=torch.long)
    exact = relation_kl(teacher.double(), student.double(), segments, HEADS)
    assert abs(relation_kl(teacher, student, segments, HEADS) / exact - 1) < 1e-6


def test_scores_far_from_zero_stay_finite():
    (teacher, _), (student, _) = sides(PACKED.shape, dtype=torch.float32)
    loss = relation_kl(100 * teacher, 100 * student, PACKED, HEADS, causal=True)
    assert loss.isfinite()
    assert gradient(loss, [student])[0].isfinite().all()


class Largest(TorchDispatchMode):
    """The most elements of any storage that an operation returned, of one dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == self.dtype:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_memory_is_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(blocks, "SCORES", 2**10)

    def largest(length):
        (teacher, _), (student, _) = sides((1, length), dtype=torch.float32)
        with Largest(torch.float32) as seen:
            relation_kl(teacher, student, torch.ones(1, length, dtype=torch.long), HEADS).backward()
        return seen.elements

    assert largest(1024) == 1024 * TEACHER < 1024 * 1024


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_makes_the_scores_linear_in_the_length(causal, monkeypatch):
    def scores(length):
        shape, made = (1, length, 6), []
        monkeypatch.setattr(blocks, "_hide", lambda both, *masks: made.append(both[0].numel()))
        relation_kl(draw(*shape), draw(*shape, seed=1), torch.ones(shape[:2]).long(), HEADS, causal=causal, window=8)
        return sum(made)

    assert scores(512) < 2.1 * scores(256) < 2.1 * 256 * HEADS * (2 * 8 if causal else 3 * 8)


# The value in a recipe


def traced(taps, **more):
    return SimpleNamespace(taps=taps, **{"scaling": {}, "window": {}, "causal": False, "head": None, **more})


def qkv(batch, width, heads, kv_heads, seed):
    """Taps of the last layer of a model with grouped keys and values."""
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    shapes = {role: (*batch, n, width // heads) for role, n in counts.items()}
    return {
        (role, -1): draw(*shape, seed=seed + i).transpose(1, 2).requires_grad_()
        for i, (role, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("windows", [(None, None), (3, 5), (4, None)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_scaled_dot_product_attention(causal, windows):
    """MiniLM v1 with grouped queries: SDPA's own weights, read through values that are the identity."""
    batch, heads, length = (2, 7), 6, 7
    scales = {"teacher": 0.7, "student": 0.4}
    models = {"teacher": qkv(batch, 24, heads, 3, seed=1), "student": qkv(batch, 18, heads, 2, seed=5)}
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    seen = (ahead.abs() < (windows[0] or length)) & (ahead <= (0 if causal else length))  # the narrower window

    def weights(name):
        q, k = (models[name][role, -1] for role in ("query", "key"))
        one = torch.eye(length, dtype=q.dtype).expand(2, k.shape[1], length, length)
        return F.scaled_dot_product_attention(q, k, one, attn_mask=seen, scale=scales[name], enable_gqa=True)

    p, q = weights("teacher"), weights("student")
    expected = torch.special.xlogy(p, p / q.where(q > 0, torch.ones_like(q))).sum() / (heads * length)
    objective = RelationKL(target="t", relations=["attention"])
    traces = {
        name: traced(models[name], scaling={-1: scales[name]}, window={-1: window}, causal=causal)
        for name, window in zip(models, windows, strict=True)
    }
    ours = objective.terms(traces["student"], traces["teacher"], {"segment_ids": torch.ones(batch, dtype=torch.long)})
    assert_same(ours["attention"], expected)
    learned = [models["student"][role, -1] for role in ("query", "key")]
    assert_same(gradient(ours["attention"], learned), gradient(expected, learned))


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_terms_over_counts_do_not_depend_on_how_the_batch_is_cut(reduction):
    relations, heads = ["qq", "kv", "attention"], {"qq": 6, "kv": 2}
    objective = RelationKL(target="t", relations=relations, heads=heads, reduction=reduction)
    teacher, student = qkv(PACKED.shape, 24, 6, 2, seed=1), qkv(PACKED.shape, 18, 6, 2, seed=5)

    def run(rows):
        batch = {"segment_ids": PACKED[rows]}
        layer = {"scaling": {-1: 0.4}, "window": {-1: 3}}
        sides = [traced({tap: x[rows] for tap, x in side.items()}, **layer) for side in (student, teacher)]
        return objective.terms(*sides, batch), objective.count(batch)

    whole, count = run(slice(0, 3))
    cut, counts = zip(*(run(rows) for rows in (slice(0, 1), slice(1, 3))), strict=True)
    for term in relations:
        assert count[term] == sum(c[term] for c in counts) == (7 if reduction == "sample" else 28)
        assert count[term].dtype == torch.float64
        assert_same(sum(t[term] for t in cut) / count[term], whole[term] / count[term])
    for term, plain in (("qq", ("query", "query")), ("kv", ("key", "value"))):
        pair = [tuple(side[role, -1].transpose(1, 2).flatten(2) for role in plain) for side in (teacher, student)]
        assert_same(whole[term] / count[term], brute(*pair, PACKED, objective.heads_of(term), reduction=reduction))


def test_needs_name_layers_as_they_were_asked_for():
    needs = RelationKL(target="t", relations=["attention", "vv"], heads=4, teacher_layer=2).needs()
    assert needs.student == {("query", -1), ("key", -1), ("value", -1)}
    assert needs.target == {("query", 2), ("key", 2), ("value", 2)}
    assert needs.head is None
    assert RelationKL(target="t", relations=["kk"], heads=4).needs().student == {("key", -1)}
    assert CrossEntropy(objective="causal").needs().head == "causal"


def facts(family="bert", layers=6, heads=12, kv_heads=None, head=64, causal=False):
    if heads is None:
        return SimpleNamespace(family=family, layers=layers, heads=None, widths={"hidden": 64}, causal=causal)
    kv = kv_heads or heads
    widths = {"query": heads * head, "key": kv * head, "value": kv * head, "hidden": heads * head}
    return SimpleNamespace(family=family, layers=layers, heads=heads, kv_heads=kv, widths=widths, causal=causal)


@pytest.mark.parametrize(
    ("keys", "student", "teacher", "expected"),
    [
        ({}, {}, {}, None),
        ({"heads": 48, "relations": ["qq"]}, {"heads": 5}, {"heads": 15},
         "qq: heads=48 does not divide the student's width 320; 40, 32, 20, 16 do"),
        ({"heads": 128, "relations": ["kk"]}, {"kv_heads": 3}, {},
         "kk: heads=128 does not divide the student's width 192; 96, 64, 48, 32 do"),
        ({"heads": 128, "relations": ["qq", "vv"]}, {}, {"kv_heads": 3},
         "vv: heads=128 does not divide the teacher's width 192; 96, 64, 48, 32 do, or one number a relation, "
         "heads: {qq: 128, vv: 96}"),
        ({"heads": 36, "relations": ["qq", "vv"]}, {"kv_heads": 5, "heads": 15}, {"heads": 15, "kv_heads": 5},
         "does not divide the student's width 960; 32, 20, 16, 10 do"),
        ({"heads": {"qq": 48, "kk": 64}, "relations": ["qq", "kk"]}, {"kv_heads": 3}, {}, None),
        ({"heads": {"qq": 48, "kk": 48}, "relations": ["qq", "kk"]}, {"kv_heads": 4}, {},
         "kk: heads=48 does not divide the student's width 256; 32, 16, 8, 4 do"),
        ({}, {"family": "deberta-v2", "heads": None}, {}, "the student's attention (deberta-v2) does not pass through"),
        ({"teacher_layer": 6}, {}, {}, "teacher_layer=6: the bert has 6 layers, 0 to 5"),
        ({"student_layer": -7}, {}, {}, "student_layer=-7: the bert has 6 layers, 0 to 5"),
        ({"relations": ["attention"]}, {"heads": 6}, {}, "the student has 6 heads, the teacher 12"),
        ({"relations": ["attention"]}, {}, {"family": "t5"}, "t5 adds a learned relative position bias"),
        ({"relations": ["qk"]}, {"kv_heads": 4}, {}, None),
        ({}, {"causal": True}, {}, "the student sees only the tokens before, the teacher all tokens"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_weights_are_loaded(keys, student, teacher, expected):
    wrong = RelationKL(**{"target": "t", "heads": 12, **keys}).check(facts(**student), facts(**teacher))
    assert bool(wrong) == (expected is not None), wrong
    assert not wrong or expected in wrong[0]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, "how many relation heads qq, kk, vv"),
        ({"heads": {"qq": 4}}, "a number for each of qq, kk, vv"),
        ({"heads": 4, "relations": ["qq", "qq"]}, "at most once"),
        ({"heads": 4, "relations": ["qx"]}, "Input should be"),
        ({"heads": 4, "relation_heads": 4}, "Extra inputs"),
        ({"heads": 0}, "greater than 0"),
    ],
)
def test_a_wrong_recipe_is_refused(keys, expected):
    with pytest.raises(ValidationError, match=expected):
        RelationKL(target="t", **keys)


def test_recipes_need_no_torch():
    code = "import sys, distill.objectives as o; o.RelationKL(target='t', heads=4); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert set(OBJECTIVES) == {
        "relation_kl",
        "ce",
        "divergence",
        "aligned",
        "hidden",
        "perturbation",
        "attention_mse",
        *RANKING,
    }


# Plain functions, in loops that are not ours

X, Y, SEEN = draw(2, 5, 12), draw(2, 5, 8), torch.ones(2, 5, dtype=torch.long)
Q, K = draw(2, 4, 5, 3), draw(2, 2, 5, 3)  # [B, H, T, d]; grouped keys
SCORED = [draw(4), draw(4, 2), draw(4), draw(4, 2)]
NO_SPANS = [Predicted(Logits(Y[0]), torch.arange(5), torch.arange(5))] * 2
MISTAKEN = [
    (partial(relation_kl, X, Y, SEEN, 5), "heads=5 does not divide the teacher's width 12; 4, 2, 1 do"),
    (partial(relation_kl, X, Y, SEEN, 12), "heads=12 does not divide the student's width 8; 4, 2, 1 do"),
    (partial(relation_kl, X, Y, SEEN, 0), "heads=0 does not divide the teacher's width 12; 1 does"),
    (partial(relation_kl, X, Y, SEEN[:, :4], 4), "segments is [2, 4], teacher is [2, 5, 12]"),
    (partial(relation_kl, X[:, :4], Y, SEEN, 4), "teacher is [2, 4, 12], student is [2, 5, 8]"),
    (partial(relation_kl, X, Y, SEEN[:, None, None], 4), "segments are [B, T]"),
    (partial(relation_kl, (X, Y), (X, X), SEEN, 4), "the teacher's two tensors are 12 and 8 wide"),
    (partial(relation_kl, X, Y, SEEN, 4, window=0), "window=0: a token sees itself at least"),
    (partial(relation_kl, X, Y, SEEN, 4, reduction="mean"), "no reduction 'mean'; there are sample, token"),
    (partial(relation_kl, X, Y, SEEN, 4, how="blocs"), "no form 'blocs'; did you mean 'blocks'?"),
    (partial(attention_mse, (Q, K), (K, K), SEEN), "teacher is [2, 4, 5, 3], student is [2, 2, 5, 3]"),
    (partial(hidden, X, Y, SEEN), "teacher is [2, 5, 12], student is [2, 5, 8]"),
    (partial(hidden, X, X, SEEN[:, :4]), "segments is [2, 4]"),
    (partial(hidden, X, X, SEEN, kind="cos"), "no kind 'cos'; did you mean 'cosine'?"),
    (partial(hidden, X, X, SEEN, position="last"), "no position 'last'; there are first, mean, all"),
    (partial(hidden, X, X, SEEN, reduction="none"), "no reduction 'none'"),
    (partial(divergence, X[0, :4], X[0]), "student has 4, teacher has 5"),
    (partial(divergence, X[0], X[1], reduction="batchmean"), "no reduction 'batchmean'; did you mean 'mean'?"),
    (partial(divergence, X[0], X[1], temperature=0.0), "temperature=0 must be above 0"),
    (partial(cross_entropy, X[0], torch.arange(6)), "logits has 5, targets has 6"),
    (partial(margin_mse, *SCORED, reduction="none"), "no reduction 'none'; there are mean, sum"),
    (partial(aligned, *NO_SPANS, kind="share"), "no kind 'share'; did you mean 'shared'?"),
]


@pytest.mark.parametrize(("loss", "said"), MISTAKEN)
def test_what_would_be_computed_wrongly_without_a_word_is_refused(loss, said):
    with pytest.raises(UserError, match=re.escape(said)):
        loss()


def test_grouped_keys_stand_beside_their_queries():
    repeated = K.repeat_interleave(2, 1)
    assert_same(relation_kl((Q, K), (Q, K), SEEN, 6), torch.zeros((), dtype=torch.float64))
    assert_same(relation_kl((Q, K), (Q * 2, K), SEEN, 6), relation_kl((Q, repeated), (Q * 2, repeated), SEEN, 6))
    assert_same(attention_mse((Q, K), (Q * 2, K), SEEN), attention_mse((Q, repeated), (Q * 2, repeated), SEEN))


# Known gradients


def test_a_known_gradient_is_scaled_before_it_is_rounded():
    x = draw(4, dtype=torch.float16).requires_grad_()
    tiny = torch.full((4,), 1e-9)  # nothing in float16
    (known(torch.tensor(2.0), {x: tiny}) * 2**20).backward()
    assert torch.equal(x.grad, (tiny * 2**20).half())


def test_a_known_gradient_is_used_as_often_as_its_value():
    (teacher, _), (student, _) = sides(PACKED.shape)
    loss = relation_kl(teacher, student, PACKED, HEADS)
    assert_same(gradient(3 * loss + loss**2, [student])[0], gradient(loss, [student])[0] * (3 + 2 * loss.detach()))


def test_only_what_learns_gets_a_gradient():
    teacher, (left, right) = sides(PACKED.shape, mixed=True)
    teacher[0].requires_grad_()
    loss = relation_kl(teacher, (left, right.detach()), PACKED, HEADS)
    assert_same(gradient(loss, [left])[0], gradient(relation_kl(teacher, (left, right), PACKED, HEADS), [left])[0])
    loss.backward()
    assert teacher[0].grad is None
    with torch.no_grad():
        assert torch.equal(relation_kl(teacher, (left, right), PACKED, HEADS), loss.detach())


# Cross-entropy


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_in_block", [1, 40, 2**20])
def test_cross_entropy_is_that_of_torch(dtype, logits_in_block, monkeypatch):
    monkeypatch.setattr(token_sum, "STRIP", logits_in_block)
    logits, targets = (5 * draw(9, 13, dtype=dtype)).requires_grad_(), torch.arange(9)
    wide = logits.detach().double().requires_grad_()
    ours, theirs = cross_entropy(logits, targets), F.cross_entropy(wide, targets)
    close = {"rtol": 0, "atol": {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]}
    torch.testing.assert_close(ours.double(), theirs, **close)
    found, expected = gradient(ours, [logits])[0], gradient(theirs, [wide])[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, **close | ({"rtol": 2**-7} if dtype == torch.bfloat16 else {}))


def test_cross_entropy_of_no_row_is_zero():
    logits = draw(0, 13).requires_grad_()
    loss = cross_entropy(logits, torch.arange(0))
    assert loss == 0
    assert gradient(loss, [logits])[0].shape == (0, 13)


def test_no_float32_copy_of_half_precision_logits_exists(monkeypatch):
    monkeypatch.setattr(token_sum, "STRIP", 50)
    logits = draw(200, 13, dtype=torch.bfloat16).requires_grad_()
    with Largest(torch.float32) as seen:
        cross_entropy(logits, torch.arange(200) % 13).backward()
    assert 0 < seen.elements <= 50


@pytest.mark.parametrize("causal", [False, True])
def test_scored_positions_are_those_of_a_loop(causal):
    labels = torch.arange(100, 133).view(3, 11).masked_fill(torch.arange(33).view(3, 11) % 7 == 0, -100)
    labels = labels.masked_fill(PACKED == 0, -100)
    expected = []
    for b in range(3):
        for t in range(11 - causal):
            same = PACKED[b, t] == PACKED[b, t + causal] != 0
            if same and labels[b, t + causal] != -100:
                expected.append((b * 11 + t, int(labels[b, t + causal])))
    rows, targets = scored(labels, PACKED, causal=causal)
    assert list(zip(rows.tolist(), targets.tolist(), strict=True)) == expected
    objective = CrossEntropy(objective="causal" if causal else "mlm")
    batch = {"labels": labels, "segment_ids": PACKED}
    (term,) = objective.terms(traced({}, head=torch.zeros(len(rows), 200)), None, batch).values()
    assert term / objective.count(batch)[objective.objective] == pytest.approx(math.log(200))


def test_a_label_after_padding_or_another_document_is_not_scored():
    segments = torch.tensor([[0, 1, 1, 2, 2, 0]])
    rows, targets = scored(torch.arange(6)[None], segments, causal=True)
    assert rows.tolist() == [1, 3]
    assert targets.tolist() == [2, 4]


def test_cross_entropy_refuses_a_model_that_looks_the_other_way():
    assert CrossEntropy(objective="causal").check(facts("t5"), None)[0].startswith("objective causal: t5 sees")
    assert CrossEntropy(objective="mlm").check(facts("gpt2", causal=True), None)[0].startswith("objective mlm: gpt2")
    assert CrossEntropy(objective="mlm").check(facts(), None) == []
