"""How well rankers order documents: nDCG, reciprocal rank, average precision, recall over a collection. No torch.

All of them look at one run of a row, which is kept beside the figures as a TREC file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from distill.evaluate.score import Score
from distill.evaluate.speed import in_turns
from distill.ranking.significance import Comparison, compare


class _OfRuns:
    """The mean over queries of a measure of `ir_measures`, with its standard error."""

    better = "high"
    digits = 3
    quality = True

    @property
    def title(self) -> str:
        return self.measured

    def note(self, bench) -> str:
        return f"{self.said}, {bench.described()}"

    def check(self, bench) -> None:
        bench.check()

    def measure(self, subjects: Sequence, bench) -> Iterator[Score]:
        for subject in subjects:
            values = list(bench.values(subject, self.measured).values())
            yield Score(mean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def compare(self, one: Sequence, other: Sequence, bench) -> Comparison:
        """Query by query; of a row with several seeds each query has its mean."""
        found = ([bench.values(subject, self.measured) for subject in row] for row in (one, other))
        return compare(*({query: mean(each[query] for each in seeds) for query in seeds[0]} for seeds in found))


@dataclass(frozen=True)
class NDCG(_OfRuns):
    """How high the best graded documents of each query stand: normalised discounted cumulative gain."""

    at: int = 10

    said = "gain of the graded documents, discounted by place, as a share of the best order's"

    @property
    def measured(self) -> str:
        return f"nDCG@{self.at}"


@dataclass(frozen=True)
class ReciprocalRank(_OfRuns):
    """One over the place of the first document that answers a query (MRR)."""

    at: int = 10

    said = "one over the place of the first document that answers, 0 where none does"

    @property
    def measured(self) -> str:
        return f"RR@{self.at}"


@dataclass(frozen=True)
class AveragePrecision(_OfRuns):
    """Precision at the place of each document that answers a query (MAP)."""

    measured = "AP"
    said = "precision at the place of each document that answers, 0 for those not found"


@dataclass(frozen=True)
class Recall(_OfRuns):
    """Share of the documents that answer a query among the first ones."""

    at: int = 100

    said = "share of the documents that answer among the first ones"

    @property
    def measured(self) -> str:
        return f"R@{self.at}"

    def note(self, bench) -> str:
        alike = not bench.retrieve and bench.depth <= self.at
        return super().note(bench) + "; the order does not matter to it, so all rows are equal" * alike


@dataclass(frozen=True)
class PairSpeed:
    """Pairs per second of scoring the candidates of a query, in float32; rankers take turns."""

    queries: int = 4
    rounds: int = 5

    title = "pairs/s"
    better = "high"
    digits = 0
    quality = False

    def note(self, bench) -> str:
        import torch

        threads = torch.get_num_threads()
        return (
            f"a query and its candidates at once, tokenised before and nothing of them kept from an earlier pass, in "
            f"float32, {threads} thread{'s'[: threads != 1]}, median of {self.rounds} rounds in which the rankers take "
            f"turns, each with {self.queries} queries; - for bm25"
        )

    def check(self, bench) -> None:
        bench.check()

    def measure(self, subjects: Sequence, bench) -> Iterator[Score | None]:
        pairs = bench.listed(self.queries)
        passes = {subject: subject.scoring(pairs) for subject in subjects if subject.path}
        seconds = in_turns(passes, self.rounds)
        for subject in subjects:
            yield Score(sum(map(len, pairs)) / seconds[subject]) if subject in passes else None
