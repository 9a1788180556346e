"""A ranker over a batch: the scores of its lists, and of all that meet in its groups of queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from distill.objectives.crossing import Scores, crossing
from distill.objectives.protocol import Needs
from distill.ranking.ranker import Ranker


def scored_pairs(ranker: Ranker, batch: Mapping, needs: Iterable[Needs]) -> Scores:
    """What objectives need of it, in one forward pass; no pair is scored twice."""
    crossings = {n: crossing(batch["pairs"], batch["group"], n) for n in sorted({x.group for x in needs if x.group})}
    asked = [batch["pairs"], *(crossed.pairs for crossed in crossings.values())]
    pairs, place = torch.cat(asked).unique(dim=0, return_inverse=True)
    listed, *rest = ranker(batch["query"], batch["passages"], pairs)[place].split([len(some) for some in asked])
    return Scores(listed, {n: crossings[n].filled(found) for n, found in zip(crossings, rest, strict=True)})
