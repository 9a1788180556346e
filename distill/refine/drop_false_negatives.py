"""Negatives that a teacher takes for answers, taken out. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator

from distill.refine.pairs import PairOp


class DropFalseNegatives(PairOp):
    """Leave out negatives that a teacher scores too near their positive, or above it."""

    makes: ClassVar = "groups"

    by: str = Field(description="an earlier data stage with scores of these pairs")
    margin: float | None = Field(None, description="a negative scores at least so much below its positive")
    share: float | None = Field(None, gt=0, le=1, description="a negative scores at most this share of its positive")

    @model_validator(mode="after")
    def _check(self) -> DropFalseNegatives:
        if (self.margin is None) == (self.share is None):
            raise ValueError("exactly one of margin, share is needed: they tell a false negative")
        return self

    def apply(self, src, out: Path, context) -> dict[str, Any]:
        from distill.ranking import mining
        from distill.scores import Reader

        collection, groups = src.insist("drop_false_negatives")
        told = mining.FalseNegatives(self.margin, self.share)
        return mining.drop(collection, groups, Reader(context.scores(self.by)), told, out)
