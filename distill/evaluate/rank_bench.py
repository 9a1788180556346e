"""What rankers are measured with: one collection for all, one run of each, compared query by query.

Every ranker puts BM25's best documents of a query in order, or, where it makes vectors, searches all documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import growth
from distill.ranking import dense, measures, ordering, search, trec
from distill.ranking.collection import Collection
from distill.ranking.kinds import HEAD
from distill.ranking.opening import Form, Opened, Pair, form_of, opened
from distill.ranking.trec import Run
from distill.specs import BM25
from growth import ranges
from growth.errors import UserError

RUNS = "runs"  # in the directory of the stage
RERANKED, RETRIEVED = 100, 1000  # documents of a query
STRANGE = re.compile(r"[^\w.-]+")  # in the name of a file


@dataclass(frozen=True, eq=False)
class Subject:
    """One ranker under measurement, or BM25, which has no directory; its weights are there only while they are used."""

    name: str
    context: object = None
    form: Form | None = None

    @property
    def path(self) -> Path | None:
        return self.form and self.form.path

    @property
    def parameters(self) -> int:
        """Of encoder and head, counted in the files."""
        if self.form is None:
            return 0
        head = self.form.path / HEAD
        entries = [*growth.open(self.form.encoder).values(), *(ranges.header(head).values() if head.is_file() else ())]
        return sum(math.prod(entry.shape) for entry in entries if "F" in entry.dtype)

    def open(self) -> Opened:
        return opened(self.context, self.name)

    def scoring(self, pairs: Sequence[Sequence[Pair]]) -> Callable[[], None]:
        """What scores lists of pairs, each of one query."""
        found = self.open()
        read, ranker = [found.read(some) for some in pairs], found.ranker.float()

        def run() -> None:
            with torch.inference_mode():
                for inputs in read:
                    ranker(*inputs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return run


class Subjects:
    """Every ranker once, by what is in its directory."""

    def __init__(self):
        self._found: dict[str, Subject] = {}

    def of(self, context, reference: str) -> Subject:
        if reference == BM25:
            return self._found.setdefault(BM25, Subject(BM25))
        found = form_of(context, reference)
        return self._found.setdefault(found.digest, Subject(reference, context, found))


class Bench:
    """What every subject is measured on."""

    def __init__(self, name: str, collection: Collection, measured: Sequence[str], depth: int | None, retrieve: bool):
        self.name, self.collection, self.measured, self.retrieve = name, collection, measured, retrieve
        self.depth = depth or (RETRIEVED if retrieve else RERANKED)
        self.teacher: Subject | None = None
        self._values: dict[Subject, dict[str, dict[str, float]]] = {}

    @cached_property
    def asked(self) -> dict[str, str]:
        """The queries that a document answers; of another one no order is better than any other."""
        there = self.collection
        return {query: there.queries[query] for query in there.judgements if query in there.queries
                and there.positives(query)}  # fmt: skip

    def check(self) -> None:
        """Refuse what cannot be measured, before a model is loaded."""
        if not self.asked:
            raise UserError(
                f"{self.name}: no document is known to answer one of {len(self.collection.queries)} queries"
            )
        measures.refuse_unknown(self.measured)

    def described(self) -> str:
        said = f"mean over {len(self.asked):,} queries of {self.name}"
        if left := len(self.collection.queries) - len(self.asked):
            said += f" ({left:,} more have no answer)"
        documents = f"{len(self.collection.documents):,} documents"
        if self.retrieve:
            return f"{said}; the best {self.depth:,} of all {documents}, by dot products of vectors or by BM25"
        return f"{said}; the best {self.depth:,} of {documents} by BM25, as each row orders them"

    @cached_property
    def candidates(self) -> Run:
        """By BM25; the same for every row."""
        return search.BM25(self.collection.documents).run(self.asked, self.depth)

    def listed(self, queries: int) -> list[list[Pair]]:
        """The candidates of the first queries that have some."""
        some = [query for query in self.asked if self.candidates[query]][:queries]
        return [[self.collection.pair(query, document) for document in self.candidates[query]] for query in some]

    def values(self, subject: Subject, measure: str) -> dict[str, float]:
        """Of each query."""
        return self._values[subject][measure]

    def begin(self, rows: Mapping[str, Sequence[Subject]], directory: Path, seeds: Sequence[int]) -> None:
        """Every subject's run, kept as runs/LABEL.trec, and what it is worth."""
        judged = {query: self.collection.judgements[query] for query in self.asked}
        (directory / RUNS).mkdir(exist_ok=True)
        for subject, names in _named(rows, seeds).items():
            run = self._run(subject, directory)
            for name in names:
                trec.write(directory / RUNS / f"{name}.trec", run, name)
            self._values[subject] = measures.evaluate(run, judged, self.asked, self.measured).queries

    def _run(self, subject: Subject, directory: Path) -> Run:
        if subject.form is None:
            return self.candidates
        if self.retrieve:
            scratch = directory / "vectors"
            return dense.run(subject.open(), self.collection.documents, self.asked, self.depth, scratch)
        return ordering.in_order(subject.open(), self.collection, self.candidates, subject.name)


def _named(rows: Mapping[str, Sequence[Subject]], seeds: Sequence[int]) -> dict[Subject, list[str]]:
    """What the runs of each subject are called; `@seed` where a row has several."""
    found: dict[Subject, list[str]] = {}
    for label, subjects in rows.items():
        for seed, subject in zip(seeds, subjects, strict=False):
            found.setdefault(subject, []).append(file_name(label) + (f"@{seed}" if len(subjects) > 1 else ""))
    return found


def file_name(label: str) -> str:
    return STRANGE.sub("-", label).lstrip(".") or "row"
