"""Rankers that learn: their losses against loops in float64, on every ZeRO stage; whole runs; what is refused."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import rank_cases
import tiny
import torch
from engine_cases import BATCH
from launch import launch
from rank_cases import GROUP, KINDS, LOSSES

from distill.corpus.order import Order
from distill.lesson import freeze_unreachable
from distill.objectives import InBatchMargin, MarginMSE, RankNet
from distill.objectives.crossing import Scores, crossing
from distill.ranking import rankers, scales
from distill.ranking.batches import Batches
from distill.teachers.targets import Reading
from growth import files

CELLS = [(stage, ranks) for ranks in (1, 2) for stage in range(4)]
every_cell = pytest.mark.parametrize(("stage", "ranks"), CELLS)


# The loss of a step


def alone(ranker, batch, own, q: int, p: int):
    """The score of one pair, as if there were nothing else."""
    sides = []
    for side, row in (("query", q), ("passages", p)):
        texts = (batch["own"][own] if own else batch)[side]
        real = texts["segment_ids"][row] > 0
        sides.append({key: x[row][real][None] for key, x in texts.items()})
    return ranker(*sides, torch.zeros(1, 2, dtype=torch.long))[0]


def by_hand(ranker, teacher, batch) -> torch.Tensor:
    """All losses of `rank_cases.LOSSES`, written as loops over lists."""
    memory = {}

    def score(model, own, q, p):
        key = (own, q, p)
        if key not in memory:
            memory[key] = alone(model, batch, own, q, p)
        return memory[key]

    lists = [[] for _ in batch["sample_ids"]]
    for (q, p), g in zip(batch["pairs"].tolist(), batch["group"].tolist(), strict=True):
        lists[g].append((q, p))
    answers = set(map(tuple, batch["answers"].tolist()))
    found = {name: [] for name in LOSSES}
    for i, listed in enumerate(lists):
        q, own = listed[0][0], [p for _, p in listed]
        s, t = ([score(*side, q, p) for p in own] for side in ((ranker, None), (teacher, "teacher")))
        found["margin_mse"] += [(2 * (s[0] - s[n]) - (t[0] - t[n])) ** 2 for n in range(1, len(own))]
        pairs = [(a, b) for a in range(len(own)) for b in range(a)]
        found["all"] += [((s[a] - s[b]) - (t[a] - t[b])) ** 2 for a, b in pairs]
        found["pointwise_mse"] += [(a - b) ** 2 for a, b in zip(s, t, strict=True)]
        log = [torch.log_softmax(torch.stack(x) / 3.0, 0) for x in (t, s)]
        found["listwise_kl"].append((log[0].exp() * (log[0] - log[1])).sum())
        for a, b in pairs:
            better, worse = (a, b) if t[a] > t[b] else (b, a)
            found["ranknet"].append((t[better] - t[worse]) * torch.log1p(torch.exp(s[worse] - s[better])))
        near = lists[i // GROUP * GROUP : (i // GROUP + 1) * GROUP]
        met = sorted({p for other in near for _, p in other})
        for p in met:
            if p not in own:
                gap = [score(*side, q, own[0]) - score(*side, q, p) for side in ((ranker, None), (teacher, "teacher"))]
                found["in_batch_margin"].append((0.5 * gap[0] - gap[1]) ** 2)
        seen = [p for p in met if p == own[0] or (q, p) not in answers]
        logits = torch.stack([score(ranker, None, q, p) for p in seen]) / 2.0
        found["contrastive"].append(logits.logsumexp(0) - logits[seen.index(own[0])])
    return sum(sum(values) / len(values) for values in found.values())


@functools.cache
def reference(kind: str) -> tuple[float, torch.Tensor]:
    """(loss, its gradient) of the first step in float64, each pair scored alone."""
    lesson, targets, data = rank_cases.parts(kind, BATCH)
    freeze_unreachable(lesson, targets, data)
    trained = {name: p for name, p in lesson.double().named_parameters() if p.requires_grad}
    loss = by_hand(lesson.student, targets.models[0].double(), data(0)[0])
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return loss.item(), torch.cat([g.flatten() for g in gradients])


@functools.cache
def every_stage(ranks: int) -> list[dict]:
    return launch("rank_cases.py", ranks=ranks, timeout=500)[0]


def results(stage: int, ranks: int) -> dict:
    return every_stage(ranks)[stage]


def loss_of(kind: str, micro_batch: int, change=lambda batch: batch) -> float:
    """Of the first step by the lesson, in float64, micro-batch after micro-batch."""
    lesson, targets, data = rank_cases.parts(kind, micro_batch)
    lesson.double(), targets.models[0].double()
    batches, active = [change(batch) for batch in data(0)], lesson.objectives
    counts = [{f"{n}.{k}": float(x) for n, o in active.items() for k, x in o.count(b).items()} for b in batches]
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            for key, value in lesson(batch, targets(batch, active), active).items():
                total += float(value) / sum(count[key] for count in counts)
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_step_is_that_of_loops_over_pairs_scored_alone(kind):
    assert loss_of(kind, BATCH) == pytest.approx(reference(kind)[0], rel=1e-9)


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_the_loss_does_not_depend_on_how_the_step_is_cut(micro_batch):
    assert loss_of("colbert", micro_batch) == pytest.approx(loss_of("colbert", BATCH), rel=1e-12)


def test_padding_may_stand_on_either_side():
    def left(batch):
        sides = {side: _left(batch[side]) for side in ("query", "passages")}
        return batch | sides | {"own": {name: {s: _left(x) for s, x in o.items()} for name, o in batch["own"].items()}}

    assert loss_of("prett", BATCH, left) == pytest.approx(loss_of("prett", BATCH), rel=1e-12)


def _left(texts):
    wide = [[0] * int((row == 0).sum()) + [1] * int((row > 0).sum()) for row in texts["segment_ids"]]
    ids = [[0] * int((s == 0).sum()) + row[s > 0].tolist() for row, s in zip(*texts.values(), strict=True)]
    return {"input_ids": torch.tensor(ids), "segment_ids": torch.tensor(wide)}


@every_cell
def test_gradients_are_those_of_the_loops(stage, ranks):
    found = results(stage, ranks)["gradients"]
    assert found.keys() == (set(KINDS) if stage == 3 else {"dual_encoder"})
    for kind, ours in found.items():
        ours, theirs = torch.tensor(ours), reference(kind)[1]
        assert (ours - theirs).norm() / theirs.norm() <= 1e-5, kind


@every_cell
def test_the_gradient_does_not_depend_on_the_cut(stage, ranks):
    assert results(stage, ranks)["cut"] <= 1e-6


@pytest.mark.parametrize("ranks", [1, 2])
def test_steps_that_were_stopped_go_on_bit_for_bit(ranks):
    assert results(3, ranks)["resumes"]


# Batches


def test_rows_and_negatives_are_a_function_of_seed_epoch_and_row():
    lists = rank_cases.lists()
    one, rows = Batches(lists, seed=1), len(lists)
    whole = one.at(range(2 * rows))
    again = [Batches(lists, seed=1).at([p]) for p in range(2 * rows)]
    assert whole["sample_ids"].tolist() == [int(b["sample_ids"]) for b in again]
    assert torch.equal(whole["keys"], torch.cat([b["keys"] for b in again]))
    assert sorted(whole["sample_ids"][:rows].tolist()) == list(range(rows))
    assert whole["sample_ids"].tolist() == [Order(1, rows).at(p)[1] for p in range(2 * rows)]
    sizes = whole["group"].bincount()
    assert sizes.tolist() == [1 + min(3, int(lists.groups.counts[row])) for row in whole["sample_ids"]]
    other = Batches(lists, seed=2).at(range(2 * rows))
    assert not torch.equal(whole["keys"], other["keys"])
    long = [row for row in range(rows) if lists.groups.counts[row] == 4]
    drawn = {row: [set(map(bytes, whole["keys"][whole["group"] == i].numpy()))
                   for i in (whole["sample_ids"] == row).nonzero()[:, 0].tolist()] for row in long}  # fmt: skip
    assert any(first != second for first, second in drawn.values())


def test_each_text_stands_once_and_pairs_name_their_own():
    lists, tokenizer = rank_cases.lists(), tiny.tokenizer()
    batch = Batches(lists, seed=1).at(range(9))
    rows = zip(*batch["passages"].values(), strict=True)
    said = [tokenizer.decode(row[s > 0], skip_special_tokens=True) for row, s in rows]
    whole = {text[: lists.reader.lengths[1] - 2] for text in lists.collection.documents.values()}
    assert len(set(said)) == len(said) and set(said) <= whole
    assert batch["passages"]["input_ids"].shape[1] <= 26 and batch["own"]["teacher"]["query"]["input_ids"].shape[1] <= 9
    first = torch.searchsorted(batch["group"], torch.arange(9))
    for (q, p), row in zip(batch["pairs"][first].tolist(), batch["sample_ids"].tolist(), strict=True):
        assert said[p] == lists.collection.documents[f"d{row}"][: 26 - 2]
        assert (q, p) in set(map(tuple, batch["answers"].tolist()))


def test_what_meets_in_a_batch_is_each_query_with_each_passage_of_its_group():
    pairs = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 0], [2, 3], [2, 1], [0, 4]])
    crossed = crossing(pairs, torch.tensor([0, 0, 1, 1, 2, 2, 3]), 2)
    assert {tuple(pair) for pair in crossed.pairs.tolist()} == {
        (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 1), (2, 3), (2, 4), (0, 3), (0, 4),
    } and len(crossed.pairs) == 12  # fmt: skip
    assert crossed.passage[crossed.positive].tolist() == [0, 2, 3, 4]
    own = [set(crossed.passage[row].tolist()) for row in crossed.own]
    assert own == [{0, 1}, {2, 0}, {3, 1}, {4}]


# Scales


def test_scale_auto_brings_margins_to_the_teachers_spread_and_is_read_back(tmp_path):
    lesson, targets, data = rank_cases.parts("dual_encoder", 4)
    auto = {"target": "t", "scale": "auto"}
    losses = {"margin_mse": MarginMSE(**auto), "in_batch_margin": InBatchMargin(**auto, group=2)}
    targets = type(targets)(targets.sources, losses)
    found = scales.margins(losses, Reading(lesson.student), targets, data)
    seen = [batch["group"].bincount() - 1 for step in range(8) for batch in data.whole(step)]
    assert len(found["margin_mse"][0]) == sum(map(int, torch.cat(seen)))
    scales.settle(tmp_path, losses, lesson.student, targets, data)
    for name, (own, taught) in found.items():
        assert losses[name].scale == pytest.approx(float(taught.std() / own.std()), rel=1e-6)
    assert scales.settled(tmp_path) == {name: objective.scale for name, objective in losses.items()}
    files.write_json(tmp_path / scales.FILE, {name: {"scale": 7.0, "auto": True} for name in losses})
    again = {"margin_mse": MarginMSE(target="t", scale="auto")}
    scales.settle(tmp_path, again, None, None, None)
    assert again["margin_mse"].scale == 7.0


def test_a_cosine_that_cannot_reach_its_teacher_is_said(tmp_path, capfd):
    lesson, targets, data = rank_cases.parts("dual_encoder", 4)
    kind = KINDS["dual_encoder"].model_copy(update={"similarity": "cosine"})
    cosine = rankers.build(kind, lesson.student.encoder, seed=3)
    losses = {"margin_mse": MarginMSE(target="t")}
    for p in targets.models[0].linear.parameters():
        p.mul_(40)
    scales.settle(tmp_path, losses, cosine, type(targets)(targets.sources, losses), data)
    assert "margin_mse: the student's similarity is a cosine" in capfd.readouterr().err


def test_the_divisor_of_ranknet_knows_no_teacher():
    batch = {"pairs": torch.zeros(5, 2), "group": torch.tensor([0, 0, 0, 1, 1]), "sample_ids": torch.arange(2)}
    tied = SimpleNamespace(scores=Scores(torch.tensor([2.0, 2.0, 1.0, 4.0, 3.0]), {}))
    student = SimpleNamespace(scores=Scores(torch.zeros(5), {}))
    loss = RankNet(target="t")
    assert float(loss.count(batch)["order"]) == 4
    assert float(loss.terms(student, tied, batch)["order"]) == pytest.approx(3 * math.log(2))
