"""What training costs, in FLOPs: one formula for forecasts, logs and the stop of a twin. No torch.

6 N D (Kaplan et al. 2020, arXiv 2001.08361): a forward pass multiplies a token with every parameter that takes part
(2 FLOPs each), the backward pass costs twice that. N leaves out tables that are only looked up, and a head that no
objective runs; D is every place of every row, padding too. The square of the length is left out. What is frozen is
counted as if it were not, since gradients pass through most of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distill import hooks, views
from distill.hooks import Part

if TYPE_CHECKING:
    from distill.kinds import Stage, TrainSpec
    from distill.models import Facts
    from distill.recipe import Recipe


LANGUAGE = ("mlm", "causal")  # heads that multiply every token; one that classifies runs once a row


def working(facts: Facts, head: bool) -> int:
    """N: parameters that a token is multiplied with."""
    return facts.body + (facts.head if head else 0)


@dataclass(frozen=True)
class Cost:
    """Of the steps of one training stage."""

    student: Facts
    head: bool  # whether an objective runs the student's head
    teachers: Mapping[str, tuple[Facts, ...]]  # the models that run for each target
    headed: frozenset[str]  # the targets whose heads run as well
    tokens: int  # places of one step that the student reads: rows x length
    parts: tuple[Part, ...] = ()  # what of the student may take part, each as often; (): all of it
    passes: Mapping[str | None, int] = field(default_factory=lambda: {None: 1})  # of the student (None) and each target
    taught: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # places that teachers read, where others
    runs: int = 1  # micro-batches of a step, on all ranks

    def step(self, part: Part | None = None) -> int:
        """FLOPs of the student: 2 N forward and 4 N backward, each for what ran."""
        n = working(self.student, self.head)
        run = n - sum(self.student.blocks[part.depth :]) if part else n
        learning = run - sum(self.student.blocks[: part.first]) if part else run
        again = 6 * (self.passes[None] - 1) * self.student.body
        return (2 * run + 4 * learning + again) * self.tokens + self.student.rebuilt * self.runs * self.passes[None]

    @property
    def mean(self) -> float:
        """FLOPs of a step of the student, where parts are drawn: on average."""
        parts = self.parts or (None,)
        return sum(self.step(part) for part in parts) / len(parts)

    def teaching(self, targets: Iterable[str]) -> int:
        """FLOPs of the forward passes of these."""
        return sum(self._teaching(name, *each) for name in targets for each in self._readers(name))

    def _readers(self, name: str) -> Iterable[tuple[Facts, int]]:
        """(facts, places of a step) of the models of a target."""
        several = self.teachers[name]
        return zip(several, self.taught.get(name, (self.tokens,) * len(several)), strict=True)

    def _teaching(self, name: str, facts: Facts, places: int) -> int:
        return 2 * (working(facts, name in self.headed) + (self.passes[name] - 1) * facts.body) * places


def cost_of(
    spec: TrainSpec, student: Facts, teachers: Mapping[str, tuple[Facts, ...]], length: int, runs: int = 1
) -> Cost:
    """Of a train stage on rows of this length, so many micro-batches a step."""
    objectives = [objective for _, objective in spec.objectives()]
    return Cost(
        student=student,
        head=any(objective.needs().head in LANGUAGE for objective in objectives),
        teachers=teachers,
        headed=frozenset(o.target for o in objectives if o.needs().target_head and o.needs().head in LANGUAGE),
        tokens=spec.optim.batch * length,
        passes=views.passes(dict(enumerate(objectives))),
        parts=hooks.parts(spec.hook_values()),
        runs=runs,
    )


def as_much_as(recipe: Recipe, reference: str, spent: Callable[[Stage], float | None]) -> float | None:
    """What a stage and the train stages it was made from took; None where one of them is not known."""
    amounts = [spent(stage) for stage in recipe.made_from(reference)]
    return None if None in amounts else sum(amounts)


def steps_for(amount: float, measure: str, tokens: float, flops: float) -> int:
    """How many steps of so many tokens and FLOPs each come to an amount."""
    return max(math.ceil(amount / {"steps": 1, "tokens": tokens, "flops": flops}[measure]), 1)
