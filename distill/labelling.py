"""What a teacher says of every row of a corpus, written down as its classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from distill import classifiers, models, world
from distill.corpus import store
from distill.refine.gather import Chosen, gather
from distill.sources import weights_sha256
from growth.console import say
from growth.errors import UserError


def write(op, src: Path, out: Path, context) -> dict[str, Any]:
    """A corpus of the rows that the teacher is sure of, with its classes; what stage.json keeps."""
    path = context.model(op.teacher)
    teacher = models.freeze(classifiers.load(path, classifiers.known(path))).to(world.device())
    classes, sides = classifiers.known(path), store.read_manifest(src)["sides"]
    found = {side: _labelled(teacher, store.open(src, side), op.confidence) for side in sides}
    told = {side: one.told(classes) for side, one in found.items()}
    if not len(found[store.TRAIN].kept):
        raise UserError(f"label: {op.teacher} is nowhere sure enough for confidence: {op.confidence:g}")
    request = {
        "from": store.read_manifest(src)["digest"],
        "labelled_by": op.teacher,
        "teacher_digest": weights_sha256(path),
        "confidence": op.confidence,
    }
    names = np.array(classes, dtype=object)
    gather(out, {side: [one.chosen(names)] for side, one in found.items() if len(one.kept)}, request, classes)
    _tell(op.teacher, told)
    return told


class Labelled:
    """What a teacher makes of the rows of one side."""

    def __init__(self, classes: np.ndarray, sure: np.ndarray, corpus: store.Corpus, confidence: float):
        self.classes, self.sure, self.corpus = classes, sure, corpus  # [rows] each
        self.kept = np.flatnonzero(sure >= confidence)

    def chosen(self, names: np.ndarray) -> Chosen:
        return Chosen(self.corpus, self.kept, names[self.classes[self.kept]])

    def told(self, classes: list[str]) -> dict[str, Any]:
        """Counts; and how often the teacher is right, where the corpus knows."""
        counts = Counter(classes[i] for i in self.classes[self.kept].tolist())
        agreement = self._agreement(classes)
        return {
            "rows": len(self.sure),
            "kept": len(self.kept),
            "mean_confidence": float(self.sure.mean()),
            "classes": {name: counts[name] for name in classes},
            **({"agreement": agreement} if agreement is not None else {}),
        }

    def _agreement(self, classes: list[str]) -> float | None:
        """With the true classes of the rows kept; these go no further than this number."""
        if self.corpus.classes is None:
            return None
        truth = np.array([*self.corpus.classes, None], dtype=object)[self.corpus.labels[self.kept]]
        known = truth != None  # noqa: E711 (element by element)
        said = np.array(classes, dtype=object)[self.classes[self.kept]]
        return float((said == truth)[known].mean()) if known.any() else None


def _labelled(teacher, corpus: store.Corpus, confidence: float) -> Labelled:
    probabilities = classifiers.over(teacher, corpus, range(len(corpus))).softmax(1)
    sure, likeliest = (x.numpy() for x in probabilities.max(1))
    return Labelled(likeliest, sure, corpus, confidence)


def _tell(teacher: str, told: dict[str, dict]) -> None:
    for side, about in told.items():
        right = f"; {about['agreement']:.1%} of them are of the class that is known" if "agreement" in about else ""
        say(f"label ({side}): {teacher} is sure enough of {about['kept']} of {about['rows']} rows{right}")
