"""The rows of a corpus with the best scores, in corpus order, and what was kept of each part of it. No torch."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distill.corpus import Corpus
from distill.refine import cut
from distill.refine.scored import Scored
from growth.errors import UserError

STEP = 4096  # rows in memory at once
FACTS = np.dtype([("score", "<f8"), ("tokens", "<i4"), ("part", "<i4")])  # of a row


@dataclass(frozen=True)
class Rule:
    """Which rows are kept: a share of them, those beyond a threshold, or as many as so many tokens hold.

    `quota` {part: share of what is kept}: each part competes with itself alone, and parts that are not named are left
    out.
    """

    keep: float | None = None
    threshold: float | None = None
    tokens: int | None = None
    better: Literal["high", "low"] = "high"
    quota: dict[str, float] | None = None


def select(table: Table, rule: Rule) -> np.ndarray:
    """The rows that are kept, ascending [n]. Of equal scores the smaller index is kept."""
    if rule.threshold is not None:
        found = [_beyond(some, rule) for some in table.stream()]
    elif rule.quota is None:
        found = _within(table, rule, None, 1.0)
    else:
        found = [rows for part, share in rule.quota.items() for rows in _within(table, rule, part, share)]
    rows = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *found]))
    if not len(rows):
        raise UserError(f"of {len(table)} rows none is kept; keep more, or set another threshold")
    return rows


def _beyond(some: cut.Some, rule: Rule) -> np.ndarray:
    kept = some.score >= rule.threshold if rule.better == "high" else some.score <= rule.threshold
    return some.index[kept]


def _within(table: Table, rule: Rule, part: str | None, share: float) -> Iterator[np.ndarray]:
    """The best rows of one part, or of all, within its share of what is kept."""
    whole = rule.tokens if rule.tokens is not None else math.floor(rule.keep * len(table) + 1e-9)
    budget = math.floor(share * whole + 1e-9)
    costs = "tokens" if rule.tokens is not None else None
    return cut.best(lambda: table.stream(part, costs), budget, high=rule.better == "high")


class Table:
    """The score, the tokens and the part of every row: read once, kept in a temporary file."""

    def __init__(self, text: Corpus, scored: Scored):
        self.text, self.parts = text, text.manifest["parts"]
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the table)
        self.facts = np.memmap(self._file, FACTS, "w+", shape=(len(text),))
        for rows in steps(len(text)):
            _, segments = text.block(rows)
            here = self.facts[rows.start : rows.stop]
            here["score"], here["tokens"] = scored[rows], (segments > 0).sum(1)
            here["part"] = _main_parts(text, rows)

    def __len__(self) -> int:
        return len(self.facts)

    def stream(self, part: str | None = None, costs: str | None = None) -> Iterator[cut.Some]:
        """Of one part, or of all; a row costs its `costs`, or one."""
        number = None if part is None else self._number(part)
        for rows in steps(len(self)):
            here, index = self.facts[rows.start : rows.stop], np.arange(rows.start, rows.stop)
            of = np.ones(len(here), dtype=bool) if number is None else here["part"] == number
            cost = here[costs].astype(np.int64) if costs else np.ones(len(here), dtype=np.int64)
            yield cut.Some(index[of], here["score"][of], cost[of])

    def _number(self, part: str) -> int:
        if part not in self.parts:
            raise UserError(f"quota: the corpus has no part {part!r}; there are {', '.join(self.parts[:20])}")
        return self.parts.index(part)


def steps(rows: int) -> Iterator[range]:
    return (range(first, min(first + STEP, rows)) for first in range(0, rows, STEP))


def _main_parts(text: Corpus, rows: range) -> np.ndarray:
    """Of each row, the part that most of its text is of [n]."""
    spans, row = text.spans.of(np.array(rows))
    sizes = spans[:, 2].astype(np.int64) - spans[:, 1]
    part = np.asarray(text.texts.parts)[spans[:, 0]].astype(np.int64)
    pairs, place = np.unique(np.stack([row, part]), axis=1, return_inverse=True)
    sums = np.bincount(place.ravel(), sizes, minlength=pairs.shape[1])
    order = np.lexsort((-pairs[1], sums, pairs[0]))  # the last of a row has the most; of equal ones the first part
    last = np.flatnonzero(np.diff(pairs[0][order], append=-1))
    return pairs[1][order][last]
