"""Laws of cached teachers: of the losses against a part of a distribution, of the cache on disk, of the target."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from test_divergence import CASES, VOCABULARY, draw, formula, gradient, heads, learned, learning

from distill.heads import Logits
from distill.kept import KEEPS, KeepHidden, KeepSampled, KeepTopK, settings
from distill.objectives import divergence, token_sum
from distill.objectives.sparse import Sampled, TopK
from distill.shards import Ragged
from growth.errors import UserError

ROWS = 11
every_kind = pytest.mark.parametrize(("kind", "share"), CASES, ids=str)


def kept(teacher, k, temperature=1.0):
    """The k likeliest tokens of logits [N, V], by the book."""
    log_p = (teacher / temperature).log_softmax(-1)
    best = log_p.topk(k)
    rest = log_p.scatter(1, best.indices, -torch.inf).logsumexp(-1)
    return TopK(best.indices, best.values, rest.clamp(min=-6e4), teacher.shape[1], temperature)


def merged(logits, ids, temperature=1.0):
    """Probabilities of tokens and of all others together [N, k + 1]."""
    p = (logits / temperature).exp()
    p = p / p.sum(-1, keepdim=True)
    others = torch.ones_like(p).scatter(1, ids, 0)
    return torch.cat([p.gather(1, ids), (p * others).sum(-1, keepdim=True)], 1)


def near(one, other, **how):
    torch.testing.assert_close(one, other, **{"rtol": 0, "atol": 1e-12, **how})


# Top-k


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_teacher_of_k_tokens_is_compared_over_k_tokens_and_the_others_as_one(kind, share, temperature):
    student, teacher = learning(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    target = kept(teacher, 4, temperature)
    ours = divergence(student, target, kind, temperature=temperature, temperature_squared=True, **share)
    sides = (merged(x, target.ids, temperature) for x in (teacher, student))
    theirs = temperature**2 * formula(*sides, kind, **share).mean()
    near(ours, theirs)
    near(*gradient(ours, student), *gradient(theirs, student))


@every_kind
def test_all_tokens_kept_is_the_whole_divergence(kind, share):
    student, teacher = learning(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    ours, whole = (divergence(student, side, kind, **share) for side in (kept(teacher, VOCABULARY), teacher))
    near(ours, whole)
    near(*gradient(ours, student), *gradient(whole, student))


@every_kind
def test_more_tokens_bring_the_bound_nearer_and_never_beyond(kind, share):
    student, teacher = (3 * draw(ROWS, VOCABULARY, seed=seed) for seed in (0, 1))
    found = [divergence(student, kept(teacher, k), kind, **share) for k in range(1, VOCABULARY + 1)]
    assert all(one <= other + 1e-12 for one, other in pairwise(found))
    assert found[0] < found[3] < found[-1]
    near(found[-1], divergence(student, teacher, kind, **share))


def test_what_top_k_leaves_out_is_the_divergence_among_the_others():
    """The chain rule of KL: the gap is p_rest times KL of the others among themselves, so at most what was left out
    times their worst logarithm."""
    student, teacher = draw(ROWS, VOCABULARY), 4 * draw(ROWS, VOCABULARY, seed=1)
    target = kept(teacher, 5)
    gap = divergence(student, teacher) - divergence(student, target)
    others = torch.ones(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, target.ids, False)
    p, q = (x.softmax(-1)[others].view(ROWS, -1) for x in (teacher, student))
    p_rest, q_rest = p.sum(1, keepdim=True), q.sum(1, keepdim=True)
    near(gap, (p_rest.squeeze(1) * (p / p_rest * (p / p_rest * q_rest / q).log()).sum(1)).mean())


@pytest.mark.parametrize("k", [1, 6, VOCABULARY])
def test_a_head_is_taught_without_its_logits(monkeypatch, k):
    """Chunks, strips, scale, cap, row weights and cross-entropy: as with a teacher that is whole."""
    monkeypatch.setattr(token_sum, "CHUNK", 4)
    monkeypatch.setattr(token_sum, "STRIP", 3 * VOCABULARY)
    student, teacher = heads(student=(0.7, 3.0))
    weights, targets = draw(ROWS, seed=3).abs(), torch.arange(ROWS) % VOCABULARY
    target = kept(teacher.whole().detach(), k)
    how = {"weights": weights, "targets": targets, "ce": 0.3, "reduction": "sum"}
    ours = divergence(student, target, "jsd", **how)
    logits = student.whole()
    sides = (merged(x, target.ids) for x in (teacher.whole().detach(), logits))
    p, q = [x[:, :k] for x in sides] if k == VOCABULARY else sides
    each = formula(p, q, "jsd") + 0.3 * torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    theirs = (weights * each).sum()
    near(ours, theirs)
    for found, expected in zip(gradient(ours, *learned(student)), gradient(theirs, *learned(student)), strict=True):
        near(found, expected)


@every_kind
def test_float32_holds_where_nothing_is_left(kind, share):
    """The teacher is sure and so is the student, of another token: what is left is far below what float32 resolves
    beside 1, and one minus the sum of the others would be noise."""
    teacher, student = 60 * draw(ROWS, VOCABULARY, seed=1), 60 * draw(ROWS, VOCABULARY)
    narrow, target = student.float().requires_grad_(), kept(teacher, 3)
    exact = narrow.detach().double().requires_grad_()
    half = TopK(target.ids, target.log_probs.float(), target.rest.float(), VOCABULARY)
    ours, theirs = divergence(narrow, half, kind, **share), divergence(exact, target, kind, **share)
    assert ours.isfinite()
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    found, expected = (gradient(*pair)[0].double() for pair in ((ours, narrow), (theirs, exact)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rounding_on_disk_leaves_a_distribution():
    """Halves whose sum is off by a thousandth: equal sides are still as near as that rounding, and not below zero."""
    teacher = 3 * draw(ROWS, VOCABULARY, seed=1)
    target = kept(teacher, 5)
    rounded = TopK(target.ids, target.log_probs.half(), target.rest.half(), VOCABULARY)
    assert 0 <= divergence(teacher, rounded) < 1e-5


def test_a_padded_head_learns_nothing_of_its_padding():
    teacher, student = draw(ROWS, VOCABULARY, seed=1), learning(ROWS, VOCABULARY + 3)
    for target in (kept(teacher, 4), sampled(teacher, 50)):
        loss = divergence(student, target)
        near(loss, divergence(student[:, :VOCABULARY], target))
        assert (gradient(loss, student)[0][:, VOCABULARY:] == 0).all()
        with pytest.raises(UserError, match="head has 22 rows, its cached teacher 23 tokens"):
            divergence(student[:, :22], target)


# Sampled


def sampled(teacher, draws, seed=0, temperature=1.0):
    """Independent draws from the softmax of logits [N, V]: token and 1 / n each."""
    log_p = (teacher / temperature).log_softmax(-1)
    ids = torch.multinomial(log_p.exp(), draws, replacement=True, generator=torch.Generator().manual_seed(seed))
    weights = torch.full(ids.shape, 1 / draws, dtype=teacher.dtype)
    return Sampled(ids, weights, -(log_p.exp() * log_p).sum(-1), teacher.shape[1], temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_sampled_teacher_is_a_distribution_of_its_draws(temperature):
    student, teacher = learning(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    target = sampled(teacher, 7, temperature=temperature)
    ours = divergence(student, target, temperature=temperature, temperature_squared=True)
    p = torch.zeros(ROWS, VOCABULARY, dtype=torch.float64).scatter_add(1, target.ids, target.weights)
    cross = -(p * (student / temperature).log_softmax(-1)).sum(-1)
    theirs = temperature**2 * (cross - target.entropy).mean()
    near(ours, theirs)
    near(*gradient(ours, student), *gradient(theirs, student))


def test_weights_that_are_the_probabilities_are_forward_kl():
    student, teacher = learning(ROWS, VOCABULARY), draw(ROWS, VOCABULARY, seed=1)
    log_p = teacher.log_softmax(-1)
    every = torch.arange(VOCABULARY).expand(ROWS, -1)
    ours = divergence(student, Sampled(every, log_p.exp(), -(log_p.exp() * log_p).sum(-1), VOCABULARY))
    whole = divergence(student, teacher)
    near(ours, whole)
    near(*gradient(ours, student), *gradient(whole, student))


def test_a_sampled_teacher_has_no_other_divergence():
    student, target = draw(ROWS, VOCABULARY), sampled(draw(ROWS, VOCABULARY, seed=1), 7)
    assert divergence(student, target, "jsd", beta=0.0) == divergence(student, target)
    with pytest.raises(UserError, match="no other divergence than forward_kl"):
        divergence(student, target, "reverse_kl")


def test_another_temperature_than_the_cached_one_is_refused():
    teacher = draw(ROWS, VOCABULARY, seed=1)
    for target in (kept(teacher, 4, 2.0), sampled(teacher, 7, temperature=2.0)):
        with pytest.raises(UserError, match="cached at temperature 2, the loss asks for 1"):
            divergence(draw(ROWS, VOCABULARY), target)


def test_strips_are_the_logits_and_never_more_than_a_few(monkeypatch):
    monkeypatch.setattr(token_sum, "CHUNK", 4)
    monkeypatch.setattr(token_sum, "STRIP", 2 * VOCABULARY)
    _, teacher = heads(teacher=(0.7, 3.0))
    found = list(token_sum.strips(teacher))
    assert max(len(x) for _, x in found) == 2 and [rows.start for rows, _ in found] == [0, 2, 4, 6, 8, 10]
    near(torch.cat([x for _, x in found]), teacher.whole())
    assert next(token_sum.strips(Logits(draw(2, 5, dtype=torch.bfloat16))))[1].dtype == torch.float32


# What is kept


def starts(rows=ROWS, seed=0):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flat(values):
    """As a store hands them over: end to end."""
    return {name: one.values if isinstance(one, Ragged) else one for name, one in values.items()}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-5), ("float16", 4e-3)])
def test_the_likeliest_tokens_of_a_head_and_what_they_leave(monkeypatch, temperature, dtype, atol):
    monkeypatch.setattr(token_sum, "CHUNK", 4)
    monkeypatch.setattr(token_sum, "STRIP", 3 * VOCABULARY)
    _, teacher = heads(teacher=(0.7, 3.0))
    keep = KeepTopK(5, dtype, VOCABULARY, temperature)
    ours, book = keep.restored(keep.kept(teacher, starts())), kept(teacher.whole().detach(), 5, temperature)
    assert torch.equal(ours.ids, book.ids) and ours.temperature == temperature
    for found, expected in ((ours.log_probs, book.log_probs), (ours.rest, book.rest)):
        near(found.double(), expected, atol=atol)


def test_what_a_teacher_rules_out_and_what_nothing_is_left_of_can_be_written():
    teacher = draw(ROWS, VOCABULARY, seed=1).float()
    teacher[:, 3:] = -torch.inf
    for k in (2, 5, VOCABULARY):
        keep = KeepTopK(k, "float16", VOCABULARY, 1.0)
        values = keep.kept(Logits(teacher), starts())
        assert all(x.isfinite().all() for x in values.values())
        student = learning(ROWS, VOCABULARY)
        loss = divergence(student, keep.restored(values), "jsd")
        assert loss.isfinite() and gradient(loss, student)[0].isfinite().all()


def test_a_token_is_drawn_as_often_as_it_is_likely_give_or_take_less_than_one():
    _, teacher = heads()
    keep, p = KeepSampled(20, VOCABULARY, 1.5), (teacher.whole() / 1.5).softmax(-1).detach()
    values = keep.kept(teacher, starts())
    found = keep.restored(flat(values))
    weights = torch.zeros(ROWS, VOCABULARY).scatter_add(1, found.ids, found.weights)
    assert ((weights - p).abs() < 1 / 20).all() and (weights.sum(1) - 1).abs().max() < 1e-6
    assert len(values["ids"].values) == int((weights > 0).sum())  # a token that was not drawn takes no place
    near(found.entropy.double(), -(p * p.log()).sum(-1), atol=1e-6)


def test_draws_are_unbiased_and_steadier_than_independent_ones():
    """Over all starts, evenly, each weight is its probability, and so value and gradient are the exact ones; from one
    start they are off by less than a third, in squares, of what as many independent draws are."""
    student, teacher = learning(ROWS, VOCABULARY), 2 * draw(ROWS, VOCABULARY, seed=1)
    keep, many = KeepSampled(20, VOCABULARY, 1.0), 500
    every = [torch.full((ROWS,), (i + 0.5) / many, dtype=torch.float64) for i in range(many)]
    exact = divergence(student, teacher)

    def several(targets):
        losses = [divergence(student, target) for target in targets]
        return torch.stack(losses).detach(), torch.stack([gradient(loss, student)[0] for loss in losses])

    values, slopes = several(keep.restored(flat(keep.kept(Logits(teacher), start))) for start in every)
    _, apart = several(sampled(teacher, 20, seed) for seed in range(many))
    slope = gradient(exact, student)[0]
    near(values.mean(), exact.detach(), atol=1e-4)
    near(slopes.mean(0), slope, atol=2 / many / 20)
    assert (slopes - slope).square().sum() < (apart - slope).square().sum() / 3


def test_hidden_states_and_the_last_layer_are_the_head(tmp_path):
    _, teacher = heads(teacher=(0.7, 3.0))
    keep = KeepHidden.of(teacher, "float64")
    keep.save(tmp_path)
    again = KEEPS["hidden"](**json.loads(json.dumps(settings(keep)))).load(tmp_path, torch.device("cpu"))
    near(again.restored(keep.kept(teacher, starts())).whole(), teacher.whole())


@pytest.mark.parametrize("name", ["topk", "sampled", "hidden"])
def test_what_cannot_have_been_kept_is_refused(name):
    _, teacher = heads()
    keep = {
        "topk": KeepTopK(4, "float32", VOCABULARY, 1.0),
        "sampled": KeepSampled(9, VOCABULARY, 1.0),
        "hidden": KeepHidden.of(teacher, "float64"),
    }[name]
    values = flat(keep.kept(teacher, starts()))
    keep.restored(values)
    wrong = {
        "topk": [
            ("ids", lambda x: x + VOCABULARY, "vocabulary ends at 22"),
            ("ids", lambda x: x * 0, "a token twice"),
            ("log_probs", lambda x: x + 0.1, "do not sum to 1"),
            ("rest", lambda x: x * torch.nan, "do not sum to 1"),
        ],
        "sampled": [
            ("ids", lambda x: x - VOCABULARY, "vocabulary ends at 22"),
            ("counts", lambda x: x + 1, "not of 9 draws"),
            ("entries", lambda x: x + 1, "more or fewer tokens"),
            ("entropy", lambda x: x * torch.nan, "entropy"),
        ],
        "hidden": [("hidden", lambda x: x * torch.nan, "NaN or infinite")],
    }[name]
    for column, spoil, said in wrong:
        with pytest.raises(UserError, match=said):
            keep.restored({**values, column: spoil(values[column])})
