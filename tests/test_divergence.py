"""Laws of the divergences, against probabilities written out in float64 and torch's own derivatives."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import launch
from pydantic import ValidationError

from distill.heads import Logits
from distill.lesson import Lesson
from distill.models import freeze
from distill.objectives import Divergence, cross_entropy, divergence, divergences, token_sum
from distill.objectives.distribution import Kind
from distill.taps import trace
from distill.teachers.targets import Online, Targets
from growth.errors import UserError

ROWS, VOCABULARY, STUDENT, TEACHER = 11, 23, 5, 7
SHARES = {
    "symmetric": ("beta", (0.3, 0.5, 0.9)),
    "jsd": ("beta", (0.1, 0.5, 0.9)),
    "scaled_jsd": ("beta", (0.2, 0.5)),
    "skew_forward_kl": ("alpha", (0.1, 0.7)),
    "skew_reverse_kl": ("alpha", (0.1, 0.7)),
}
BARE = ("forward_kl", "reverse_kl", "total_variation")
CASES = [(kind, {}) for kind in BARE] + [(k, {key: x}) for k, (key, values) in SHARES.items() for x in values]
every_kind = pytest.mark.parametrize(("kind", "share"), CASES, ids=str)


def kl(p, q):
    return torch.special.xlogy(p, p / q).sum(-1)


def formula(p, q, kind, beta=0.5, alpha=0.1):
    """Of probabilities [N, V], as the papers write it."""
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "symmetric": lambda: (1 - beta) * kl(p, q) + beta * kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "scaled_jsd": lambda: (beta * kl(p, m) + (1 - beta) * kl(q, m)) / beta / (1 - beta),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }[kind]()


def reference(student, teacher, kind, *, temperature=1.0, temperature_squared=False, **share):
    """Of every row [N], from logits [N, V]."""
    p, q = ((x / temperature).exp() / (x / temperature).exp().sum(-1, keepdim=True) for x in (teacher, student))
    return formula(p, q, kind, **share) * (temperature**2 if temperature_squared else 1)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def learning(*shape, seed=0, dtype=torch.float64):
    return draw(*shape, seed=seed, dtype=dtype).requires_grad_()


def heads(dtype=torch.float64, bias=True, student=(1.0, None), teacher=(1.0, None)):
    """A student that learns and a teacher, with scales and caps."""
    sides = []
    for width, seed, finish in ((STUDENT, 1, student), (TEACHER, 5, teacher)):
        parts = [(ROWS, width), (VOCABULARY, width), (VOCABULARY,)]
        hidden, weight, b = (learning(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(parts))
        sides.append(Logits(hidden, weight, b if bias else None, *finish))
    return sides


def made(head):
    """The logits of a head, by a formula of their own."""
    x = head.scale * (head.hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def learned(head):
    return [x for x in (head.hidden, head.weight, head.bias) if x is not None and x.requires_grad]


def gradient(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def assert_same(ours, theirs, atol=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


# Against the formulas


@every_kind
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_and_gradient_are_those_of_the_formula(kind, share, temperature, squared):
    student, teacher = learning(ROWS, VOCABULARY), 2 * draw(ROWS, VOCABULARY, seed=1)
    form = {"temperature": temperature, "temperature_squared": squared, **share}
    ours, theirs = divergence(student, teacher, kind, **form), reference(student, teacher, kind, **form).mean()
    assert theirs > 0.01
    assert_same(ours, theirs)
    assert_same(gradient(ours, student), gradient(theirs, student))


FINISHES = [
    {"bias": False},
    {"student": (0.7, None), "teacher": (1.3, None)},
    {"student": (1.0, 2.0)},
    {"student": (0.6, 3.0), "teacher": (1.0, 1.5), "bias": False},
]


@pytest.mark.parametrize("finish", FINISHES, ids=str)
@every_kind
def test_heads_give_what_their_logits_give(kind, share, finish, monkeypatch):
    student, teacher = heads(**finish)
    theirs = reference(made(student), made(teacher), kind, temperature=1.5, **share).mean()
    for chunk, strip in ((192, 2**18), (4, 2 * VOCABULARY), (3, 1)):
        monkeypatch.setattr(token_sum, "CHUNK", chunk)
        monkeypatch.setattr(token_sum, "STRIP", strip)
        ours = divergence(student, teacher, kind, temperature=1.5, **share)
        assert_same(ours, theirs)
        assert_same(gradient(ours, *learned(student)), gradient(theirs, *learned(student)))


@every_kind
def test_the_gradient_agrees_with_differences(kind, share):
    student, teacher = heads(student=(0.8, 4.0))
    parts = [x[:4].detach().requires_grad_() if i == 0 else x for i, x in enumerate(learned(student))]

    def loss(hidden, weight, bias):
        return divergence(
            Logits(hidden, weight, bias, 0.8, 4.0), Logits(teacher.hidden[:4], teacher.weight), kind, **share
        )

    assert torch.autograd.gradcheck(loss, parts)


def test_either_side_may_be_logits_or_log_probabilities():
    student, teacher = heads()
    both = divergence(student, teacher, "jsd", temperature=2.0)
    for known in (made(teacher), made(teacher).log_softmax(-1)):
        assert_same(divergence(student, known.detach(), "jsd", temperature=2.0), both)
    logits = made(student)
    ours = divergence(logits, teacher, "jsd", temperature=2.0)
    assert_same(gradient(ours, *learned(student)), gradient(both, *learned(student)))


def test_a_tied_head_gets_the_gradient_of_both_its_uses():
    table, ids = learning(VOCABULARY, STUDENT), torch.arange(ROWS)
    teacher = draw(ROWS, VOCABULARY, seed=1)
    hidden = table[ids] * 2
    ours = divergence(Logits(hidden, table), teacher)
    theirs = reference(hidden @ table.T, teacher, "forward_kl").mean()
    assert_same(gradient(ours, table), gradient(theirs, table))


def test_only_what_learns_gets_a_gradient():
    student, teacher = heads()
    frozen = Logits(student.hidden, student.weight.detach(), student.bias)
    ours, theirs = (divergence(s, teacher) for s in (frozen, student))
    assert_same(gradient(ours, student.hidden, student.bias), gradient(theirs, student.hidden, student.bias))
    ours.backward()
    assert all(x.grad is None for x in (student.weight, *learned(teacher)))
    with torch.no_grad():
        assert torch.equal(divergence(student, teacher), theirs.detach())


@every_kind
def test_padding_of_either_head_is_left_out(kind, share):
    student, teacher = heads()
    wide = [
        Logits(s.hidden, torch.cat([s.weight, draw(more, width, seed=9)]), torch.cat([s.bias, draw(more, seed=8)]))
        for s, more, width in ((student, 4, STUDENT), (teacher, 2, TEACHER))
    ]
    expected = divergence(student, teacher, kind, **share)
    for left, right in ((wide[0], teacher), (student, wide[1]), (wide[0], made(teacher)), (made(wide[0]), teacher)):
        found = divergence(left, right, kind, **share)
        assert_same(found, expected)
        assert_same(gradient(found, *learned(student)), gradient(expected, *learned(student)))


# Rows


def test_weights_of_rows_and_the_sum_are_those_of_a_loop():
    student, teacher = heads()
    weights = draw(ROWS, seed=3).abs()
    weights[2] = 0
    ours = divergence(student, teacher, "reverse_kl", weights=weights, reduction="sum")
    theirs = (reference(made(student), made(teacher), "reverse_kl") * weights).sum()
    assert_same(ours, theirs)
    assert_same(gradient(ours, *learned(student)), gradient(theirs, *learned(student)))


@given(cut=st.integers(0, ROWS))
@settings(deadline=None, max_examples=12)
def test_sums_do_not_depend_on_how_the_rows_are_cut(cut):
    student, teacher = heads()

    def part(rows):
        s, t = (Logits(x.hidden[rows], x.weight, x.bias) for x in (student, teacher))
        return divergence(s, t, "jsd", reduction="sum")

    whole, parts = part(slice(0, ROWS)), part(slice(0, cut)) + part(slice(cut, ROWS))
    assert_same(parts, whole)
    assert_same(gradient(parts, *learned(student)), gradient(whole, *learned(student)))


def test_no_row_gives_zero_and_zero_gradients():
    student, teacher = heads()
    none = Logits(student.hidden[:0], student.weight, student.bias)
    loss = divergence(none, Logits(teacher.hidden[:0], teacher.weight))
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradient(loss, student.weight, student.bias))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_cross_entropy_is_added_in_the_same_pass(kind):
    student, teacher = heads(student=(0.7, 3.0))
    targets = torch.arange(ROWS) * 2
    together = divergence(student, teacher, kind, temperature=2.0, targets=targets, ce=0.3)
    apart = divergence(student, teacher, kind, temperature=2.0) + 0.3 * cross_entropy(student, targets)
    plain = torch.nn.functional.cross_entropy(made(student), targets)
    assert_same(cross_entropy(student, targets), plain)
    assert_same(together, apart)
    for x, y, z in zip(*(gradient(loss, *learned(student)) for loss in (together, apart, plain)), strict=True):
        assert_same(x, y)
        assert not torch.allclose(x, z)


# What divergences are


@every_kind
def test_the_teacher_itself_has_nothing_to_learn(kind, share):
    for dtype in (torch.float32, torch.float64):
        student = learning(ROWS, VOCABULARY, dtype=dtype)
        loss = divergence(student, student.detach(), kind, **share)
        assert loss == 0
        assert torch.equal(gradient(loss, student)[0], torch.zeros_like(student))


@every_kind
def test_a_constant_added_to_a_row_of_logits_changes_nothing(kind, share):
    student, teacher = draw(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    moved = divergence(student + draw(ROWS, 1, seed=2), teacher - 3, kind, **share)
    assert_same(moved, divergence(student, teacher, kind, **share))


@every_kind
def test_the_gradient_of_logits_sums_to_zero(kind, share):
    student = learning(ROWS, VOCABULARY)
    loss = divergence(student, draw(ROWS, VOCABULARY, seed=1), kind, **share)
    assert_same(gradient(loss, student)[0].sum(-1), torch.zeros(ROWS, dtype=torch.float64))


def test_forward_and_reverse_change_places_with_teacher_and_student():
    a, b = draw(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    for kind, other, here, there in (
        ("forward_kl", "reverse_kl", {}, {}),
        ("skew_forward_kl", "skew_reverse_kl", {}, {}),
        ("jsd", "jsd", {"beta": 0.3}, {"beta": 0.7}),
        ("total_variation", "total_variation", {}, {}),
    ):
        assert_same(divergence(a, b, kind, **here), divergence(b, a, other, **there))
        assert kind == other or not torch.isclose(divergence(a, b, kind), divergence(a, b, other))


@pytest.mark.parametrize("kind", ["jsd", "scaled_jsd", "symmetric", "skew_forward_kl", "skew_reverse_kl"])
def test_ends_of_beta_and_alpha_are_the_kls_and_are_reached_without_a_jump(kind):
    student, teacher = learning(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    key = SHARES[kind][0]
    ends = {0: "forward_kl", 1: "reverse_kl"} if key == "beta" else {0: kind.removeprefix("skew_")}
    for end, name in ends.items():
        at, kl_there = divergence(student, teacher, kind, **{key: end}), divergence(student, teacher, name)
        assert torch.equal(at, kl_there)
        assert torch.equal(*gradient(at, student), *gradient(kl_there, student))
        near = divergence(student, teacher, kind, **{key: abs(end - 1e-6)})
        if kind == "jsd":  # as published: it tends to 0
            assert near < 1e-5
        else:
            assert_same(near, kl_there, atol=1e-4)
            assert_same(*gradient(near, student), *gradient(kl_there, student), atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), spread=st.sampled_from([0.1, 1.0, 10.0, 300.0]), share=st.floats(0.01, 0.99))
def test_bounds(seed, spread, share):
    student, teacher = (spread * draw(4, 13, seed=s) for s in (seed, seed + 2000))
    found = {
        kind: divergence(student, teacher, kind, **{key: share for key in [SHARES.get(kind, [None])[0]] if key})
        for kind, _ in CASES
    }
    assert all(value > -1e-12 for value in found.values())
    assert found["jsd"] <= -share * math.log(share) - (1 - share) * math.log(1 - share) + 1e-12  # entropy of the mixing
    assert max(found["skew_forward_kl"], found["skew_reverse_kl"]) <= -math.log(share) + 1e-12
    assert found["total_variation"] <= min(1, math.sqrt(min(found["forward_kl"], found["reverse_kl"]) / 2)) + 1e-12


def test_total_variation_does_not_pull_at_ties():
    student = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64).requires_grad_()
    teacher = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 0.0]], dtype=torch.float64)  # row 1: the first entry is a tie
    loss = divergence(student, teacher, "total_variation", reduction="sum")
    found = gradient(loss, student)[0]
    q = student[1].softmax(-1)
    along = q * torch.tensor([0, -0.5, 0.5], dtype=torch.float64)
    assert torch.equal(found[0], torch.zeros(3, dtype=torch.float64))
    assert_same(found[1], along - q * along.sum())


# Numbers


FINITE = [case for case in CASES if case[0] not in ("reverse_kl", "symmetric")]


@pytest.mark.parametrize(("kind", "share"), FINITE, ids=str)
def test_a_token_that_the_teacher_rules_out_is_only_to_be_avoided(kind, share):
    student, teacher = learning(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    teacher[:, 3], teacher[4, 5] = -math.inf, -math.inf
    p, q = teacher.softmax(-1), student.softmax(-1)
    ours, theirs = divergence(student, teacher, kind, **share), formula(p, q, kind, **share).mean()
    assert_same(ours, theirs)
    found = gradient(ours, student)[0]
    assert found.isfinite().all()
    assert (found[:, 3] > 0).all()
    finite = reference(student, teacher.clamp(min=-700), kind, **share).mean()
    assert_same(found, gradient(finite, student)[0])


def test_reverse_kl_of_a_token_that_the_teacher_rules_out_is_infinite():
    teacher = draw(ROWS, VOCABULARY, seed=1)
    teacher[0, 3] = -math.inf
    assert divergence(draw(ROWS, VOCABULARY), teacher, "reverse_kl") == math.inf


@every_kind
def test_what_is_not_a_number_is_not_hidden(kind, share):
    for side in (0, 1):
        pair = [draw(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)]
        pair[side][2, 3] = math.nan
        assert divergence(*pair, kind, **share).isnan()


@every_kind
def test_float32_holds_where_probabilities_vanish(kind, share):
    """Logits up to several hundred: most probabilities are 0 in float32, their logarithms are not."""
    student, teacher = 150 * draw(ROWS, VOCABULARY), 150 * draw(ROWS, VOCABULARY, seed=1)
    narrow = student.float().requires_grad_()
    exact = narrow.detach().double().requires_grad_()
    ours, theirs = (
        divergence(narrow, teacher.float(), kind, **share),
        divergence(exact, teacher.float().double(), kind, **share),
    )
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    found, expected = gradient(ours, narrow)[0].double(), gradient(theirs, exact)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_kind
def test_float32_sees_a_small_difference(kind, share):
    student, nudge = draw(ROWS, VOCABULARY).float(), 1e-3 * draw(ROWS, VOCABULARY, seed=1).float()
    teacher = student + nudge
    exact = divergence(student.double(), teacher.double(), kind, **share)
    assert abs(divergence(student, teacher, kind, **share) - exact) < 1e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = heads(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = divergence(student, teacher, "jsd")
    wide = [
        Logits(*(x.detach().float().requires_grad_() for x in (s.hidden, s.weight, s.bias))) for s in (student, teacher)
    ]
    theirs = divergence(*wide, "jsd")
    assert ours.dtype == torch.float32
    assert_same(ours, theirs, atol=0)
    for found, expected in zip(gradient(ours, *learned(student)), gradient(theirs, *learned(wide[0])), strict=True):
        assert torch.equal(found, expected.to(dtype))


def test_a_half_precision_head_sums_its_gradient_in_float32(monkeypatch):
    """1,024 chunks of equal rows: added up in bfloat16 the sum would stop growing."""
    monkeypatch.setattr(token_sum, "CHUNK", 1)
    weight = draw(7, 5, dtype=torch.bfloat16).requires_grad_()
    row, teacher = draw(1, 5, seed=1, dtype=torch.bfloat16), draw(1, 7, seed=2)
    many = divergence(Logits(row.expand(1024, -1), weight), teacher.expand(1024, -1), reduction="sum")
    one = divergence(Logits(row, weight), teacher, reduction="sum")
    torch.testing.assert_close(
        *(g[0].float() for g in (gradient(many, weight), gradient(1024 * one, weight))), rtol=0.01, atol=0
    )


MEMORY = """
import torch
from pathlib import Path
from distill.heads import Logits
from distill.objectives import divergence

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

