"""Texts again with other words in them, so that a student hears of words that the corpus lacks. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill.refine.operation import DataOp
from distill.specs import Positive


class Augment(DataOp):
    """Beside every text to train on, copies in which some words are others of the tokenizer's vocabulary.

    As TinyBERT augments (Jiao et al. 2019, arXiv 1909.10351), but with words drawn at random and no further model:
    a teacher's states are worth matching on any text. For losses that learn from a teacher, not from the words.
    """

    copies: Positive = Field(1, description="of each text")
    share: Annotated[float, Field(gt=0, le=1)] = Field(0.4, description="of the words of a copy that are others")
    seed: int = Field(0, description="of the words that are drawn")

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill.refine.rewriting import augment

        return augment(src, out, self.copies, self.share, self.seed)
