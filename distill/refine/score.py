"""Scores of rows by what one or two language models think of them. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from distill.refine.operation import DataOp
from distill.refine.scored import Kind, Per
from growth.errors import UserError


class Score(DataOp):
    """How much likelier a teacher finds each row than a reference model does, or what one model loses on it.

    MiniPLM (Gu et al. 2024, arXiv 2410.17215), nll_gap: NLL_reference - NLL_teacher; a small model before and after
    fine-tuning make the same score. SALT-DS, median_topk: the median loss of tokens that a small model can learn.
    """

    makes: ClassVar = "scores"

    kind: Kind = Field("nll_gap", description="what of the models' likelihoods is the score")
    teacher: str = Field(description="a model or earlier stage; for nll and median_topk the only one")
    reference: str | None = Field(None, description="nll_gap: a smaller model or earlier stage")
    per: Per = Field("token", description="means over tokens or bytes, or sums; bytes compare different tokenizers")
    k: Annotated[int, Field(gt=0)] | None = Field(None, description="median_topk: learnable are the k likeliest; 10")
    tokens: Annotated[int, Field(gt=0)] | None = Field(None, description="tokens of one forward pass; null: by device")

    @model_validator(mode="after")
    def _check(self) -> Score:
        if (self.reference is None) == (self.kind == "nll_gap"):
            raise ValueError(
                "reference: nll_gap compares the teacher with a reference model" if self.reference is None
                else f"reference: {self.kind} is the score of one model, `teacher`"
            )  # fmt: skip
        if self.k is not None and self.kind != "median_topk":
            raise ValueError(f"k: {self.kind} counts every token")
        if self.kind == "median_topk" and self.per != "token":
            raise ValueError("per: a median is one of tokens")
        return self

    @property
    def models(self) -> dict[str, str]:
        return {"teacher": self.teacher} | ({"reference": self.reference} if self.reference else {})

    @property
    def readers(self) -> tuple[str, ...]:
        return tuple(self.models.values())

    def check(self, planned, text) -> Iterator[str]:
        for name, reference in self.models.items():
            facts = planned.facts(reference)
            if not facts.causal:
                yield f"{name}: {facts.family} does not predict next tokens, so it has no likelihood"
            yield from text.too_long(f"the {name}", facts)

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill import corpus, world
        from distill.refine import scored, scoring

        self._insist_on_one_tokenizer(context)
        text, told = corpus.open(src, "train"), {}
        for name, reference in self.models.items():
            told[name] = scoring.score(
                text, context.model(reference), out / name, precision=context.dtype(reference),
                k=(self.k or 10) if self.kind == "median_topk" else None, forward=self.tokens, label=f"score ({name})",
            )  # fmt: skip
        world.first(lambda: scored.describe(out, self.kind, self.per))
        return told

    def _insist_on_one_tokenizer(self, context) -> None:
        """Losses a token of different tokenisers have nothing to do with each other."""
        from distill.corpus import tokens

        found = {tokens.digest(tokens.load(context.model(model))) for model in self.models.values()}
        if self.per == "token" and len(found) > 1:
            raise UserError("teacher and reference have different tokenisers, so their losses a token cannot be "
                            "compared; `per: byte` compares them")  # fmt: skip
