"""A teacher says which class every row of text is of, and a student may learn from that alone. No torch.

Pseudo-labels (Lee 2013). Hard ones: what the teacher is unsure of can be left out, by its probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill.refine.operation import DataOp


class Label(DataOp):
    """Every row gets the class that is likeliest to the teacher; classes it had before are compared and forgotten."""

    teacher: str = Field(description="a model or earlier stage with a classification head")
    confidence: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="rows whose likeliest class has a smaller probability are left out"
    )

    @property
    def readers(self) -> tuple[str, ...]:
        return (self.teacher,)

    def plan(self, text, recipe):
        return text.model_copy(update={"label": f"{self.teacher} says so"})

    def check(self, planned, text) -> Iterator[str]:
        facts = planned.facts(self.teacher)
        if facts.kind != "classify":
            yield f"teacher: {self.teacher} ({facts.family}) has no classification head"
        if text.spec.packed:
            yield f"a row has one class, so it takes one document; corpora.{text.name} needs packed: false"
        yield from text.beyond("the teacher", facts)
        yield from text.foreign(self.teacher)

    def apply(self, src: Path, out: Path, context) -> dict[str, Any]:
        from distill.labelling import write

        return write(self, src, out, context)