def run(n, v):
    student = Logits(torch.randn(n, 16, requires_grad=True), torch.randn(v, 16, requires_grad=True))
    teacher = Logits(torch.randn(n, 24), torch.randn(v, 24))
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    divergence(student, teacher, "jsd").backward()
    return peak() - before

run(8, 100)
print(run(4096, 10000))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_logits_never_exist():
    ran = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True, timeout=250)
    one_side = 4096 * 10000 * 4
    assert 0 < int(ran.stdout) < one_side / 4, f"{int(ran.stdout) / 2**20:.0f} MiB"


def test_what_no_divergence_is_called_by_is_said():
    x = draw(2, 5)
    for keys, expected in (
        ({"kind": "forward_lk"}, "did you mean 'forward_kl'"),
        ({"kind": "jsd", "beta": 1.2}, "beta=1.2 must be from 0 to 1"),
        ({"kind": "skew_reverse_kl", "alpha": 1.0}, "alpha=1 at least 0 and below 1"),
        ({"ce": 0.5}, "needs targets"),
    ):
        with pytest.raises(UserError, match=expected):
            divergence(x, x, **keys)


# The value in a recipe

SEGMENTS = torch.tensor([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 2, 2, 2, 2]])


def batch(rows=slice(None)):
    labels = torch.arange(14).view(2, 7).masked_fill(SEGMENTS == 0, -100)
    return {"labels": labels[rows], "segment_ids": SEGMENTS[rows]}


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("objective", ["causal", "mlm"])
def test_terms_over_counts_do_not_depend_on_how_the_batch_is_cut(objective, reduction):
    value = Divergence(target="t", kind="jsd", temperature=2.0, objective=objective, reduction=reduction)
    student, teacher = draw(14, VOCABULARY), draw(14, VOCABULARY, seed=1)

    def run(rows):
        part = batch(rows)
        at = token_sum.scored(part["labels"], part["segment_ids"], causal=objective == "causal")[0] + 7 * rows.start
        traces = [SimpleNamespace(head=x[at]) for x in (student, teacher)]
        return value.terms(*traces, part)["jsd"], value.count(part)["jsd"], at

    whole, count, at = run(slice(0, 2))
    (one, first, _), (two, second, _) = run(slice(0, 1)), run(slice(1, 2))
    assert count == first + second
    assert count.dtype == torch.float64
    assert_same((one + two) / count, whole / count)
    each = reference(student[at], teacher[at], "jsd", temperature=2.0)
    names = (SEGMENTS + 10 * torch.arange(2)[:, None]).flatten()[at]
    means = [each[names == n].mean() for n in names.unique()] if reduction == "sequence" else each
    assert_same(whole / count, sum(means) / len(means))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kind": "kl"}, "Input should be"),
        ({"beta": 0.5}, "beta: forward_kl has none; symmetric, jsd, scaled_jsd do"),
        ({"kind": "jsd", "alpha": 0.1}, "alpha: jsd has none; skew_forward_kl, skew_reverse_kl do"),
        ({"kind": "jsd", "beta": 1.5}, "less than or equal to 1"),
        ({"kind": "skew_forward_kl", "alpha": 1.0}, "less than 1"),
        ({"temperature": 0.0}, "greater than 0"),
        ({"tau": 2.0}, "Extra inputs"),
    ],
)
def test_a_wrong_recipe_is_refused(keys, expected):
    with pytest.raises(ValidationError, match=expected):
        Divergence(target="t", **keys)


