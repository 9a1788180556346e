"""A ranker as the student of a training stage: it reads queries, and passages that answer them or do not."""

from __future__ import annotations

from pathlib import Path

from distill import models, world
from distill.corpus import tokens
from distill.lesson import Data
from distill.ranking import kinds, rankers, scales, students, teaching
from distill.ranking.batches import Batches, Lists, Reader
from distill.ranking.costs import cost_of
from distill.ranking.kinds import ABOUT, ENCODER
from distill.ranking.opening import form_of
from distill.ranking.ranker import Ranker
from distill.teachers.targets import Source, Targets
from growth.errors import UserError
from growth.files import read_json


class Relevance:
    """What a stage must know of a student that scores pairs."""

    mask = None  # nothing is hidden from it

    def __init__(self, spec, context, directory: Path, objectives: dict, seed: int):
        self.spec, self.context, self.directory, self.seed = spec, context, directory, seed
        self.objectives = objectives
        self.start = world.first(self._make_start) or directory / "start"
        self.kind = kinds.read(read_json(self.start / ABOUT), self.start / ABOUT)
        self.forms = {reference: form_of(context, reference) for t in spec.targets.values() for reference in t.models}
        self.corpus = self._lists()
        self.cost = self._cost()

    def _make_start(self) -> Path:
        start = self.directory / "start"
        return start if start.exists() else students.begin(self.spec.student, self.context, start, self.seed)

    def _lists(self) -> Lists:
        collection, groups = self.context.ranking(self.spec.corpus).insist(f"stage {self.directory.name}")
        if not len(groups):
            raise UserError(f"{self.spec.corpus} has no query with a negative; there is nothing to train on")
        own = _reader(self.start / ENCODER, self.kind)
        others = {name: _reader(form.encoder, form.kind) for name, form in self.forms.items()}
        others = {name: other for name, other in others.items() if not _alike(own, other)}
        return Lists(collection, groups, own, self.spec.negatives, others)

    def _cost(self):
        student = models.facts(self.start / ENCODER), self.kind
        teachers = {
            name: (student,) if t.ema else tuple(map(self._facts, t.models)) for name, t in self.spec.targets.items()
        }
        return cost_of(self.spec, student, teachers)

    def _facts(self, reference: str) -> tuple[models.Facts, kinds.RankerKind]:
        form = self.forms[reference]
        return models.facts(form.encoder), form.kind

    def load(self) -> Ranker:
        self.student = rankers.load(self.start)
        # ZeRO 3 gathers weights for every pass through the encoder, on all ranks together
        self.student.at_once = self.context.recipe.engine.zero == 3 and world.size() > 1
        return self.student

    def source(self, name: str) -> Source:
        """Of one of the targets."""
        return teaching.source(name, self)

    def data(self, targets: Targets, micro_batch: int, offset: int) -> Data:
        least = max(objective.needs().group or 1 for objective in self.objectives.values())
        batches, rows = Batches(self.corpus, self.seed), self.spec.optim.batch
        return Data(batches, rows, micro_batch, True, world.device(), offset, least=least)

    def belongs(self) -> dict:
        """What else the training state is of."""
        return {}

    def summary(self, entries: list[dict]) -> dict:
        """What else the metrics of the stage are."""
        seconds = sum(entry["seconds"] for entry in entries)
        pairs = sum(entry["pairs_per_second"] * entry["seconds"] for entry in entries)
        return {"pairs_per_second": pairs / seconds, "scales": scales.settled(self.directory)}

    def export(self, trained: dict, dst: Path) -> None:
        """The directory of a ranker: trained masters, everything else as it was at the start."""
        students.export(self.start, trained, dst)


def _reader(encoder: Path, kind: kinds.RankerKind) -> Reader:
    return Reader(tokens.load(encoder), kind.lengths)


def _alike(one: Reader, other: Reader) -> bool:
    return one.lengths == other.lengths and tokens.digest(one.tokenizer) == tokens.digest(other.tokenizer)
