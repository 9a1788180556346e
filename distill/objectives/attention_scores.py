"""TinyBERT's attention term: the student's tokens are to score each other as the teacher's do. No torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from distill.objectives import layers, relation
from distill.objectives.layers import Layers
from distill.objectives.protocol import Needs
from distill.schedules import Schedule, Value

WHICH = "0 is the first, negative ones count from the end; or a list"


class AttentionMSE(Value):
    """The squared distance of attention scores before the softmax, head by head (Jiao et al. 2019, arXiv 1909.10351).

    Of one layer or of several pairs of layers, of models with as many heads: the mean over sequences, heads and the
    pairs of tokens that see each other.
    """

    target: str = Field(description="a teacher with as many heads, by its name in targets")
    student_layer: Layers = Field("last", description=WHICH)
    teacher_layer: Layers = Field("last", description=f"{WHICH} of as many")
    weight: Schedule = Field(Schedule.constant(1.0), description="factor on this loss, alike for every pair of layers")

    @model_validator(mode="after")
    def _check(self) -> AttentionMSE:
        if wrong := layers.unpaired(self.student_layer, self.teacher_layer):
            raise ValueError(wrong)
        return self

    @property
    def pairs(self) -> list[tuple]:
        return layers.paired(self.student_layer, self.teacher_layer)

    def needs(self) -> Needs:
        from distill.taps import Tap

        sides = zip(*self.pairs, strict=True)
        roles = relation.roles("attention")
        return Needs(*(frozenset(Tap(role, layers.number(one)) for role in roles for one in side) for side in sides))

    def check(self, student, target) -> list[str]:
        models = {"student": student, "teacher": target}
        wrong = layers.beyond([tuple(map(layers.number, pair)) for pair in self.pairs], student, target)
        return wrong + (relation.untapped(models) or relation.unlike(models) + relation.unequal_attention(models))

    def count(self, batch) -> dict:
        from distill.objectives.relation_sum import relation_count

        count = relation_count(batch["segment_ids"], "sample")
        return {layers.named(own): count for own, _ in self.pairs}

    def terms(self, student, target, batch) -> dict:
        from distill.objectives.segments import groups

        problems, found = groups(batch["segment_ids"]), {}
        for own, its in self.pairs:
            sides = (target, layers.number(its)), (student, layers.number(own))
            found[layers.named(own)] = relation.related("attention", sides, problems, heads=None, measure="mse")
        return found