def test_a_model_that_looks_the_other_way_is_refused():
    facts = {causal: SimpleNamespace(family="gpt2" if causal else "bert", causal=causal) for causal in (True, False)}
    for objective, right in (("causal", True), ("mlm", False)):
        value = Divergence(target="t", objective=objective)
        assert value.check(facts[right], facts[right]) == []
        assert len(value.check(facts[right], facts[not right])) == 1
        assert len(value.check(facts[not right], facts[not right])) == 2
        assert value.needs().head == objective and value.needs().target_head


def test_recipes_know_every_kind_there_is():
    assert (
        set(get_args(Kind)) == {*divergences.PLAIN, *divergences.SHARED, *divergences.SKEWED} == {k for k, _ in CASES}
    )


# Heads of models

OWN = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.4},
    "opt": {"ffn_dim": tiny.FFN, "word_embed_proj_dim": tiny.HIDDEN},  # goes past its base model
}


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "qwen2", *OWN])
def test_what_a_model_does_to_its_logits_is_found_out(family):
    """Tied and untied heads, transforms, biases, scales and caps: loss and gradient are those of the model's logits."""
    own = {**OWN.get(family, {}), "tie_word_embeddings": family != "qwen2"}
    model, teacher = language_model(family, **own), draw(5, tiny.VOCAB, seed=1, dtype=torch.float32)
    rows, batch = torch.tensor([0, 3, 4, 9, 10]), tiny.batch([[7], [7]], 7)
    head = trace(model, batch, (), rows).head
    logits = model(input_ids=batch["input_ids"]).logits.flatten(0, 1)[rows]
    assert (head.softcap, head.scale) == {
        "gemma2": (2.0, 1.0),
        "granite": (None, pytest.approx(1 / 3)),
        "cohere": (None, pytest.approx(0.4)),
    }.get(family, (None, 1.0))
    assert_same(head.whole(), logits, atol=1e-5)
    ours, theirs = divergence(head, teacher, "jsd"), reference(logits, teacher, "jsd").mean()
    assert_same(ours, theirs, atol=1e-6)
    reached = [p for p in model.parameters() if p.requires_grad]
    sides = (torch.autograd.grad(loss, reached, allow_unused=True) for loss in (ours, theirs))
    for found, expected in zip(*sides, strict=True):
        assert (found is None) == (expected is None)
        assert found is None or torch.allclose(found, expected, atol=1e-5, rtol=1e-4)


