"""Laws of cached teachers: of the losses against a part of a distribution, of the cache on disk, of the target."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from itertools import islice, pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from test_divergence import CASES, VOCABULARY, draw, formula, gradient, heads, language_model, learned, learning

from distill import corpus, layout, preflight, recipe
from distill.context import Context
from distill.corpus import synthetic, vocabulary
from distill.heads import Logits
from distill.lesson import Lesson
from distill.objectives import Aligned, Divergence, divergence, token_sum
from distill.objectives.sparse import Sampled, TopK
from distill.refine import Cache
from distill.schedules import Progress, fixed
from distill.scores import Reader, keys
from distill.scores import store as scores
from distill.scores.shards import Ragged
from distill.taps import trace
from distill.teachers import cached
from distill.teachers.cached import Cached
from distill.teachers.frozen import alignment, frozen
from distill.teachers.kept import KEEPS, KeepHidden, KeepSampled, KeepTopK, settings
from distill.teachers.retelling import retold
from distill.teachers.targets import Online, Targets
from growth import files
from growth.errors import UsageError, UserError

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
    ours, book = keep.restored(keep.kept(teacher, None, starts())), kept(teacher.whole().detach(), 5, temperature)
    assert torch.equal(ours.ids, book.ids) and ours.temperature == temperature
    for found, expected in ((ours.log_probs, book.log_probs), (ours.rest, book.rest)):
        near(found.double(), expected, atol=atol)


def test_what_a_teacher_rules_out_and_what_nothing_is_left_of_can_be_written():
    teacher = draw(ROWS, VOCABULARY, seed=1).float()
    teacher[:, 3:] = -torch.inf
    for k in (2, 5, VOCABULARY):
        keep = KeepTopK(k, "float16", VOCABULARY, 1.0)
        values = keep.kept(Logits(teacher), None, starts())
        assert all(x.isfinite().all() for x in values.values())
        student = learning(ROWS, VOCABULARY)
        loss = divergence(student, keep.restored(values), "jsd")
        assert loss.isfinite() and gradient(loss, student)[0].isfinite().all()


def test_a_token_is_drawn_as_often_as_it_is_likely_give_or_take_less_than_one():
    _, teacher = heads()
    keep, p = KeepSampled(20, VOCABULARY, 1.5), (teacher.whole() / 1.5).softmax(-1).detach()
    values = keep.kept(teacher, None, starts())
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

    values, slopes = several(keep.restored(flat(keep.kept(Logits(teacher), None, start))) for start in every)
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
    near(again.restored(keep.kept(teacher, None, starts())).whole(), teacher.whole())


@pytest.mark.parametrize("name", ["topk", "sampled", "hidden"])
def test_what_cannot_have_been_kept_is_refused(name):
    _, teacher = heads()
    keep = {
        "topk": KeepTopK(4, "float32", VOCABULARY, 1.0),
        "sampled": KeepSampled(9, VOCABULARY, 1.0),
        "hidden": KeepHidden.of(teacher, "float64"),
    }[name]
    values = flat(keep.kept(teacher, None, starts()))
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


# On the disk

STEPS = 3
RECIPE = {
    "recipe": "small",
    "engine": {"micro_batch": 2},
    "models": {name: {"from": name} for name in ("teacher", "unpacked", "other", "masked", "speaker")},
    "corpora": {
        "text": {"source": "synthetic", "tokenizer": "teacher", "length": 48, "heldout": 0.1, "limit": 30},
        "more": {"source": "synthetic", "tokenizer": "teacher", "length": 48, "heldout": 0.1, "limit": 31},
    },
    "stages": [
        {"id": "kept", "data": {"from": "text", "ops": [{"cache": {"teacher": "teacher", "k": 8, "tokens": 200}}]}},
        {
            "id": "student",
            "train": {
                "student": {"cut": {"from": "teacher", "layers": [0, 3]}},
                "data": "text",
                "targets": {"t": {"cache": "kept"}},
                "loss": [{"divergence": {"target": "t", "kind": "jsd", "ce": 0.1}}],
                "optim": {"batch": 4},
                "lr": 0.01,
                "stop": {"steps": STEPS},
            },
        },
    ],
}
KNOWN, PADDED = tiny.VOCAB, 67  # pieces of the tokeniser, rows of the heads


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Teachers and a recipe; one teacher is of a family that cannot keep packed documents apart."""
    path = tmp_path_factory.mktemp("place")
    padded = {"vocab_size": PADDED}
    tiny.save(tiny.model("qwen2", "causal", **padded), path / "teacher", tiny.tokenizer())
    tiny.save(tiny.model("qwen2", "causal", seed=1, **padded), path / "other", tiny.tokenizer())
    tiny.save(language_model("opt", ffn_dim=40, **padded), path / "unpacked", tiny.tokenizer())
    tiny.save(tiny.model("bert", "mlm", **padded), path / "masked")
    words = vocabulary.train("unigram", 90, [document.text for document in islice(synthetic.documents(), 40)])
    tiny.save(tiny.model("llama", "causal", seed=2, vocab_size=95), path / "speaker", words)
    (path / "small.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def context(place):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        made = Context(recipe.load("small.yaml"), place / "out", 0)
        made.corpus("text")
        yield made


def write(context, out, **op):
    told = Cache(**{"teacher": "teacher", "tokens": 200, **op}).apply(context.corpus("text"), out, context)
    return Cached(out, torch.device("cpu")), told


def student_of():
    return tiny.model("llama", "causal", seed=5, vocab_size=64)


def rows(context, *places, packed=True):
    batch = corpus.Batches(corpus.open(context.corpus("text")), 0, "causal").at(places)
    return batch if packed else corpus.unpack(batch)


def step(source, student, batch, **keys):
    return learn(source, student, batch, Divergence(target="t", **keys))


def learn(source, student, batch, objective):
    """Loss and gradients of a training step."""
    active = {"d": fixed(objective, Progress(0, 1))}
    taught = Targets({"t": source}, active)(batch, active)
    (loss,) = Lesson(student, active)(batch, taught, active).values()
    student.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("teacher", "packed"), [("teacher", True), ("teacher", False), ("unpacked", False)])
