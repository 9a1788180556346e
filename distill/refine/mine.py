"""Negatives worth training on, found by words or by a model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from distill.ranking.kinds import DualKind
from distill.refine.pairs import PairOp
from distill.specs import BM25


class Mine(PairOp):
    """For every judged query and each answer to it the other documents that a search finds: hard negatives."""

    makes: ClassVar = "groups"

    by: str = Field(BM25, description="bm25, or a model or earlier stage that makes one vector of a text")
    depth: Annotated[int, Field(gt=0)] = Field(100, description="documents of a query that are looked at, best first")
    skip: Annotated[int, Field(ge=0)] = Field(0, description="of these, leave out so many of the best")
    at_least: Annotated[int, Field(gt=0)] = Field(1, description="the grade of an answer")

    @model_validator(mode="after")
    def _check(self) -> Mine:
        if self.skip >= self.depth:
            raise ValueError(f"skip: {self.skip} of the {self.depth} best leaves nothing")
        return self

    @property
    def readers(self) -> tuple[str, ...]:
        return () if self.by == BM25 else (self.by,)

    def misfits(self, reference: str, kind) -> Iterator[str]:
        if not isinstance(kind, DualKind):
            yield f"by: {reference} makes no vector of a text, so it cannot search; a dual_encoder does, or {BM25}"

    def apply(self, src, out: Path, context) -> dict[str, Any]:
        from distill.ranking import mining

        collection, _ = src.open()
        settings = {"depth": self.depth, "skip": self.skip, "at_least": self.at_least}
        return mining.mine(collection, out, self._search(context, out), by=self.by, **settings)

    def _search(self, context, out: Path):
        from distill.ranking import dense, search

        if self.by == BM25:
            return search.by_words
        from distill.ranking.opening import opened

        ranker, scratch = opened(context, self.by), out.with_name("vectors")
        return lambda documents, queries, depth: dense.run(ranker, documents, queries, depth, scratch)
