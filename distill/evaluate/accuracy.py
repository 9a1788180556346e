"""How many held-out rows a checkpoint's own classification head gets right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distill.evaluate.score import Score
from growth.errors import UserError

BLOCKS = 16  # of rows, left out in turn for the standard error


class _OfClasses:
    """What is measured of a checkpoint's own classes for held-out rows; `score` compares them with the right ones."""

    better = "high"
    digits = 3
    quality = True

    def check(self, bench) -> None:
        if bench.heldout.classes is None:
            raise UserError(f"{self.title} needs held-out rows with classes; set `label` of corpora.{bench.path.name}")
        if not len(_rows(bench.heldout)):
            raise UserError(f"{self.title}: no held-out row of {bench.path.name} is of a known class")

    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]:
        for subject in subjects:
            yield self.score(predicted(subject, bench), _truth(bench)) if _fits(subject, bench) else None


@dataclass(frozen=True)
class Accuracy(_OfClasses):
    """Share of held-out rows that a checkpoint's classification head puts into their class."""

    title = "accuracy"

    def note(self, bench) -> str:
        truth = _truth(bench)
        classes, n = bench.heldout.classes, len(truth)
        return (
            f"share of {n} held-out rows put into the right one of {len(classes)} classes by the checkpoint's own head "
            f"(the largest class alone: {float(truth.bincount().max()) / n:.3f}){_whose(bench)}; - where there is no "
            "classification head, or one for other classes"
        )

    @staticmethod
    def score(found, truth) -> Score:
        share = (found == truth).double().mean().item()
        return Score(share, math.sqrt(share * (1 - share) / len(truth)))


@dataclass(frozen=True)
class MacroF1(_OfClasses):
    """Mean over the classes of F1, the harmonic mean of precision and recall: rare classes count as much as others."""

    title = "macro F1"

    def note(self, bench) -> str:
        return "mean over classes of the harmonic mean of precision and recall, on the same rows as accuracy"

    def check(self, bench) -> None:
        super().check(bench)
        if (n := len(_truth(bench))) < BLOCKS:
            raise UserError(f"macro_f1 needs {BLOCKS} held-out rows of a known class, {bench.path.name} has {n}")

    @staticmethod
    def score(found, truth) -> Score:
        """The standard error by a jackknife over blocks of rows."""
        import torch

        block = torch.arange(len(truth)) % BLOCKS
        without = torch.tensor([macro_f1(found[block != b], truth[block != b]) for b in range(BLOCKS)])
        return Score(macro_f1(found, truth), math.sqrt((BLOCKS - 1) * without.var(correction=0).item()))


def macro_f1(found, truth) -> float:
    """Over the classes that occur on either side."""
    import torch

    classes = torch.cat([found, truth]).unique()
    right = ((found == truth)[None] & (truth == classes[:, None])).sum(1)
    both = (found == classes[:, None]).sum(1) + (truth == classes[:, None]).sum(1)
    return (2 * right / both).double().mean().item()


def predicted(subject, bench):
    """The likeliest class of every held-out row of a known one, [N]."""
    from distill import classifiers, models, world

    known = bench.predictions
    if subject.key not in known:
        model = models.freeze(classifiers.load(subject.path, bench.heldout.classes)).to(world.device())
        known[subject.key] = classifiers.over(model, bench.heldout, _rows(bench.heldout)).argmax(1)
    return known[subject.key]


def _rows(heldout) -> list[int]:
    """Those of a known class."""
    return (heldout.labels >= 0).nonzero()[0].tolist()


def _truth(bench):
    import torch

    labels = bench.heldout.labels
    return torch.from_numpy(labels[labels >= 0]).long()


def _fits(subject, bench) -> bool:
    return subject.classes is not None and sorted(subject.classes) == sorted(bench.heldout.classes)


def _whose(bench) -> str:
    teacher = bench.heldout.manifest["request"].get("labelled_by")
    return f"; the right ones are what {teacher} answered, not known ones" if teacher else ""
