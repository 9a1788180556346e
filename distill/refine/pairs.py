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
                yield from self.misfits(reference, planned.ranker(reference))
            except UserError as error:
                yield str(error)

    def misfits(self, reference: str, kind) -> Iterator[str]:
        """Every reason why a ranker of this kind cannot do it."""
        yield from ()
