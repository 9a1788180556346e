"""Every query of a batch with every passage of its group of queries, and what rankers say of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Of the pairs of a batch [P]; by the size of an in-batch group, of all that meet in one [B, U], else zero."""

    listed: Tensor
    crossed: Mapping[int, Tensor]


class Crossing(NamedTuple):
    """Lists [B] and the passages of all groups [U], those of a group once, however many of its lists have them."""

    query: Tensor  # [B] row of the batch's queries
    passage: Tensor  # [U] row of its passages
    there: Tensor  # [B, U] bool: both are of one group
    positive: Tensor  # [B] the column of a list's positive
    own: Tensor  # [B, U] bool: of the list itself

    @property
    def pairs(self) -> Tensor:
        """[C, 2], in the order in which `there` is true."""
        row, column = self.there.nonzero(as_tuple=True)
        return torch.stack([self.query[row], self.passage[column]], 1)

    def filled(self, scores: Tensor) -> Tensor:
        """Scores of these pairs [C] as [B, U]."""
        return scores.new_zeros(self.there.shape).masked_scatter(self.there, scores)

    def answered(self, batch: Mapping[str, Tensor]) -> Tensor:
        """[B, U] bool: the passage is judged to answer the query."""
        known = self.there.new_zeros(len(batch["query"]["input_ids"]), len(batch["passages"]["input_ids"]))
        query, passage = batch["answers"].unbind(1)
        known[query, passage] = True
        return known[self.query][:, self.passage]


def crossing(pairs: Tensor, group: Tensor, size: int) -> Crossing:
    """Of pairs [P, 2] of lists [P] (0, 1 ...; the first of each is its positive), `size` lists a group."""
    listed = torch.stack([group // size, pairs[:, 1]])  # [2, P]
    (of, passage), column = listed.unique(dim=1, return_inverse=True)
    first = torch.searchsorted(group, torch.arange(int(group[-1]) + 1, device=group.device))  # group ascends
    there = (first.new_tensor(range(len(first))) // size)[:, None] == of
    own = torch.zeros_like(there)
    own[group, column] = True
    return Crossing(pairs[first, 0], passage, there, column[first], own)
