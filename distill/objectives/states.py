"""The student's hidden states are to lie where the teacher's do. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.objectives import layers
from distill.objectives.layers import Layer
from distill.objectives.protocol import Needs, View
from distill.schedules import Schedule, Several, Value

Position = Literal["first", "mean", "all"]
State = Layer | Literal["embeddings"]
States = State | Annotated[Several[State], Field(min_length=1)]

WHICH = "0 is the first block, negative ones count from the end; last is what the model hands on; or a list"


class Hidden(Value):
    """The distance of student and teacher hidden states, of one layer or of several pairs.

    `last` is what the model hands on, after the norm behind its blocks where it has one; a number is the output of that
    block; `embeddings` is what the first block is given. TinyBERT (Jiao et al. 2019, arXiv 1909.10351) has the mean
    square of all of these, DistilBERT (Sanh et al. 2019, arXiv 1910.01108) the cosine of the last, self-distillation
    for further pre-training (Lee et al. 2023, arXiv 2210.02871) the squared distance of the first token, in a view of
    its own.
    """

    target: str = Field(description="a teacher, by its name in targets; of the same width unless `project`")
    kind: Literal["mse", "cosine"] = Field("mse", description="the squared distance, or 1 - cosine")
    student_layer: States = Field("last", description=WHICH)
    teacher_layer: States = Field("last", description=f"{WHICH} of as many")
    position: Position = Field(
        "all", description="of each document: its first token ([CLS]), the mean of its tokens, or all of them"
    )
    view: View = Field(
        "masked", description="masked: as mlm has it; plain: nothing is masked, a forward pass of its own"
    )
    reduction: Literal["mean", "sum"] | None = Field(
        None, description="mse: over the width, mean unless given; over documents or tokens: the mean"
    )
    project: bool = Field(
        False, description="a linear map into the teacher's width, shared by the layers of this loss, learns beside"
    )
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss, alike for every pair of layers")

    @model_validator(mode="after")
    def _check(self) -> Hidden:
        if wrong := layers.unpaired(self.student_layer, self.teacher_layer):
            raise ValueError(wrong)
        if self.kind == "cosine" and self.reduction:
            raise ValueError("reduction: a cosine is one number; mse has one for each of the width")
        return self

    @property
    def pairs(self) -> list[tuple[State, State]]:
        return layers.paired(self.student_layer, self.teacher_layer)

    def needs(self) -> Needs:
        sides = (frozenset(_tap(state) for state in side) for side in zip(*self.pairs, strict=True))
        return Needs(*sides, view=self.view)

    def check(self, student, target) -> list[str]:
        wrong = layers.beyond(self.pairs, student, target)
        widths = [facts.widths["hidden"] for facts in (student, target)]
        if widths[0] != widths[1] and not self.project:
            wrong.append(
                f"the student is {widths[0]} wide, the teacher {widths[1]}; `project: true` learns a map between them"
            )
        if self.position == "first" and student.causal:
            wrong.append("position first: of a causal model it sees nothing but itself; mean and all say more")
        return wrong

    def count(self, batch) -> dict:
        from distill.objectives.hidden_sum import hidden_count

        count = hidden_count(batch["segment_ids"], self.position)
        return {layers.named(state): count for state, _ in self.pairs}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.hidden_sum import hidden_sum

        how = self.kind, self.position, self.reduction or "mean"
        return {
            layers.named(own): hidden_sum(target.taps[_tap(its)], student.taps[_tap(own)], batch["segment_ids"], *how)
            for own, its in self.pairs
        }


def _tap(state: State):
    from distill.taps import EMBEDDINGS, OUTPUT, Tap

    return {"last": OUTPUT, "embeddings": EMBEDDINGS}.get(state) or Tap("hidden", state)
