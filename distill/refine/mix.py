"""Rows of several corpora in one. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill.refine.operation import DataOp
from distill.specs import Share


class Mix(DataOp):
    """Other corpora of the same tokenizer and length take these shares of the rows; no row stands twice."""

    with_: Annotated[dict[str, Share], Field(min_length=1)] = Field(
        alias="with", description="{corpus or data stage: its share of the rows}; the rest is this corpus"
    )

    @model_validator(mode="after")
    def _check(self) -> Mix:
        if sum(self.with_.values()) >= 1:
            raise ValueError(
                f"with: the shares add up to {sum(self.with_.values()):g}, which leaves this corpus nothing"
            )
        return self

    def check(self, planned, text) -> Iterator[str]:
        for name in self.with_:
            if (other := planned.recipe.text(name).length) != text.spec.length:
                yield f"with: rows of {name} have {other} tokens, these {text.spec.length}"

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill.refine.rewriting import mix

        return mix(src, out, {context.corpus(name): share for name, share in self.with_.items()})
