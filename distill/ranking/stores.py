"""Scores of pairs: the store of a teacher, an ensemble of several, what they say of groups. No torch.

A score is kept by the two texts it is of (`distill.scores`), so that ids, files and orders may change around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill import scores
from distill.ranking.collection import Collection
from distill.ranking.groups import Groups
from distill.scores import About, Column, Reader, Writer, pair_keys
from growth.console import say
from growth.errors import UsageError, UserError

KIND, SCORE = "ranking", "score"
LOGIT, DEVIATIONS = "logit", "standard deviations"
BLOCK = 1 << 16
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def about(producers: Sequence[Mapping], unit: str = LOGIT) -> About:
    return About(KIND, {SCORE: Column("float32", unit=unit)}, [dict(producer) for producer in producers])


@dataclass(frozen=True)
class Ensemble:
    """What became of stores that were put together."""

    pairs: int
    left_out: tuple[int, ...]  # of each store, pairs that not all have

    def __str__(self) -> str:
        return f"{self.pairs} pairs that all have; left out: {', '.join(map(str, self.left_out))}"


def ensemble(
    stores: Sequence[str | Path], out: str | Path, *, weights: Sequence[float] | None = None, standardise: bool = False
) -> Ensemble:
    """The (weighted) mean score of the pairs that every store has, as a store.

    `standardise`: each teacher's scores are first brought to mean 0 and deviation 1 over these pairs, so that none
    counts more because its scores spread wider.
    """
    weights = _weights(weights, len(stores))
    readers = [Reader(path) for path in stores]
    keys = readers[0].keys
    for reader in readers[1:]:
        keys = keys[~reader.missing(keys)]
    if not len(keys):
        raise UserError(f"the stores {', '.join(map(str, stores))} have no pair in common")
    unit = _unit(readers, standardise)
    scales = [_scale(reader, keys) if standardise else (0.0, 1.0) for reader in readers]
    with Writer(out, about(_producers(readers, weights, standardise), unit), seconds=math.inf) as writer:
        for block in np.split(keys, range(BLOCK, len(keys), BLOCK)):
            values = (w * (_values(r, block) - mean) / std for r, w, (mean, std) in zip(readers, weights, scales,
                      strict=True))  # fmt: skip
            writer.add(block, {SCORE: sum(values).astype(np.float32)})
    scores.seal(out)
    return Ensemble(len(keys), tuple(len(reader) - len(keys) for reader in readers))


def _weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """They add up to one."""
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if not count or len(given) != count or not all(np.isfinite(given)) or min(given) <= 0:
        raise UsageError(f"{count} stores and the weights {given}: every store needs a weight above 0")
    return [weight / sum(given) for weight in given]


def _unit(readers: Sequence[Reader], standardise: bool) -> str:
    units = {reader.about.columns[SCORE].unit for reader in readers}
    if len(units) > 1 and not standardise:
        raise UserError(f"scores in {' and '.join(sorted(units))} have no mean; standardise them")
    return DEVIATIONS if standardise else units.pop()


def _scale(reader: Reader, keys: np.ndarray) -> tuple[float, float]:
    values = _values(reader, keys)
    if not (std := float(values.std())):
        raise UserError(f"{reader.path}: all scores are {values[0]}; they cannot be standardised")
    return float(values.mean()), std


def _values(reader: Reader, keys: np.ndarray) -> np.ndarray:
    return reader.rows(keys, [SCORE])[SCORE].astype(np.float64)


def _producers(readers: Sequence[Reader], weights: Sequence[float], standardise: bool) -> Iterator[dict]:
    for reader, weight in zip(readers, weights, strict=True):
        for producer in reader.about.producers:
            yield {**producer, "weight": weight * producer.get("weight", 1.0), "standardised": standardise}


def of_groups(reader: Reader, collection: Collection, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """The score of each positive [N] and of each negative [M], NaN where the store has none."""
    codes, places = groups.codes()
    keys = pair_keys(collection.pair(*pair) for pair in groups.named(codes))
    there = ~reader.missing(keys)
    values = np.full(len(keys), np.nan)
    values[there] = _values(reader, keys[there])
    return tuple(np.split(values[places], [len(groups)]))


@dataclass(frozen=True)
class Margins:
    """How a teacher orders the pairs of groups."""

    pairs: int  # a positive and a negative each
    lacking: int  # of which one has no score; they do not count below
    accuracy: float  # share in which the positive scores higher; equal scores count half
    mean: float
    deviation: float
    quantiles: tuple[float, ...]  # of the margins, at QUANTILES

    def __str__(self) -> str:
        margins = ", ".join(f"{q:.0%} {value:.3g}" for q, value in zip(QUANTILES, self.quantiles, strict=True))
        return (
            f"{self.accuracy:.1%} of {self.pairs - self.lacking} pairs in order ({self.lacking} lack a score); "
            f"margins {self.mean:.3g} +- {self.deviation:.3g}; {margins}"
        )


def margins(reader: Reader, collection: Collection, groups: Groups) -> Margins:
    positive, negative = of_groups(reader, collection, groups)
    every = positive[groups.owner] - negative
    scored = every[~np.isnan(every)]
    if not len(scored):
        raise UserError(f"{reader.path} has no score of these pairs; were they scored with this collection?")
    right = float((scored > 0).mean() + (scored == 0).mean() / 2)
    spread = float(scored.mean()), float(scored.std()), tuple(np.quantile(scored, QUANTILES).tolist())
    return Margins(len(every), len(every) - len(scored), right, *spread)


def told(path: Path, collection: Collection, groups: Groups, label: str) -> dict[str, Any]:
    """What stage.json says of a teacher's scores; said in a line."""
    found = margins(Reader(path), collection, groups)
    say(f"{label}: {found}")
    return asdict(found) | {"quantiles": dict(zip(map(str, QUANTILES), found.quantiles, strict=True))}
