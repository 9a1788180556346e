"""What a student will be as a ranker, and whether its encoder can be that, before a weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distill import layout, loading
from distill.corpus import tokens
from distill.ranking import rankers
from distill.ranking.joining import fitted
from distill.ranking.kinds import KINDS, ClassifierKind, RankerKind
from growth.errors import UserError


def of_student(student, tokenizer: Path | None) -> RankerKind:
    """By its `ranker`, and the tokenizer of a directory."""
    if not student.ranker:
        raise UserError(f"`ranker` is needed, of new weights nobody knows how they score: {', '.join(KINDS)}")
    if tokenizer is None:
        raise UserError("a config alone has no tokenizer to read texts with; `new: {like: MODEL}` has the model's")
    return fitted(student.ranker.kind, tokens.load(tokenizer))


def refuse(kind: RankerKind, config: dict[str, Any]) -> None:
    """An encoder of this config that cannot score so, in the words of the ranker itself."""
    read = loading.configuration(config)
    head = "classify" if isinstance(kind, ClassifierKind) else None
    with torch.device("meta"):
        rankers.build(kind, loading.skeleton(loading.class_of(read, head), read, {}))
    if wrong := too_long(kind, read):
        raise UserError(wrong)


def too_long(kind: RankerKind, config) -> str | None:
    """What is wrong where texts are longer than an encoder reads."""
    longest = layout.longest(config)
    if longest is None or kind.longest <= longest:
        return None
    return (
        f"query_length {kind.query_length} and passage_length {kind.passage_length} make texts of {kind.longest} "
        f"tokens, and its encoder reads {longest}; make one of them smaller"
    )
