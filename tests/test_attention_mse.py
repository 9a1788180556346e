"""TinyBERT's attention term against brute force in float64: one sequence, one head, one pair of tokens at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from distill import corpus, models, taps
from distill.objectives import AttentionMSE, attention_mse
from distill.objectives import relation_blocks as blocks

HEADS, TEACHER, STUDENT = 3, 4, 2
PACKED = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 0], [1] * 11, [2, 2, 1, 1, 2, 2, 0, 0, 1, 1, 3]])
FORMS = [{"causal": causal, "window": window} for causal in (False, True) for window in (None, 3)]
SCALES = (0.7, 0.3)


def sides(shape=PACKED.shape):
    """Queries and keys [B, H, T, d] of a teacher and of a student that learns."""
    generator = torch.Generator().manual_seed(1)
    drawn = [[torch.randn(shape[0], HEADS, shape[1], width, generator=generator, dtype=torch.float64) for _ in "qk"]
             for width in (TEACHER, STUDENT)]  # fmt: skip
    return tuple(drawn[0]), tuple(x.requires_grad_() for x in drawn[1])


def brute(teacher, student, segments, causal=False, window=None):
    means = []
    for b, numbers in enumerate(segments.tolist()):
        for number in {n for n in numbers if n}:
            places = [t for t, n in enumerate(numbers) if n == number]
            rows = []
            for n, i in enumerate(places):
                keys = [j for m, j in enumerate(places) if abs(m - n) < (window or 99) and (m <= n or not causal)]
                for h in range(HEADS):
                    a, s = (
                        x[0][b, h, i] @ x[1][b, h, keys].T * c for x, c in zip((teacher, student), SCALES, strict=True)
                    )
                    rows.append(((a - s) ** 2).mean())
            means.append(sum(rows) / len(rows))
    return sum(means) / len(means)


def ours(teacher, student, segments=PACKED, **form):
    return attention_mse(teacher, student, segments, scaling=SCALES, **form)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_loss_and_gradient_are_those_of_brute_force_however_scores_are_cut_into_blocks(form, monkeypatch):
    teacher, student = sides()
    wanted = brute(teacher, student, PACKED, **form)
    gradients = torch.autograd.grad(wanted, student)
    for scores, heads in ((2**19, 8), (20, 1), (1, 1)):
        monkeypatch.setattr(blocks, "SCORES", scores)
        monkeypatch.setattr(blocks, "HEADS", heads)
        found = ours(teacher, student, **form)
        assert_close(found, wanted, rtol=0, atol=1e-12)
        assert_close(torch.autograd.grad(found, student), gradients, rtol=0, atol=1e-12)


def test_against_itself_and_where_nothing_is_real_it_is_zero():
    teacher, _ = sides()
    assert ours(teacher, tuple(x * (7 / 3) ** 0.5 for x in teacher)) < 1e-24
    assert ours(*sides(), torch.zeros_like(PACKED)) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_neither_padding_nor_packing_matters(side):
    """On models: a packed row against its documents alone, padded on either side."""
    objective = AttentionMSE(target="t", student_layer=[0, "last"], teacher_layer=[1, -1])
    pair = [tiny.model("bert", seed=seed, hidden_size=width).double() for seed, width in ((1, 24), (2, 48))]

    def loss(batch) -> list:
        traces = [taps.trace(model, batch, need) for model, need in zip(pair, objective.needs()[:2], strict=True)]
        terms, counts = objective.terms(*traces, batch), objective.count(batch)
        assert set(terms) == {"layer_0", "last"}
        return [terms[key] / counts[key] for key in terms]

    packed = tiny.batch([[5, 4], [8]], 11)
    apart = corpus.unpack(packed)
    if side == "left":
        apart = {key: x.flip(1) if x.dim() == 2 else x for key, x in apart.items()}
        packed = {key: x.flip(1) if x.dim() == 2 else x for key, x in packed.items()}
    assert_close(loss(packed), loss(apart), rtol=1e-10, atol=0)


def test_scores_are_those_of_the_model():
    """Of one sequence without padding: what BERT itself multiplies."""
    batch, layer = tiny.batch([[9]], 9), 2
    pair = [tiny.model("bert", seed=seed).double() for seed in (1, 2)]
    scores = []
    for model in pair:
        x = model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[layer]
        own = model.encoder.layer[layer].attention.self
        q, k = (f(x).view(9, tiny.HEADS, -1).transpose(0, 1) for f in (own.query, own.key))
        scores.append(q @ k.mT / q.shape[-1] ** 0.5)
    objective = AttentionMSE(target="t", student_layer=layer, teacher_layer=layer)
    traces = [taps.trace(model, batch, objective.needs().student) for model in pair]
    (term,) = objective.terms(*traces, batch).values()
    assert_close(term, (scores[0] - scores[1]).square().mean(), rtol=1e-10, atol=0)


def wrong(student=None, teacher=None, **keys) -> list[str]:
    sides = [models.facts(tiny.config("bert", **(changes or {}))) for changes in (student, teacher)]
    return AttentionMSE(target="t", **keys).check(*sides)


def test_what_cannot_work_is_said():
    assert wrong({"hidden_size": 36}, student_layer=[0, 1], teacher_layer=[1, 3]) == []
    assert wrong({"num_attention_heads": 4}) == [
        "attention: the student has 4 heads, the teacher 6; it needs equal numbers, the relations qq, kk and vv do not"
    ]
    assert wrong(student_layer=[0, 4], teacher_layer=[1, 3]) == ["student_layer=4: the bert has 4 layers, 0 to 3"]
    t5 = SimpleNamespace(family="t5", layers=4, heads=6, causal=False)
    assert "adds a learned relative position bias" in AttentionMSE(target="t").check(t5, t5)[0]
    with pytest.raises(ValidationError, match="each layer of one has one of the other"):
        AttentionMSE(target="t", student_layer=[0, 1], teacher_layer=3)