def test_hidden_states_from_disk_teach_as_the_teacher_itself(context, tmp_path, teacher, packed):
    """Packed rows or documents alone, whatever the teacher can read: loss and gradients of the whole step."""
    source, _ = write(context, tmp_path / "scores", teacher=teacher, keep="hidden")
    model = frozen(teacher, "causal", context)
    assert layout.packable(model.config) == (teacher == "teacher")
    online = Online(model, KNOWN)
    student, batch = student_of(), rows(context, 3, 0, 5, 3, packed=packed)
    for how in ({"kind": "jsd", "temperature": 2.0, "ce": 0.2}, {"kind": "reverse_kl", "reduction": "sequence"}):
        (ours, found), (theirs, expected) = (step(side, student, batch, **how) for side in (source, online))
        near(ours / theirs, torch.ones(()), atol=1e-6)
        assert found.keys() == expected.keys() and len(found) > 20
        for name in found:
            near(found[name], expected[name], atol=1e-6 * expected[name].abs().max().item())


@pytest.mark.parametrize(("k", "kind"), [(3, "forward_kl"), (20, "reverse_kl"), (KNOWN, "jsd")])
def test_the_likeliest_tokens_from_disk_teach_as_those_of_the_teacher(context, tmp_path, k, kind):
    source, _ = write(context, tmp_path / "scores", k=k, temperature=2.0, dtype="float32")
    student, batch = student_of(), rows(context, 3, 0, 5)
    ours, _ = step(source, student, batch, kind=kind, temperature=2.0)
    whole, _ = step(Online(frozen("teacher", "causal", context), KNOWN), student, batch, kind=kind, temperature=2.0)
    logits = _trace_of(frozen("teacher", "causal", context), batch).whole().double()
    head = _trace_of(student, batch)
    theirs = divergence(head.trimmed(KNOWN), kept(logits[:, :KNOWN], k, 2.0), kind, temperature=2.0, reduction="sum")
    near(ours / theirs.detach(), torch.ones(()), atol=1e-5)
    assert ours < whole or (k == KNOWN and abs(ours / whole - 1) < 1e-5)


