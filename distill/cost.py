"""What training costs, in FLOPs: one formula for forecasts, logs, reports and the stop of a twin. No torch.

That of `growth.accounting`, of whatever model: a forward pass multiplies every token of a row with every matrix that
takes part (2 FLOPs a weight), and attention compares it with every other one; the backward pass costs twice that.
Tables that are only looked up and a head that no objective runs are left out; padding counts. What is frozen is counted
as if it were not, since gradients pass through most of it. What checkpointing computes again is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from distill import hooks, projections, views
from distill.hooks import Part
from growth.accounting import Work

if TYPE_CHECKING:
    from distill.kinds import Stage, TrainSpec
    from distill.models import Facts
    from distill.recipe import Recipe


LANGUAGE = ("mlm", "causal")  # heads that multiply every token; one that classifies runs once a row

Texts = tuple[tuple[int, int], ...]  # (how many, of so many tokens each)


def work(facts: Facts, head: bool) -> Work:
    """What a token meets in a model."""
    return Work(facts.body, facts.attention * len(facts.blocks), facts.head if head else 0)


def forward(work: Work, texts: Texts) -> int:
    """FLOPs of a forward pass over these."""
    return sum(number * work.forward(length).total for number, length in texts)


@dataclass(frozen=True)
class Cost:
    """Of the steps of one training stage."""

    student: Facts
    head: bool  # whether an objective runs the student's head
    teachers: Mapping[str, tuple[Facts, ...]]  # the models that run for each target
    headed: frozenset[str]  # the targets whose heads run as well
    texts: Texts  # that the student reads in a step, as long as they may be
    parts: tuple[Part, ...] = ()  # what of the student may take part, each as often; (): all of it
    passes: Mapping[str | None, int] = field(default_factory=lambda: {None: 1})  # of the student (None) and each target
    taught: Mapping[str, tuple[Texts, ...]] = field(default_factory=dict)  # what teachers read, where it is different
    runs: int = 1  # micro-batches of a step, on all ranks
    projected: int = 0  # weights that a token meets on the way to losses
    halved: int = 0  # weights of which a forward product skips every second one; in forecasts none

    @property
    def tokens(self) -> int:
        """Places of one step that the student reads."""
        return sum(number * length for number, length in self.texts)

    def step(self, part: Part | None = None) -> int:
        """FLOPs of the student: forward through what runs, and twice that back through what learns."""
        part = part or Part(len(self.student.blocks))
        ran, learned = (forward(self._through(first, part.depth), self.texts) for first in (0, part.first))
        again = 3 * (self.passes[None] - 1) * forward(work(self.student, head=False), self.texts)
        beside = 6 * self.projected * self.tokens + self.student.rebuilt * self.runs * self.passes[None]
        return ran + 2 * learned + again + beside - self.skipped

    @property
    def skipped(self) -> int:
        """FLOPs of a step that sparse products leave out."""
        return self.halved * self.tokens * self.passes[None]

    def _through(self, first: int, depth: int) -> Work:
        """Work of the student without the blocks below `first` and from `depth` on."""
        whole, blocks = work(self.student, self.head), self.student.blocks
        weights = whole.weights - sum(blocks[:first] + blocks[depth:])
        return replace(whole, weights=weights, width=self.student.attention * (depth - first))

    @property
    def mean(self) -> float:
        """FLOPs of a step of the student, where parts are drawn: on average."""
        parts = self.parts or (None,)
        return sum(self.step(part) for part in parts) / len(parts)

    def teaching(self, targets: Iterable[str]) -> int:
        """FLOPs of the forward passes of these."""
        return sum(self._teaching(name, *each) for name in targets for each in self._readers(name))

    def _readers(self, name: str) -> Iterator[tuple[Facts, Texts]]:
        """The models of a target, and what each reads in a step."""
        several = self.teachers[name]
        return zip(several, self.taught.get(name, (self.texts,) * len(several)), strict=True)

    def _teaching(self, name: str, facts: Facts, texts: Texts) -> int:
        again = (self.passes[name] - 1) * forward(work(facts, head=False), texts)
        return forward(work(facts, name in self.headed), texts) + again


def cost_of(
    spec: TrainSpec,
    student: Facts,
    teachers: Mapping[str, tuple[Facts, ...]],
    length: int,
    runs: int = 1,
    halved: int = 0,
) -> Cost:
    """Of a train stage on rows of this length, so many micro-batches a step."""
    objectives = [objective for _, objective in spec.objectives()]
    maps = projections.shapes(dict(enumerate(objectives)), student, teachers)
    return Cost(
        student=student,
        head=any(objective.needs().head in LANGUAGE for objective in objectives),
        teachers=teachers,
        headed=frozenset(o.target for o in objectives if o.needs().target_head and o.needs().head in LANGUAGE),
        texts=((spec.optim.batch, length),),
        passes=views.passes(dict(enumerate(objectives))),
        parts=hooks.parts(spec.hook_values()),
        runs=runs,
        projected=sum(len(objectives[n].pairs) * math.prod(shape) for n, shape in maps.items()),
        halved=halved,
    )


def as_much_as(recipe: Recipe, reference: str, spent: Callable[[Stage], float | None]) -> float | None:
    """What a stage and the train stages it was made from took; None where one of them is not known."""
    amounts = [spent(stage) for stage in recipe.made_from(reference)]
    return None if None in amounts else sum(amounts)


def steps_for(amount: float, measure: str, tokens: float, flops: float) -> int:
    """How many steps of so many tokens and FLOPs each come to an amount."""
    return max(math.ceil(amount / {"steps": 1, "tokens": tokens, "flops": flops}[measure]), 1)
