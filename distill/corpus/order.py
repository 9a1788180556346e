"""Which row comes when: a stream without end that depends on the seed alone, not on batches, ranks or stops."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SHUFFLE, MASK, PART, NEGATIVES = 1, 2, 3, 4  # what numbers are drawn for: streams of one seed that share nothing


def raw(n: int, seed: int, purpose: int, epoch: int, item: int = 0) -> np.ndarray:
    """`n` random 64-bit numbers of their own for (seed, purpose, epoch, item).

    Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has no state to carry along. numpy
    promises the raw output of a bit generator to stay the same for ever, but not what `Generator` makes of it.
    """
    key, counter = np.array([seed, purpose], np.uint64), np.array([0, 0, epoch, item], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(n)


class Order:
    """Epoch after epoch over all rows, each in an order of its own."""

    def __init__(self, seed: int, rows: int):
        self.seed, self.rows = seed, rows

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, row id) at a place of the stream."""
        epoch, place = divmod(position, self.rows)
        return epoch, int(_permutation(self.seed, epoch, self.rows)[place])


@lru_cache(maxsize=8)  # a batch may straddle two epochs; sixteen bytes a row while made, two to four to keep
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.argsort(raw(rows, seed, SHUFFLE, epoch), kind="stable").astype(np.min_scalar_type(rows))
