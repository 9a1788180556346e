"""The rows with the best scores as a corpus of their own. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.refine.operation import DataOp
from distill.schedules import Several

CHOICES = ("keep", "threshold", "tokens")


class Select(DataOp):
    """MiniPLM keeps the better half of a corpus, in corpus order (Gu et al. 2024, arXiv 2410.17215)."""

    by: str = Field(description="a data stage that scores this very corpus")
    keep: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="share of the rows")
    threshold: float | None = Field(None, description="rows whose score is at least (low: at most) this")
    tokens: Annotated[int, Field(gt=0)] | None = Field(None, description="the best rows, as many as these tokens hold")
    better: Literal["high", "low"] = Field("high", description="scores that are kept")
    order: Literal["corpus"] = Field("corpus", description="of the rows that are kept: as before")
    quota: Annotated[dict[str, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] | None = Field(
        None, description="{part: share of what is kept}; null: all parts compete"
    )
    unwanted: Several[str] = Field((), description="parts known to be worthless: the report says how many it found")

    @model_validator(mode="after")
    def _check(self) -> Select:
        given = [key for key in CHOICES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(CHOICES)} is needed, found {' and '.join(given) or 'none'}")
        if self.quota and self.threshold is not None:
            raise ValueError("quota: a threshold keeps no set share; use keep or tokens")
        if self.quota and sum(self.quota.values()) > 1 + 1e-9:
            raise ValueError(f"quota: the shares add up to {sum(self.quota.values()):g}, more than 1")
        return self

    def check(self, planned, text) -> Iterator[str]:
        scored = planned.recipe.stage(self.by).data
        ((name, _),) = scored.operations()
        if name != "score":
            yield f"by: stage {self.by} keeps no scores of rows but what `{name}` makes"
        elif scored.from_ != text.name:
            yield f"by: stage {self.by} has scored {scored.from_}, this one selects from {text.name}"

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill.refine.refinement import refine
        from distill.refine.selection import Rule

        rule = Rule(self.keep, self.threshold, self.tokens, self.better, self.quota)
        return refine(src, context.scores(self.by), out, rule, self.unwanted)
