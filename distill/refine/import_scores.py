"""Teacher scores that others have published, as scores of a collection. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from distill.refine.pairs import PairOp


class ImportScores(PairOp):
    """Scores from a file: MS MARCO's in five or seven columns, by id or with texts; jsonl, parquet, dictionaries."""

    makes: ClassVar = "scores"

    path: str = Field(description="tsv, jsonl, parquet or pkl, perhaps packed; what it holds is recognised")
    teacher: str = Field("unknown", description="whose scores these are, for the manifest")
    activation: str = Field("none", description="what the teacher's logits went through, such as sigmoid")
    allowed: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="share of the rows that may name absent ids")

    def check(self, planned, text: None) -> Iterator[str]:
        if not self._path.is_file():
            yield f"path: {self.path} is not a file"

    @property
    def _path(self) -> Path:
        return Path(self.path).expanduser()

    def apply(self, src, out: Path, context) -> dict[str, Any]:
        from distill import world
        from distill.ranking import importers

        collection, groups = src.open()
        how = {"teacher": self.teacher, "activation": self.activation, "allowed": self.allowed}
        return world.first(lambda: importers.bring(self._path, out, collection, groups, **how))