def language_model(family, **own):
    """Of families that tiny has no row for as well."""
    if family in tiny.FAMILIES:
        return tiny.model(family, tiny.head(family), **own)
    config = transformers.AutoConfig.for_model(family, **{**tiny.GROUPED, **own})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def test_a_lesson_compares_the_heads_of_student_and_teacher():
    objectives = {"divergence": Divergence(target="t", kind="reverse_kl", temperature=2.0)}
    student, teacher = tiny.model("qwen2", "causal"), freeze(tiny.model("gemma2", "causal", hidden_size=36, seed=1))
    lesson, targets = Lesson(student, objectives), Targets({"t": Online(teacher)}, objectives)
    batch = tiny.batch([[7], [4]], 9)
    (term,) = lesson(batch, targets(batch, objectives), objectives).values()
    mask = batch["segment_ids"] > 0
    logits = [m(input_ids=batch["input_ids"], attention_mask=mask.long()).logits for m in (student, teacher)]
    pairs = zip(*([x[0, :6], x[1, :3]] for x in logits), strict=True)  # each token that has a next one in its row
    expected = sum(reference(*pair, "reverse_kl", temperature=2.0).sum() for pair in pairs)
    assert_same(term, expected, atol=1e-4)
    assert objectives["divergence"].count(batch) == {"reverse_kl": 9}


def test_losses_on_a_head_under_zero_3_have_the_gradient_of_a_plain_model():
    (gaps,) = launch("taps_zero3.py", "bert.mlm", "qwen2.causal")  # a tied head and one of its own
    assert len(gaps) == 2 and max(gaps.values()) < 2e-6


def test_a_model_that_does_more_to_its_logits_is_refused():
    model = tiny.model("qwen2", "causal")
    plain = model.forward
    model.forward = lambda *args, **kwargs: shifted(plain(*args, **kwargs))
    with pytest.raises(UserError, match="does more to its logits"):
        trace(model, tiny.batch([[7]], 7), (), torch.tensor([0]))


def test_a_model_that_makes_logits_without_its_last_layer_is_refused(monkeypatch):
    model = tiny.model("qwen2", "causal")
    monkeypatch.setattr(model, "get_output_embeddings", lambda: torch.nn.Linear(tiny.HIDDEN, tiny.VOCAB))
    with pytest.raises(UserError, match="without its output embeddings"):
        trace(model, tiny.batch([[7]], 7), (), torch.tensor([0]))


def shifted(output):
    output.logits = output.logits + 1
    return output
