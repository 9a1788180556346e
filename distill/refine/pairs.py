"""What operations on queries and documents share. No torch."""

from __future__ import annotations

from collections.abc import Iterator

from distill.refine.operation import DataOp
from growth.errors import UserError


class PairOp(DataOp):
    """From a collection, and perhaps groups of it, to groups or to scores of their pairs.

    Groups are made by the first rank alone and appear whole; scores are made by all ranks. Each stands alone in its
    stage.
    """

    reads = "pairs"

    def check(self, planned, text: None) -> Iterator[str]:
        for reference in self.readers:
            try:
                yield from self.misfits(reference, kind_of(reference, planned))
            except UserError as error:
                yield str(error)

    def misfits(self, reference: str, kind) -> Iterator[str]:
        """Every reason why a ranker of this kind cannot do it."""
        yield from ()


def kind_of(reference: str, planned):
    """The kind of ranker that a model is or a stage will make."""
    from distill.ranking import opening

    if reference in planned.recipe.models:
        return opening.form_of(planned.context, reference).kind
    stage = planned.recipe.stage(reference.partition(".")[0])
    if not stage.train or not stage.train.ranks:
        raise UserError(f"{reference} makes no ranker; a train stage whose losses are those of rankers does")
    student = stage.train.student
    return student.ranker.kind if student.ranker else kind_of(stage.origin, planned)
