"""`distill check`: every training stage that can begin, tried on one real batch before hours are spent on it.

What a run promises is measured here on the user's own models and text: one loss however the rows are packed and cut,
teachers that stay as they are, what no loss reaches, and the seconds and bytes of a step on this machine.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from distill import preflight, stages
from distill.context import Context, Task
from distill.inputs import names_of
from distill.lesson import Data, tokens
from distill.recipe import Recipe
from distill.schedules import Progress
from distill.train import Spent, Stage
from growth.console import count, say, seconds, size, table
from growth.errors import UserError

STEPS = 4  # the first one makes buffers and is not counted
ROUNDING = {"fp32": 1e-4, "bf16": 0.05}  # of a term between two ways to compute it, relative


class Finding(NamedTuple):
    what: str
    found: str
    good: bool = True


class Trial(Stage):
    """A training stage that takes a few steps and leaves nothing."""

    def _loop(self, engine, spent: Spent) -> None:
        self.engine, self.entries = engine, []
        batches = self.data(0, self._rate())
        self.findings = [*self._text(batches), *self._teachers(), *self._equal()]
        for _ in range(STEPS):
            entry, _ = self._step(engine, spent, lambda: False)
            self.entries.append(entry)
            spent = Spent.of(entry)

    def _export(self, engine) -> None:
        pass

    def _summary(self) -> dict:
        return {}

    def told(self) -> list[Finding]:
        """What was found, in the order in which a reader wants it."""
        frozen = self.run()["frozen"]
        return [*self.findings, self._reached(frozen), *self._cost()]

    def _rate(self) -> float | None:
        return mask.at(self._start) if (mask := self.subject.mask) else None

    @property
    def _start(self) -> Progress:
        return Progress(step=0, steps=self.steps)

    def _text(self, batches: list[dict]) -> Iterator[Finding]:
        if self.spec.ranks:
            texts = sum(len(batch[side]["input_ids"]) for batch in batches for side in ("query", "passages"))
            yield Finding("batch", f"{self.spec.optim.batch} queries, {texts} different texts on this rank")
            return
        read, largest = sum(map(tokens, batches)), max(int(batch["input_ids"].max()) for batch in batches)
        known = [model.config.vocab_size for model in (self.student, *self.targets.models)]
        yield Finding("batch", f"{sum(len(b['input_ids']) for b in batches)} rows, {count(read)} tokens on this rank")
        yield Finding("ids", f"up to {largest}; models know {', '.join(map(str, known))}", largest < min(known))
        if self._rate():
            asked = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
            yield Finding("masks", f"{asked / read:.1%} of the tokens are asked for; the rate is {self._rate():.1%}")

    def _teachers(self) -> Iterator[Finding]:
        for name, source in self.targets.sources.items():
            training = any(module.training for model in source.models for module in model.modules())
            learns = any(p.requires_grad for model in source.models for p in model.parameters())
            said = "in eval mode, frozen" if not (training or learns) else "in train mode" if training else "not frozen"
            yield Finding(f"target {name}", said, not (training or learns))

    def _equal(self) -> Iterator[Finding]:
        """One loss, however the rows are cut and packed."""
        whole, half = self._terms(self.data), self.micro_batch // 2
        if half and not half % self.data.least and not self.micro_batch % 2:
            yield self._compared("cut in halves", whole, self._terms(_other(self.data, micro_batch=half)))
        if self.data.packed and not self.spec.ranks:
            yield self._compared("documents apart", whole, self._terms(_other(self.data, packed=False)))

    @torch.no_grad()
    def _terms(self, data: Data) -> dict[str, float]:
        """The sums of the first step on this rank, without dropout."""
        active, sums = self._active(self._start), Counter()
        self.student.eval()
        for batch in data(0, self._rate()):
            terms = self.engine(batch, self.targets(batch, active), active, None)
            sums.update({name: float(value) for name, value in terms.items()})
        self.student.train(self.spec.dropout)
        return sums

    def _compared(self, what: str, one: dict[str, float], other: dict[str, float]) -> Finding:
        apart = max(abs(one[name] - other[name]) / max(abs(one[name]), 1e-9) for name in one)
        good = apart <= ROUNDING[self.context.recipe.engine.precision]
        return Finding(what, f"the same terms to {apart:.0e}" if good else f"terms differ by {apart:.1%}", good)

    def _reached(self, frozen: list[str]) -> Finding:
        learns = sum(map(prod, self.engine.shapes().values()))
        left = f"; no loss reaches {frozen[0]} and {len(frozen) - 1} more" if frozen else "; all of it"
        return Finding("learns", f"{count(learns)} of {count(self.cost.student.parameters)} parameters{left}")

    def _cost(self) -> Iterator[Finding]:
        spent = [entry["seconds"] for entry in self.entries[1:]]
        share = statistics.median(entry["teacher_share"] for entry in self.entries[1:])
        each = statistics.median(spent)
        yield Finding("a step", f"{seconds(each)}, {share:.0%} of it in teachers")
        yield Finding("to expect", f"{seconds(each * self.steps)} for {self.steps} steps")
        yield Finding("memory", f"{size(max(entry['memory'] for entry in self.entries))} at most, of one rank")


def _other(data: Data, **changed) -> Data:
    other = copy.copy(data)
    vars(other).update(changed)
    return other


def show(recipe: Recipe, out: Path) -> None:
    """Try every training stage that can begin and print what was found; UserError if something is not as it must be."""
    stages.refuse_out(recipe, out)
    with tempfile.TemporaryDirectory() as scratch:
        run = out if (out / stages.RECIPE).exists() else Path(scratch)  # where earlier stages and texts lie
        context = Context(recipe, run, recipe.seed)
        preflight.check(recipe, context)
        wrong = [stage.id for stage in recipe.stages if stage.train and not _tried(stage, context, Path(scratch))]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: not as it must be, see above")


def _tried(stage, context: Context, scratch: Path) -> bool:
    task = Task(stage, (context,))
    named = {name.partition(".")[0] for _, name in names_of(task)}
    if waits := [s.id for s in context.recipe.stages if s.id in named and not stages.is_done(Task(s, (context,)))]:
        say(f"{stage.id}: needs {', '.join(waits)}; run that, then check again")
        return True
    directory = scratch / "trial" / stage.id
    directory.mkdir(parents=True)
    found = Trial(stage.train, context, directory).told()
    table([stage.id, ""], [[f"{'' if one.good else 'WRONG: '}{one.what}", one.found] for one in found])
    return all(one.good for one in found)
