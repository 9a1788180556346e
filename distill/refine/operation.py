"""What every operation on a corpus can do. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from distill.schedules import Value

if TYPE_CHECKING:
    from distill.context import Context
    from distill.fitting import Text
    from distill.ranking.prepared import Ranking
    from distill.specs import CorpusSpec


class DataOp(Value):
    """From a prepared corpus to another one, or to scores of its rows; its fields are the keys of a recipe.

    One that reads pairs goes from a collection (`Ranking`) to groups of it, or to scores of their pairs.
    """

    reads: ClassVar[Literal["text", "pairs"]] = "text"
    makes: ClassVar[Literal["corpus", "scores", "groups"]] = "corpus"

    @property
    def readers(self) -> tuple[str, ...]:
        """The models that read the whole corpus once."""
        return ()

    def plan(self, text: CorpusSpec, recipe) -> CorpusSpec:
        """What the corpus will be: its tokeniser and the length of its rows, if they change."""
        return text

    def check(self, planned, text: Text) -> Iterator[str]:
        """Every reason why it cannot work, before text is read or a weight is loaded."""
        yield from ()

    def apply(self, src: Path | Ranking, out: Path, context: Context) -> dict[str, Any]:
        """Make the directory `out` from the prepared corpus in `src`, or from a collection; returns what is kept.

        A corpus is made by the first rank alone and appears whole. Scores are made by all ranks, each its share of the
        rows, and what is there already is not made again.
        """
        raise NotImplementedError