def test_draws_from_disk_teach_as_the_teacher_on_average(context, tmp_path):
    """Over eight caches of other seeds: within three standard errors, and these are small."""
    student, batch = student_of(), rows(context, 3, 0, 5)
    exact, slope = step(Online(frozen("teacher", "causal", context), KNOWN), student, batch)
    losses, slopes = [], []
    for seed in range(8):
        here = Context(context.recipe, context.out, seed)
        source, _ = write(here, tmp_path / f"{seed}", keep="sampled", draws=20, tokens=4000)
        loss, found = step(source, student, batch)
        losses.append(loss)
        slopes.append(torch.cat([g.flatten() for g in found.values()]))
    losses, slopes, slope = torch.stack(losses), torch.stack(slopes), torch.cat([g.flatten() for g in slope.values()])
    error = losses.std() / 8**0.5
    assert abs(losses.mean() - exact) < 3 * error < 0.02 * exact
    off = (slopes.mean(0) - slope).norm() / slope.norm()
    noise = (slopes - slopes.mean(0)).norm() / (8 * 7) ** 0.5 / slope.norm()  # standard error of the whole gradient
    assert off < 1.5 * noise < 0.1
    assert len({float(loss) for loss in losses}) == 8


def _trace_of(model, batch):
    at, _ = token_sum.scored(batch["labels"], batch["segment_ids"], causal=True)
    return trace(model, batch, (), at).head


def test_labels_that_are_left_out_are_left_out_of_the_teacher(context, tmp_path):
    source, _ = write(context, tmp_path / "scores", k=5)
    batch = rows(context, 1, 2)
    every = source.take(batch, []).head
    fewer = {**batch, "labels": batch["labels"].masked_fill(torch.rand(2, 48) < 0.4, -100)}
    at, all_of_them = (token_sum.scored(one["labels"], one["segment_ids"], causal=True)[0] for one in (fewer, batch))
    assert 10 < len(at) < len(all_of_them)
    found = source.take(fewer, []).head
    assert torch.equal(found.log_probs, every.log_probs[torch.isin(all_of_them, at)])


@pytest.mark.parametrize("packed", [True, False])
def test_likelihoods_from_disk_teach_as_a_teacher_of_other_ids(context, tmp_path, packed):
    write(context, tmp_path / "scores", teacher="speaker", keep="likelihood")
    told = alignment("speaker", context, corpus.open(context.corpus("text")))
    source = Cached(tmp_path / "scores", torch.device("cpu"), told)
    online = Online(frozen("speaker", "causal", context), alignment=told)
    batch = retold(rows(context, 3, 0, 5, packed=packed), {"t": told})
    assert batch["t.ids"].shape != batch["input_ids"].shape
    objective = Aligned(target="t", temperature=2.0)
    (ours, found), (theirs, expected) = (learn(side, student_of(), batch, objective) for side in (source, online))
    near(ours / theirs, torch.ones(()), atol=1e-6)
    for name in expected:
        near(found[name], expected[name], atol=3e-6 * expected[name].abs().max().item())


@pytest.mark.parametrize("op", [{"k": 3}, {"keep": "sampled"}, {"keep": "hidden"}], ids=str)
def test_rows_in_which_nothing_is_scored_cost_nothing(context, tmp_path, op):
    source, _ = write(context, tmp_path / "scores", **op)
    batch = rows(context, 1, 2)
    student = student_of()
    loss, _ = step(source, student, {**batch, "segment_ids": torch.zeros_like(batch["segment_ids"])})
    assert loss == 0
    some = {**batch, "segment_ids": batch["segment_ids"] * torch.tensor([[0], [1]])}
    assert step(source, student, some)[0] > 0


def stored(path):
    """Every value of every document."""
    reader = Reader(path)
    return {key.tobytes(): {n: v.values.tolist() for n, v in reader.rows(key[None]).items()} for key in reader.keys}


@pytest.mark.parametrize("op", [{"k": 3}, {"keep": "sampled", "draws": 9}, {"keep": "hidden"}], ids=str)
def test_a_cache_that_was_killed_goes_on_and_holds_the_same(context, tmp_path, monkeypatch, op):
    monkeypatch.setattr(scores, "SHARD_BYTES", 20_000)
    whole, told = write(context, tmp_path / "whole", **op)
    monkeypatch.setattr(files, "_passed", {})
    monkeypatch.setenv("FAULT", "cache.pass:raise:15")
    with pytest.raises(RuntimeError, match="fault at"):
        write(context, tmp_path / "hard", **op)
    monkeypatch.delenv("FAULT")
    before = set((tmp_path / "hard").glob("r*"))
    assert 0 < len(Reader(tmp_path / "hard")) < len(whole.reader) and len(before) > 1
    _, again = write(context, tmp_path / "hard", **op)
    assert before < set((tmp_path / "hard").glob("r*"))
    assert stored(tmp_path / "hard") == stored(tmp_path / "whole")
    names = [{path.name for path in (tmp_path / out).iterdir()} for out in ("hard", "whole")]
    assert names[0] == names[1]  # those of shards have the digest of their content in them
    assert again["tokens"] == told["tokens"]
    once = {path.name for path in (tmp_path / "hard").iterdir()}
    write(context, tmp_path / "hard", **op)  # nothing is left to do
    assert {path.name for path in (tmp_path / "hard").iterdir()} == once


