"""What teachers say of every pair of queries and documents, written down once. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from distill.refine.pairs import PairOp
from distill.schedules import Several

Weight = Annotated[float, Field(gt=0)]


class ScorePairs(PairOp):
    """A teacher, or the mean of several, over every pair of queries and documents in the groups, each once."""

    makes: ClassVar = "scores"

    teacher: str | None = Field(None, description="a ranker: a model or earlier stage")
    ensemble: Annotated[Several[str], Field(min_length=2)] | None = Field(
        None, description="several rankers, whose mean score it is"
    )
    weights: Several[Weight] | None = Field(None, description="of an ensemble: one for each ranker; null: all alike")
    standardise: bool = Field(
        False, description="of an ensemble: each ranker's scores first to mean 0 and deviation 1 over these pairs"
    )

    @model_validator(mode="after")
    def _check(self) -> ScorePairs:
        if (self.teacher is None) == (self.ensemble is None):
            raise ValueError("exactly one of teacher, ensemble is needed")
        if self.teacher and (self.weights or self.standardise):
            raise ValueError(f"{'weights' if self.weights else 'standardise'}: only an ensemble has several to weigh")
        if self.weights and len(self.weights) != len(self.ensemble):
            raise ValueError(f"weights: {len(self.weights)} of them for {len(self.ensemble)} rankers")
        if self.ensemble and len(set(self.ensemble)) < len(self.ensemble):
            raise ValueError("ensemble: a ranker stands twice; give it a weight instead")
        return self

    @property
    def readers(self) -> tuple[str, ...]:
        return self.ensemble or (self.teacher,)

    def apply(self, src, out: Path, context) -> dict[str, Any]:
        from distill.ranking import pairing

        collection, groups = src.insist("score_pairs")
        if self.teacher:
            return pairing.by_one(self.teacher, collection, groups, out, context)
        how = {"weights": self.weights, "standardise": self.standardise}
        return pairing.by_several(self.ensemble, collection, groups, out, context, **how)
