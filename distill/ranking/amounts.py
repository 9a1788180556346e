"""How much a data stage on pairs has to read, as far as that is known before it runs: a bound. No torch."""

from __future__ import annotations

from typing import NamedTuple

from distill.cost import Texts
from distill.ranking import costs
from distill.ranking.kinds import RankerKind
from distill.ranking.prepared import GROUPS, MANIFEST
from distill.refine.mine import Mine
from growth.files import read_json


class Amount(NamedTuple):
    queries: int
    passages: int
    pairs: int  # 0 where there are no groups

    def texts(self, kind: RankerKind) -> Texts:
        """What a ranker's encoder reads, as long as it may be; without pairs each text is read by itself."""
        passages = min(self.passages, self.pairs or self.passages)
        if self.pairs or not isinstance(kind, costs.JOINED):
            return costs.texts(kind, self.queries, passages, self.pairs)
        query, passage = kind.lengths
        return (self.queries, query), (passages, passage)


def amount(name: str, planned) -> Amount | None:
    """Of a collection, or of what a data stage makes of one; None where it is yet to be prepared."""
    recipe, context = planned.recipe, planned.context
    prepared = context.out / "collections" / recipe.collection(name) / MANIFEST
    if not prepared.exists():
        return None
    about = read_json(prepared)
    return Amount(about["queries"], about["documents"], _pairs(name, planned, about))


def _pairs(name: str, planned, about: dict) -> int:
    made = planned.context.directory(name) / GROUPS / MANIFEST if name not in planned.recipe.collections else None
    if made is None:
        return (about["groups"] or 0) + (about["negatives"] or 0)
    if made.exists():
        found = read_json(made)
        return found["groups"] + found["negatives"]
    data = planned.recipe.stage(name).data
    ((_, op),) = data.operations()
    return about["answers"] * (1 + op.depth - op.skip) if isinstance(op, Mine) else _pairs(data.from_, planned, about)


def texts(stage, planned) -> list[Texts | None]:
    """What each ranker of a data stage reads."""
    found = amount(stage.data.from_, planned)
    readers = [reference for _, op in stage.data.operations() for reference in op.readers]
    return [found and found.texts(planned.ranker(reference)) for reference in readers]
