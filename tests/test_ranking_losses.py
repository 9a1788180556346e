"""Losses of rankers against the same formulas written as loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from distill.objectives import (
    all_pairs_margin_mse,
    contrastive,
    in_batch_margin,
    listwise_kl,
    margin_mse,
    margin_scale,
    pointwise_mse,
    ranking_sum,
    ranknet,
    scale_mismatch,
)
from distill.objectives.score_lists import lists
from growth.errors import UserError

B, N = 5, 7
NAN = float("nan")


@pytest.fixture
def drawn():
    """Scores of student and teacher [B, N] in float64 and a mask, one row of which has nothing."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(B, N, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(B, N, generator=generator) < 0.7
    mask[2] = False
    teacher[0, :2] = teacher[0, 0]  # a tie
    mask[0, :2] = True
    return student.requires_grad_(), teacher, mask


def close(found, expected):
    assert float(found.detach()) == pytest.approx(expected, abs=1e-10, rel=1e-10)


def each(mask):
    """(row, columns that count)."""
    return [(b, [n for n in range(N) if mask[b][n]]) for b in range(B)]


def test_margin_mse_is_its_formula_for_one_negative_and_for_many(drawn):
    student, teacher, mask = drawn
    s, t, m = student.tolist(), teacher.tolist(), mask.tolist()
    one = [((s[b][0] - s[b][1]) - (t[b][0] - t[b][1])) ** 2 for b in range(B)]
    close(margin_mse(student[:, 0], student[:, 1], teacher[:, 0], teacher[:, 1]), sum(one) / B)
    many = [((2 * (s[b][0] - s[b][n])) - (t[b][0] - t[b][n])) ** 2 for b in range(B) for n in range(1, N) if m[b][n]]
    given = student[:, 0], student[:, 1:], teacher[:, 0], teacher[:, 1:], mask[:, 1:]
    close(margin_mse(*given, scale=2.0), sum(many) / len(many))
    close(margin_mse(*given, scale=2.0, reduction="sum"), sum(many))
    close(ranking_sum.pair_count(mask[:, 1:]), len(many))


def test_the_gradient_of_a_margin_is_nothing_in_sum_and_a_shift_changes_nothing(drawn):
    student, teacher, _ = drawn
    loss = margin_mse(student[:, 0], student[:, 1:], teacher[:, 0], teacher[:, 1:])
    expected = loss.item()
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.sum(1).abs().max() < 1e-12 and gradient.abs().max() > 0.1
    shifted = student + torch.arange(B)[:, None], teacher - 7.0
    again = margin_mse(shifted[0][:, 0], shifted[0][:, 1:], shifted[1][:, 0], shifted[1][:, 1:])
    close(again, expected)


def test_all_pairs_in_linear_time_are_all_pairs(drawn):
    student, teacher, mask = drawn
    s, t = student.tolist(), teacher.tolist()
    pairs = [(b, i, j) for b, seen in each(mask.tolist()) for i in seen for j in seen if i < j]
    expected = sum(((3 * (s[b][i] - s[b][j])) - (t[b][i] - t[b][j])) ** 2 for b, i, j in pairs)
    close(all_pairs_margin_mse(student, teacher, mask, scale=3.0, reduction="sum"), expected)
    close(ranking_sum.all_pairs_count(mask), len(pairs))
    close(all_pairs_margin_mse(student, teacher, mask, scale=3.0), expected / len(pairs))
    error = student - teacher  # methods: 2 N / (N - 1) x the biased variance
    close(all_pairs_margin_mse(student, teacher), float(2 * N / (N - 1) * error.var(1, correction=0).mean().detach()))


