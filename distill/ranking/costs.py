"""What a step of a ranker costs, by the formula of all training (`distill.cost`). No torch.

Texts are taken to be as long as they may be: a bound, for they are shorter and hardly any padding is run. A dual
encoder, ColBERT and TK read each text of a row once; a cross-encoder and PreTT read query and passage for every pair.
Heads of rankers are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from distill import hooks
from distill.cost import Cost, Texts
from distill.ranking.kinds import ClassifierKind, CrossKind, PreTTKind, RankerKind

if TYPE_CHECKING:
    from distill.kinds import TrainSpec
    from distill.models import Facts

JOINED = (CrossKind, ClassifierKind, PreTTKind)  # whose encoder reads pairs


def texts(kind: RankerKind, queries: int, passages: int, pairs: int) -> Texts:
    """What its encoder reads of so many."""
    query, passage = kind.lengths
    if isinstance(kind, JOINED):
        return ((pairs, query + passage),)
    return (queries, query), (passages, passage)


def cost_of(
    spec: TrainSpec, student: tuple[Facts, RankerKind], teachers: Mapping[str, tuple[tuple[Facts, RankerKind], ...]]
) -> Cost:
    """Of a train stage whose student is a ranker."""
    objectives = [objective for _, objective in spec.objectives()]
    rows, passages = spec.optim.batch, spec.optim.batch * (1 + spec.negatives)

    def read(kind: RankerKind, target: str | None = None) -> Texts:
        groups = [o.needs().group or 1 for o in objectives if target is None or o.target == target]
        return texts(kind, rows, passages, passages * max(groups, default=1))  # the rows of a group see each other's

    return Cost(
        student=student[0],
        head=False,
        teachers={name: tuple(facts for facts, _ in several) for name, several in teachers.items()},
        headed=frozenset(),
        texts=read(student[1]),
        parts=hooks.parts(spec.hook_values()),
        taught={name: tuple(read(kind, name) for _, kind in several) for name, several in teachers.items()},
        passes={None: 1} | {name: 1 for name in teachers},
    )
