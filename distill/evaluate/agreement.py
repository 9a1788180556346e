"""Does the student see the world as the teacher does?

Rank correlation of similarities compares spaces of any two widths (representational similarity analysis, Kriegeskorte
et al. 2008); the divergence of predictions is for two heads over one vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distill.evaluate.score import Score
from growth.errors import UserError

BLOCKS = 16  # of documents, left out in turn for the standard error


@dataclass(frozen=True)
class Agreement:
    """Spearman correlation between the cosine similarities of student and teacher, over all pairs of held-out texts."""

    documents: int = 256

    title = "agreement"
    better = "high"
    digits = 3
    quality = True

    def note(self, bench) -> str:
        n = len(self._texts(bench))
        return (
            f"rank correlation (Spearman) with the teacher's cosine similarities over all {n * (n - 1) // 2:,} pairs "
            f"of {n} held-out texts"
        )

    def check(self, bench) -> None:
        _need_teacher(self.title, bench)
        if (n := len(self._texts(bench))) < BLOCKS:
            raise UserError(f"agreement needs {BLOCKS} held-out texts, {bench.path.name} has {n}; raise `heldout`")

    def measure(self, subjects: Sequence, bench) -> Iterator[Score]:
        texts = self._texts(bench)
        teacher = cosines(bench.teacher.embed(texts))
        for subject in subjects:
            yield agreement(cosines(subject.embed(texts)), teacher)

    def _texts(self, bench) -> list[str]:
        return bench.heldout_texts[: self.documents]


@dataclass(frozen=True)
class Divergence:
    """KL from the teacher's predictions to the student's on held-out text, where both have a head of the same kind."""

    title = "KL"
    better = "low"
    digits = 3
    quality = True

    def note(self, bench) -> str:
        return "KL(teacher || student) of the predicted tokens on held-out text, nats a token; fixed masks"

    def check(self, bench) -> None:
        _need_teacher("kl", bench)
        if bench.teacher.head is None:
            raise UserError("kl compares predictions, and the teacher has no language-model head; agreement needs none")
        _ = bench.heldout  # refuses a corpus of which nothing is held out

    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]:
        for subject in subjects:
            yield self._score(subject, bench) if comparable(subject, bench.teacher) else None

    def _score(self, subject, bench) -> Score:
        import torch
        from torch.nn.functional import kl_div

        from distill.evaluate.heldout import mean, predictions

        pairs = zip(predictions(subject, bench), predictions(bench.teacher, bench), strict=True)
        divergences = [
            kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="none").sum(1)
            for (s, _), (t, _) in pairs
        ]
        return mean(torch.cat(divergences))


def comparable(one, other) -> bool:
    """Two heads that predict the same thing: the same kind over the same tokens."""
    return one.head == other.head and one.vocabulary == other.vocabulary


def _need_teacher(metric: str, bench) -> None:
    if bench.teacher is None:
        raise UserError(f"{metric} compares with a teacher: call a row `teacher`, or name one with `teacher:`")


def cosines(x):
    """The similarity of every text with every other, [N, N] float64."""
    x = x.double()
    x = x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return (x @ x.T).numpy()


def agreement(one, other) -> Score:
    """Over pairs of different texts; the standard error by a jackknife over blocks of texts, for pairs share texts."""
    import numpy

    block = numpy.arange(len(one)) % BLOCKS
    without = [_spearman(one[keep][:, keep], other[keep][:, keep]) for keep in (block != b for b in range(BLOCKS))]
    return Score(_spearman(one, other), math.sqrt((BLOCKS - 1) * float(numpy.var(without))))


def _spearman(one, other) -> float:
    import numpy

    above = numpy.triu_indices(len(one), k=1)
    return spearman(one[above], other[above])


def spearman(a, b) -> float:
    """0 where one side does not vary: it ranks nothing."""
    from scipy.stats import rankdata

    a, b = (ranks - ranks.mean() for ranks in (rankdata(a), rankdata(b)))
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else 0.0