@pytest.mark.parametrize("temperature, squared", [(1.0, False), (2.5, True)])
def test_listwise_kl_is_one_of_two_distributions(drawn, temperature, squared):
    student, teacher, mask = drawn
    total, rows = 0.0, 0
    for b, seen in each(mask.tolist()):
        p, q = (_softmax([x[b][n] / temperature for n in seen]) for x in (teacher.tolist(), student.tolist()))
        total += sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        rows += bool(seen)
    how = {"temperature": temperature, "temperature_squared": squared}
    close(listwise_kl(student, teacher, mask, **how), total / rows * (temperature**2 if squared else 1))
    close(ranking_sum.list_count(mask), rows)
    assert float(listwise_kl(teacher.clone(), teacher, mask, **how)) == 0


def _softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def test_pointwise_mse_is_its_formula(drawn):
    student, teacher, mask = drawn
    terms = [(student[b, n] - teacher[b, n]).item() ** 2 for b, seen in each(mask) for n in seen]
    close(pointwise_mse(student, teacher, mask), sum(terms) / len(terms))


@pytest.mark.parametrize("weighted", [False, True])
def test_ranknet_follows_the_teacher_and_no_weight_is_negative(drawn, weighted):
    student, teacher, mask = drawn
    s, t = student.tolist(), teacher.tolist()
    pairs = [(b, i, j) for b, seen in each(mask.tolist()) for i in seen for j in seen if t[b][i] > t[b][j]]
    terms = [math.log1p(math.exp(s[b][j] - s[b][i])) * (t[b][i] - t[b][j] if weighted else 1) for b, i, j in pairs]
    close(ranknet(student, teacher, mask, weighted=weighted), sum(terms) / len(terms))
    close(ranking_sum.preference_count(teacher, mask), len(pairs))


def test_in_batch_margins_leave_out_what_belongs_to_the_query(drawn):
    student, teacher, _ = drawn
    positive = torch.tensor([0, 1, 2, 3, 4])
    own = torch.zeros(B, N, dtype=torch.bool)
    own[0, 5] = own[1, 5] = True  # a passage of two queries
    terms = [
        ((student[b, b] - student[b, n]) - (teacher[b, b] - teacher[b, n])).item() ** 2
        for b in range(B)
        for n in range(N)
        if n != b and not own[b, n]
    ]
    close(in_batch_margin(student, teacher, positive, own), sum(terms) / len(terms))
    close(ranking_sum.in_batch_count(positive, own), len(terms))


def test_contrastive_is_cross_entropy_among_what_the_mask_leaves(drawn):
    student, _, mask = drawn
    positive = torch.tensor([1, 0, 6, 2, 2])
    expected = 0.0
    for b, seen in each(mask.tolist()):
        p = int(positive[b])
        others = [student[b, n].item() / 0.5 for n in {*seen, p}]
        expected += math.log(sum(map(math.exp, others))) - student[b, p].item() / 0.5
    close(contrastive(student, positive, mask, temperature=0.5), expected / B)
    close(contrastive(student, positive), float(torch.nn.functional.cross_entropy(student, positive).detach()))


