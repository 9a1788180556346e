"""The student's hidden states are to lie where the teacher's do. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from distill.objectives import layers
from distill.objectives.layers import Layer
from distill.objectives.protocol import Needs, View
from distill.schedules import Schedule, Value

Position = Literal["first", "mean", "all"]


class HiddenMSE(Value):
    """The squared distance of student and teacher hidden states, of equal width.

    Self-distillation for further pre-training (Lee et al. 2023, arXiv 2210.02871) takes the first token behind the last
    norm, of rows in which nothing is masked, and sums over the width: the defaults here. `last` is what the model
    hands on, after the norm behind its blocks where it has one; a number is the output of that block.
    """

    target: str = Field(description="a teacher of the same width, by its name in targets")
    student_layer: Layer = Field("last", description="0 is the first; negative ones count from the end")
    teacher_layer: Layer = Field("last", description="0 is the first; negative ones count from the end")
    position: Position = Field(
        "first", description="of each document: its first token ([CLS]), the mean of its tokens, or all of them"
    )
    view: View = Field(
        "plain", description="plain: nothing is masked, a forward pass of its own; masked: as mlm has it"
    )
    reduction: Literal["sum", "mean"] = Field("sum", description="over the width; over documents or tokens: the mean")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss")

    def needs(self) -> Needs:
        sides = (frozenset({_tap(layer)}) for layer in (self.student_layer, self.teacher_layer))
        return Needs(*sides, view=self.view)

    def check(self, student, target) -> list[str]:
        wrong = [
            *layers.mistakes("student_layer", self.student_layer, student),
            *layers.mistakes("teacher_layer", self.teacher_layer, target),
        ]
        widths = [facts.widths["hidden"] for facts in (student, target)]
        if widths[0] != widths[1]:
            wrong.append(f"the student is {widths[0]} wide, the teacher {widths[1]}; they need one width")
        if self.position == "first" and student.causal:
            wrong.append("position first: of a causal model it sees nothing but itself; mean and all say more")
        return wrong

    def count(self, batch) -> dict:
        from distill.objectives.hidden_sum import hidden_count

        return {self.position: hidden_count(batch["segment_ids"], self.position)}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.hidden_sum import hidden_sum

        sides = target.taps[_tap(self.teacher_layer)], student.taps[_tap(self.student_layer)]
        return {self.position: hidden_sum(*sides, batch["segment_ids"], self.position, self.reduction)}


def _tap(layer: Layer):
    from distill.taps import OUTPUT, Tap

    return OUTPUT if layer == "last" else Tap("hidden", layer)
