"""A language model as the student of a training stage: it reads rows of a corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from distill import classifiers, corpus, layout, models, sources, world
from distill.cost import cost_of
from distill.lesson import HELDOUT_SEED, Data, Heldout, Lesson
from distill.lowrank import counting, students
from distill.preflight import micro_batch
from distill.schedules import Progress
from distill.sparsity import stored
from distill.sparsity.values import Mask
from distill.taps import DEVIATIONS
from distill.teachers import depth
from distill.teachers.targets import Source, Targets, opened
from growth import files


class Language:
    """What a stage must know of a student that predicts tokens, next or hidden, or the classes of rows."""

    def __init__(self, spec, context, directory: Path, objectives: dict, seed: int):
        self.spec, self.context, self.directory, self.seed = spec, context, directory, seed
        self.objectives = objectives
        headed = next((o for o in objectives.values() if o.needs().head), None)
        self.head = headed and headed.needs().head
        self.mask = headed.mask if self.head == "mlm" else None
        self.corpus = corpus.open(context.corpus(spec.corpus), "train")
        self.classes = self._classes() if self.head == "classify" else None
        self.start = world.first(self._make_start) or directory / "start"
        self.cost = self._cost()

    def _classes(self) -> list[str]:
        """Those of the corpus, or else of the first teacher; all others must have the same ones."""
        teachers = [reference for target in self.spec.targets.values() for reference in target.models]
        return self.corpus.classes or classifiers.known(self.context.model(teachers[0]))

    def _make_start(self) -> Path:
        start = self.directory / "start"
        if not start.exists():
            student, seed = self.spec.student, self.seed

            masked = next((hook.from_ for hook in self.spec.hook_values() if isinstance(hook, Mask)), None)
            masks = masked and self.context.model(masked)

            def make(dst: Path) -> Path:
                return models.seed_checkpoint(
                    student, self.context.model, dst, self.head, seed, self.corpus.path, self.classes, masks
                )

            factors = student.lowrank
            if not factors:
                make(start)
            else:
                deviates = any(DEVIATIONS in objective.needs().student for objective in self.objectives.values())
                students.begin(make, start, factors, seed, random=student.new is not None, origin=deviates)
        return start

    def _cost(self):
        student = counting.facts(self.start, self.spec.student.lowrank)
        teachers = {
            name: (student,) if t.ema else tuple(self._facts(reference, name) for reference in t.models)
            for name, t in self.spec.targets.items()
        }
        optim, rows = self.spec.optim, micro_batch(self.context.recipe.engine, self.spec.optim, world.size())
        return cost_of(self.spec, student, teachers, self.corpus.length, optim.batch // rows, self._halved())

    def _halved(self) -> int:
        skips = any(isinstance(hook, Mask) and hook.skips for hook in self.spec.hook_values())
        return stored.masked(self.start) if skips else 0

    def _facts(self, teacher: str, target: str) -> models.Facts:
        """Of a teacher, as deep as it is read."""
        config = files.read_json(self.context.model(teacher) / "config.json")
        return models.facts(depth.loaded(config, target, self.objectives.values()))

    @property
    def _kept(self):
        """What loads and writes a student: whole matrices, or their factors."""
        return students if self.spec.student.lowrank else models

    def load(self) -> torch.nn.Module:
        self.student = self._kept.load(self.start, self.head)
        return self.student

    def source(self, name: str) -> Source:
        """Of one of the targets."""
        return opened(name, self)

    def data(self, targets: Targets, micro_batch: int, offset: int) -> Data:
        several = all(layout.packable(model.config) for model in (self.student, *targets.models))
        self.packed = several and self.head != "classify"  # unpacked rows are as long as the longest of them
        batches, rows = corpus.Batches(self.corpus, self.seed, self.head), self.spec.optim.batch
        return Data(batches, rows, micro_batch, self.packed, world.device(), offset, targets.alignments)

    def heldout(self, lesson: Lesson, micro_batch: int, steps: int) -> Heldout:
        """Of the loss `ce`; the rate of masking is the one that training begins with."""
        text = corpus.open(self.context.corpus(self.spec.corpus), "heldout")
        rate = self.objectives["ce"].mask.at(Progress(0, steps))
        batches = corpus.Batches(text, HELDOUT_SEED, self.objectives["ce"].objective, rate)
        return Heldout(lesson, "ce", batches, micro_batch, self.packed)

    def belongs(self) -> dict:
        """What else the training state is of."""
        tokenizer = {"tokenizer": self.corpus.manifest["tokenizer_digest"]}
        factors = {"factors": students.digest(self.start)} if self.spec.student.lowrank else {}
        return tokenizer | factors | sources.masks(self.start)

    def summary(self, entries: list[dict]) -> dict:
        """What else the metrics of the stage are."""
        return {"lowrank": students.told(self.start)} if self.spec.student.lowrank else {}

    def export(self, trained: dict[str, models.Make], dst: Path, beside: Callable[[Path], None] | None = None) -> None:
        """An ordinary directory: trained masters, everything else as it was at the start; `beside` writes masks."""
        if beside:
            models.export(self.start, trained, dst, beside)
        else:
            self._kept.export(self.start, trained, dst)