LOSSES = {
    "margin_mse": lambda s, t, m, **k: margin_mse(s[:, 0], s[:, 1:], t[:, 0], t[:, 1:], m[:, 1:], **k),
    "all_pairs": all_pairs_margin_mse,
    "pointwise": pointwise_mse,
    "listwise": listwise_kl,
    "ranknet": ranknet,
}
COUNTS = {
    "margin_mse": lambda t, m: ranking_sum.pair_count(m[:, 1:]),
    "all_pairs": lambda t, m: ranking_sum.all_pairs_count(m),
    "pointwise": lambda t, m: ranking_sum.pair_count(m),
    "listwise": lambda t, m: ranking_sum.list_count(m),
    "ranknet": ranking_sum.preference_count,
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_masked_out_may_be_anything(name, drawn):
    student, teacher, mask = drawn
    mask[:, 0] = True
    loss, hidden = LOSSES[name], ~mask
    expected = loss(student, teacher, mask)
    (gradient,) = torch.autograd.grad(expected, student)
    spoilt = student.detach().masked_fill(hidden, NAN).requires_grad_()
    found = loss(spoilt, teacher.masked_fill(hidden, NAN), mask)
    close(found, float(expected))
    torch.testing.assert_close(torch.autograd.grad(found, spoilt)[0], gradient)
    assert gradient[hidden].abs().max() == 0 and gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_may_be_cut_anywhere(name, drawn):
    student, teacher, mask = drawn
    loss, count = LOSSES[name], COUNTS[name]
    cuts = (slice(0, 1), slice(1, 4), slice(4, B))
    total = sum(loss(student[c], teacher[c], mask[c], reduction="sum") for c in cuts)
    close(total / sum(count(teacher[c], mask[c]) for c in cuts), float(loss(student, teacher, mask)))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_learn_from_is_a_loss_of_zero_that_runs_backward(name, drawn):
    student, teacher, mask = drawn
    loss = LOSSES[name](student, teacher, torch.zeros_like(mask))
    assert float(loss) == 0
    assert torch.autograd.grad(loss, student)[0].abs().max() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, drawn):
    student, teacher, mask = drawn
    half = (100 * student).detach().bfloat16(), (100 * teacher).bfloat16()
    found = LOSSES[name](*half, mask)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(LOSSES[name](*(x.double() for x in half), mask)), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_gets_no_gradient(name, drawn):
    student, teacher, mask = drawn
    assert not LOSSES[name](student.detach(), teacher.requires_grad_(), mask).requires_grad


def test_shapes_are_never_broadcast():
    column, row = torch.zeros(B, 1), torch.zeros(B)
    with pytest.raises(UserError, match=r"positive is \[5, 1\]"):
        margin_mse(column, row, row, row)
    with pytest.raises(UserError, match=r"teacher_negatives is \[5\]"):
        margin_mse(row, column, row, row)
    with pytest.raises(UserError, match=r"teacher is \[5\]"):
        pointwise_mse(column, row)
    with pytest.raises(UserError, match=r"teacher is \[5, 1\]"):
        listwise_kl(torch.zeros(B, N), column)
    with pytest.raises(UserError, match=r"mask is \[5, 1\]"):
        all_pairs_margin_mse(torch.zeros(B, N), torch.zeros(B, N), torch.ones(B, 1, dtype=torch.bool))
    with pytest.raises(UserError, match=r"lists \[B, N\]"):
        ranknet(row, row)
    with pytest.raises(UserError, match=r"positive is \[4\]"):
        contrastive(torch.zeros(B, N), torch.zeros(4, dtype=torch.long))
    with pytest.raises(UserError, match="is bool"):
        pointwise_mse(row, row, torch.ones(B))


def test_pairs_become_lists_of_their_groups():
    scores = torch.tensor([1.0, 2, 3, 4, 5, 6], requires_grad=True)
    found, mask = lists(scores, torch.tensor([2, 0, 2, 2, 0, 3]))
    assert found.tolist() == [[2, 5, 0], [0, 0, 0], [1, 3, 4], [6, 0, 0]]
    assert mask.sum(1).tolist() == [2, 0, 3, 1]
    found.sum().backward()
    assert scores.grad.tolist() == [1] * 6
    with pytest.raises(UserError, match=r"group is \[2\]"):
        lists(scores, torch.tensor([0, 1]))


def test_the_automatic_scale_brings_margins_to_the_teachers_spread():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(50, generator=generator)
    assert margin_scale(student, 20 * student + 3) == pytest.approx(20)
    with pytest.raises(UserError, match="margins that differ"):
        margin_scale(torch.ones(3), student[:3])


def test_a_cosine_student_of_a_logit_teacher_is_told_so():
    cosines, logits = torch.linspace(-1, 1, 9), torch.linspace(-20, 20, 9)
    assert "89 % are beyond: scale: auto would be 20;" in scale_mismatch(cosines, logits, 2.0)
    assert scale_mismatch(cosines, cosines * 1.5, 2.0) is None
    assert scale_mismatch(logits, logits * 0.5) is None
    assert "sigmoid" in scale_mismatch(logits, cosines * 0.9)
