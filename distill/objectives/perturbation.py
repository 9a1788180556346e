"""Factors are to stay near the matrix that they came from. No torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from distill.objectives.protocol import Needs, View
from distill.schedules import Schedule, Value


class Perturbation(Value):
    """The largest deviation of a weight of B A from the one it was: (max |B A - W| - epsilon)^2, the mean of matrices.

    PELA (Guo et al. 2023, arXiv 2310.10700), beside the loss of a task and a distance of features; W is the student
    before it became factors. It works from both sides: what lies nearer than epsilon is pushed away. It costs the
    memory of W on every rank, and for every micro-batch the product B A, which FLOPs do not count.
    """

    epsilon: Annotated[float, Field(ge=0)] = Field(0.001, description="how far the farthest weight may be")
    view: View = Field("masked", description="of which forward pass it takes part; it reads no tokens")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")
    target: ClassVar[None] = None

    def needs(self) -> Needs:
        from distill.taps import DEVIATIONS

        return Needs(student=frozenset({DEVIATIONS}), view=self.view)

    def check(self, student, target=None) -> list[str]:
        return []

    def count(self, batch) -> dict:
        return {"max": batch["segment_ids"].new_tensor(1.0).double()}  # a micro-batch: it is the same in all of them

    def terms(self, student, target, batch) -> dict:
        from distill.taps import DEVIATIONS

        return {"max": (student.taps[DEVIATIONS] - self.epsilon).square().mean()}
