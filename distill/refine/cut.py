"""The best of more numbers than one sorts. No torch.

A histogram finds the bin in which the cut lies, a second pass the place in it. The same answer as a full stable sort,
ties to the smaller index, in memory for the bins and what lies in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

BITS = 20  # bins: sign, exponent and the first eight bits of the fraction, so 256 to each power of two


class Some(NamedTuple):
    """Numbers in their order: the index of each, the number, what taking it costs."""

    index: np.ndarray
    score: np.ndarray
    cost: np.ndarray


Stream = Callable[[], Iterable[Some]]  # from the start at every call, at most one index in two blocks


def best(stream: Stream, budget: int, *, high: bool) -> Iterator[np.ndarray]:
    """The indices of the best ones, block by block, until the first that would cost more than is left of the budget.

    `high`: the greater the better.
    """
    edge, left = _edge(stream, budget, high)
    chosen = _inside(stream, edge, left, high)
    for some in stream():
        order = _order(some.score, high) >> np.uint64(64 - BITS)
        yield some.index[(order < edge) | ((order == edge) & np.isin(some.index, chosen))]


def _edge(stream: Stream, budget: int, high: bool) -> tuple[int, int]:
    """The bin in which the budget ends (one behind the last if it does not), and what is left of it there."""
    cost = np.zeros(1 << BITS, dtype=np.int64)
    for some in stream():
        bins, place = np.unique(_order(some.score, high) >> np.uint64(64 - BITS), return_inverse=True)
        np.add.at(cost, bins.astype(np.int64), np.bincount(place, some.cost, minlength=len(bins)).astype(np.int64))
    spent = np.cumsum(cost)
    edge = int(np.searchsorted(spent, budget, side="right"))
    return edge, budget - (int(spent[edge - 1]) if edge else 0)


def _inside(stream: Stream, edge: int, left: int, high: bool) -> np.ndarray:
    """Of the numbers in that bin, the indices of those that still fit, in ascending order."""
    found = []
    for some in stream():
        order = _order(some.score, high)
        here = order >> np.uint64(64 - BITS) == edge
        found.append((order[here], some.index[here], some.cost[here]))
    order, index, cost = (np.concatenate(column) for column in zip(*found, strict=True))
    sorting = np.lexsort((index, order))
    fits = np.cumsum(cost[sorting]) <= left
    return np.sort(index[sorting][: len(fits) if fits.all() else int(fits.argmin())])


def _order(score: np.ndarray, high: bool) -> np.ndarray:
    """Whole numbers that ascend from the best to the worst [N]; equal scores have equal ones."""
    bits = (np.asarray(score, dtype=np.float64) + 0.0).view(np.uint64)  # -0.0 is 0.0
    ascending = np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(1 << 63))
    return ~ascending if high else ascending
