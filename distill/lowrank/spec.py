"""How the matrices of a student are held while it trains: the keys of `lowrank`. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill.schedules import Several, Value


class LowRankSpec(Value):
    """Low rank plus sparse: W = (alpha / rank) B A, and values at fixed places.

    A student of random weights starts as SLTrain's does (arXiv 2406.02214), one made from a model as its matrices' SVD
    (PELA, arXiv 2310.10700), the values where most is left over. It trains with the memory of what is held; exported
    it is an ordinary model again, its factors beside it.
    """

    rank: Annotated[int, Field(gt=0)] | None = Field(None, description="of every matrix in scope")
    compress: Annotated[float, Field(gt=1)] | None = Field(
        None, description="instead: a rank for each, at which B and A have one part in so many of its numbers"
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="alpha / rank scales B A; null: it is 1 (of an SVD start). SLTrain: from 0.25 down to 0.008"
    )
    density: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of a matrix that has a value of its own; SLTrain: 0.03. 0: low rank alone"
    )
    scope: Annotated[Several[Literal["attention", "ffn"]], Field(min_length=1)] = Field(
        ("attention", "ffn"), description="whose matrices; embeddings, norms, biases and heads stay as they are"
    )

    @model_validator(mode="after")
    def _check_one(self) -> LowRankSpec:
        if (self.rank is None) == (self.compress is None):
            raise ValueError("exactly one of rank, compress is needed")
        if self.compress and self.alpha:
            raise ValueError("alpha: with compress every matrix has a rank of its own, and no scale")
        return self