def test_every_document_with_a_next_token_is_there_once_and_the_forecast_was_right(context, tmp_path, capsys):
    source, told = write(context, tmp_path / "scores", k=8)
    text = corpus.open(context.corpus("text"))
    ids, segments = zip(*(text.row(i) for i in range(len(text))), strict=True)
    several = [one for one in keys.documents(ids, segments) if len(one) > 1]
    assert (
        sum(len(one) - 1 for one in several)
        == told["tokens"]
        == text.tokens - text.manifest["sides"]["train"]["pieces"]
    )
    assert {key.tobytes() for key in source.reader.keys} == {key.tobytes() for key in keys.document_keys(several)}
    said = capsys.readouterr().err
    assert f"{told['tokens'] / 1000:.1f} k tokens of 51 bytes each" in said and "tok/s" in said
    assert told["bytes_per_token"] == pytest.approx(51, rel=0.05)


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(context, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(UserError, match=r"the cache needs .* are free"):
        write(context, tmp_path / "scores", k=8)
    assert not (tmp_path / "scores").exists()


# The target


def test_what_is_not_in_the_cache_is_said(context, tmp_path):
    source, _ = write(context, tmp_path / "scores", k=3)
    batch = rows(context, 3)
    with pytest.raises(UserError, match=r"lacks .* rows; score them with the same corpus"):
        source.take({**batch, "input_ids": batch["input_ids"].flip(1)}, [])


@pytest.mark.parametrize("damage", ["shard", "lost", "head"])
def test_damage_is_found_when_a_cache_is_opened(context, tmp_path, damage):
    write(context, tmp_path / "scores", keep="hidden")
    path = next((tmp_path / "scores").glob("head*" if damage == "head" else "r*"))
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match={"lost": "lacks 1 of its shards"}.get(damage, "is damaged|not the one")):
        Cached(tmp_path / "scores", torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": "other"}, "its teacher is"),
        ({"corpus": "more"}, "its corpus is"),
        ({"tokenizer": "x" * 64}, "its tokeniser is .*, the run's xxxxxxxxxxxx"),
        ({}, None),
    ],
)
def test_another_teachers_or_texts_cache_is_refused(context, tmp_path, change, said):
    (tmp_path / "kept").mkdir()
    write(context, tmp_path / "kept/scores", k=3, teacher=change.get("teacher", "teacher"))
    here = Context(context.recipe, tmp_path, 0, found=dict(context.found))
    text = corpus.open(context.corpus(change.get("corpus", "text")))
    if "tokenizer" in change:
        text.manifest["tokenizer_digest"] = change["tokenizer"]
    spec = context.recipe.stage("student").train.targets["t"]
    if said is None:
        assert cached.opened(spec, here, text).keep.k == 3
        return
    with pytest.raises(UserError, match=f"holds something else: {said}.*; cache again"):
        cached.opened(spec, here, text)
    with pytest.raises(UserError, match="holds other scores"):
        write(context, tmp_path / "kept/scores", k=4)


def test_another_teacher_does_not_spoil_a_cache(context, tmp_path):
    write(context, tmp_path / "scores", keep="hidden")
    with pytest.raises(UserError, match="holds other scores"):
        write(context, tmp_path / "scores", keep="hidden", teacher="other")
    Cached(tmp_path / "scores", torch.device("cpu"))


# The recipe


