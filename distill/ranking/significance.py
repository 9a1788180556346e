"""Whether one system is better than another, or the items were kind to it: paired tests over items. No torch.

Smucker, Allan and Carterette (CIKM 2007) compare such tests for retrieval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from growth.errors import UserError

ROUNDS, LEVEL = 10_000, 0.95
BLOCK = 1 << 24  # drawn numbers at once


@dataclass(frozen=True)
class Comparison:
    """Of `one` minus `other`: the mean difference, how often chance alone makes it as large, and its interval."""

    difference: float
    p: float
    low: float
    high: float
    items: int
    exact: bool  # all sign patterns were counted, not drawn
    of: str = "queries"  # what the items are

    def __str__(self) -> str:
        how = "exact" if self.exact else "drawn"
        return (
            f"{self.difference:+.4f} (p {self.p:.4g}, {how}; {LEVEL:.0%} interval {self.low:+.4f} to {self.high:+.4f}; "
            f"{self.items} {self.of})"
        )


def compare(one: Mapping[str, float], other: Mapping[str, float], *, rounds: int = ROUNDS, seed: int = 0) -> Comparison:
    """Two systems on the same queries: {query: value of a measure} of each."""
    if one.keys() != other.keys() or not one:
        odd = sorted(one.keys() ^ other.keys())
        raise UserError(f"two systems are compared on the same queries; {len(odd)} only one of them has: {odd[:5]}")
    differences = np.array([one[query] - other[query] for query in sorted(one)], dtype=np.float64)
    p, exact = randomisation(differences, rounds, seed)
    low, high = interval(differences, rounds, seed)
    return Comparison(float(differences.mean()), p, low, high, len(differences), exact)


def compare_correlations(one, other, gold, *, rounds: int = ROUNDS, seed: int = 0) -> Comparison:
    """Two systems by the rank correlation (Spearman) of their scores [S, n] with `gold` [n], a row for each seed.

    Chance exchanges the ranks that the two give to an item; the interval draws items, which keep their ranks.
    """
    from scipy.stats import rankdata

    rng, n = np.random.default_rng(seed), len(gold)
    ranks, gold = rankdata([one, other], axis=-1), rankdata(gold)  # [2, S, n], [n]
    observed, chance, drawn = float(_gain(ranks, gold)), [], []
    for size in _blocks(ranks.size, rounds):
        change, items = rng.random((size, n)) < 0.5, rng.integers(0, n, size=(size, n))
        chance.append(_gain(np.where(change, ranks[::-1, :, None], ranks[:, :, None]), gold))
        drawn.append(_gain(ranks[..., items], gold[items]))
    extreme = int((np.abs(np.concatenate(chance)) >= abs(observed) - 1e-12).sum())
    return Comparison(observed, (extreme + 1) / (rounds + 1), *_middle(np.concatenate(drawn)), n, False, "pairs")


def _gain(ranks: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Correlation of the first system minus that of the second, mean over seeds: of [2, S, ..., n] and [..., n]."""
    ranks, gold = (x - x.mean(-1, keepdims=True) for x in (ranks, gold))
    scale = np.sqrt((ranks * ranks).sum(-1) * (gold * gold).sum(-1))
    first, second = np.divide((ranks * gold).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)
    return (first - second).mean(0)


def randomisation(differences: np.ndarray, rounds: int = ROUNDS, seed: int = 0) -> tuple[float, bool]:
    """Two-sided p: were the systems equal, each difference [n] could as well have the other sign.

    All 2^n patterns where they are no more than `rounds`; else that many are drawn, the observed one counting as drawn.
    """
    exact = 2 ** len(differences) <= rounds
    patterns = _every(len(differences)) if exact else _drawn(len(differences), rounds, seed)
    slack = 1e-12 * np.abs(differences).sum()  # sums in another order may differ in their last digits
    observed = abs(differences.sum()) - slack
    extreme = sum(int((np.abs(signs @ differences) >= observed).sum()) for signs in patterns)
    return (extreme / 2 ** len(differences) if exact else (extreme + 1) / (rounds + 1)), exact


def _every(n: int) -> Iterator[np.ndarray]:
    """[2^n, n] of -1 and 1."""
    yield 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)


def _drawn(n: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for size in _blocks(n, rounds):
        yield 1.0 - 2.0 * rng.integers(0, 2, size=(size, n))


def interval(differences: np.ndarray, rounds: int = ROUNDS, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """Of the mean, by drawing queries with replacement (bootstrap percentiles)."""
    rng, n = np.random.default_rng(seed), len(differences)
    means = [differences[rng.integers(0, n, size=(size, n))].mean(1) for size in _blocks(n, rounds)]
    return _middle(np.concatenate(means), level)


def _middle(drawn: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _blocks(n: int, rounds: int) -> list[int]:
    """`rounds` in parts that fit in memory; a result depends on the seed and on n alone."""
    size = max(1, BLOCK // n)
    return [min(size, rounds - start) for start in range(0, rounds, size)]
