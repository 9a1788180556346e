"""The texts of a corpus in the tokens of another tokenizer, packed anew. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill.refine.operation import DataOp
from distill.specs import TrainTokenizer

CHOICES = ("to", "like", "train")


class Retokenize(DataOp):
    """For a student of another family: the text that was selected is the same, and none of it is lost."""

    to: str | None = Field(None, description="a model of the recipe, whose tokenizer it is")
    like: str | None = Field(None, description="a corpus of the recipe, whose tokenizer it is")
    train: TrainTokenizer | None = Field(None, description="a new tokenizer, learned from the training side")
    length: Annotated[int, Field(ge=8)] | None = Field(None, description="tokens in a row; null: as before")

    @model_validator(mode="after")
    def _check(self) -> Retokenize:
        given = [key for key in CHOICES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(CHOICES)} is needed, found {' and '.join(given) or 'none'}")
        return self

    def plan(self, text, recipe):
        from distill.specs import NewTokenizer

        tokenizer = recipe.text(self.like).tokenizer if self.like else self.to or NewTokenizer(train=self.train)
        return text.model_copy(update={"tokenizer": tokenizer, "length": self.length or text.length})

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill.corpus import tokens
        from distill.refine.rewriting import retokenize

        source = context.model(self.to) if self.to else self.like and context.corpus(self.like) / "tokenizer"
        return retokenize(src, out, source and tokens.load(source), train=self.train, length=self.length)