def refused(place, change):
    """What preflight says of the recipe with a change."""
    document = copy.deepcopy(RECIPE)
    change(document)
    (place / "changed.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    read = recipe.load(place / "changed.yaml")
    preflight.check(read, Context(read, place / "nowhere", 0))


def op(document):
    return document["stages"][0]["data"]["ops"][0]["cache"]


def train(document):
    return document["stages"][1]["train"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: op(d).update(keep="sampled"), "k: only keep: topk has it"),
        (lambda d: op(d).update(dtype="bfloat16"), "bfloat16 keeps two digits"),
        (lambda d: op(d).update(k=0), "greater than 0"),
        (lambda d: op(d).update(k=KNOWN + 1), f"k: {KNOWN + 1} of {KNOWN} tokens; {KNOWN} keeps all of them"),
        (lambda d: op(d).update(teacher="masked"), "bert predicts masked tokens"),
        (lambda d: op(d).update(teacher="nobody"), "nobody"),
        (lambda d: op(d).update(temperature=2.0), "temperature: the teacher is cached at 2"),
        (lambda d: (op(d).pop("k"), op(d).update(keep="likelihood")), "teacher has the tokeniser of the corpus"),
        (
            lambda d: (op(d).pop("k"), op(d).update(keep="likelihood", teacher="speaker")),
            "`aligned` of kind likelihood and a cache of keep: likelihood are for each other",
        ),
        (lambda d: op(d).update(teacher="speaker"), "speaker has learned other ids"),
        (
            lambda d: train(d).update(loss=[{"aligned": {"target": "t", "kind": "sorted"}}]),
            "are for each other and nothing else",
        ),
        (lambda d: train(d).update(data="more"), "stage kept has read text, this one trains on more"),
        (lambda d: train(d)["loss"][0].update(hidden={"target": "t"}, divergence=None), "nothing from inside it"),
        (lambda d: train(d)["loss"][0]["divergence"].update(objective="mlm"), "masked ones differ from epoch to epoch"),
        (
            lambda d: (op(d).pop("k"), op(d).update(keep="sampled")),
            "kind jsd: of a sample forward_kl alone is unbiased",
        ),
        (
            lambda d: train(d)["loss"][0]["divergence"].update(temperature={"points": [[0, 1.0], [3, 2.0]]}),
            "cannot be divided by another",
        ),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_before_work_begins(place, context, change, said):
    with pytest.raises(UsageError, match=said):
        refused(place, change)


def test_what_it_can_serve_is_not_refused(place, context):
    refused(place, lambda d: None)
    refused(place, lambda d: (op(d).update(temperature=2.0), train(d)["loss"][0]["divergence"].update(temperature=2.0)))
    schedule = {"points": [[0, 1.0], [3, 2.0]]}
    hidden = lambda d: (op(d).pop("k"), op(d).update(keep="hidden"))  # noqa: E731
    refused(place, lambda d: (hidden(d), train(d)["loss"][0]["divergence"].update(temperature=schedule)))


def run(place, out, *more, fault="", shard=64 << 20):
    """The command, with small shards."""
    code = f"import distill.scores.store as s; s.SHARD_BYTES = {shard}\nfrom distill.cli import main\nmain()"
    command = [sys.executable, "-W", "ignore", "-c", code, "run", "small.yaml", "--out", out, *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAULT": fault}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)


def test_a_run_that_is_killed_while_it_caches_goes_on_and_two_ranks_write_what_one_does(place, context, tmp_path):
    assert run(place, "run", fault="scores.after_shard:kill:3", shard=30_000).returncode == -9
    path = place / "run/kept/scores"
    left = {shard.name for shard in path.glob("r*")}
    assert len(left) == 3
    ended = run(place, "run", "--ranks", "2", shard=30_000)
    assert ended.returncode == 0 and "goes on where it was interrupted" in ended.stderr, ended.stderr
    assert left < {shard.name for shard in path.glob("r*")}
    assert {shard.name[:6] for shard in path.glob("r*")} == {"r00000", "r00001"}
    _, told = write(context, tmp_path / "scores", k=8)
    assert stored(path) == stored(tmp_path / "scores")
    written = json.loads((path / "manifest.json").read_text())["rows"]
    assert written < 1.1 * len(Reader(path))  # each rank its share; a text that stands twice may be written by both
    assert json.loads((place / "run/kept/stage.json").read_text())["metrics"]["cache"]["tokens"] == told["tokens"]
    entries = [json.loads(line) for line in (place / "run/student/log.jsonl").read_text().splitlines()]
    assert [entry["teacher_forwards"] for entry in entries] == [{"t": 0}] * STEPS
    assert entries[0]["teacher_flops"] == 0 and entries[0]["terms"]["divergence.jsd and ce"] > 0
