"""Rows of rankers: a query, its positive and some negatives, the same whoever asks and however the stream is cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from distill import layout
from distill.corpus.order import NEGATIVES, Order, raw
from distill.lesson import tokens
from distill.ranking.collection import Collection
from distill.ranking.groups import Groups
from distill.ranking.opening import token_ids
from distill.scores import pair_keys
from growth import files

MEASURED = 256  # rows whose tokens are counted to say how many a row has
Texts = dict[str, Tensor]  # input_ids, segment_ids [N, T]


@dataclass(frozen=True)
class Reader:
    """How a ranker reads: its own tokenizer, cut at its own lengths."""

    tokenizer: object
    lengths: tuple[int, int]

    def query(self, texts: Iterable[str]) -> Texts:
        return self._read(texts, self.lengths[0])

    def passages(self, texts: Iterable[str]) -> Texts:
        return self._read(texts, self.lengths[1])

    def _read(self, texts: Iterable[str], length: int) -> Texts:
        return layout.padded(token_ids(self.tokenizer, list(texts), length))


@dataclass(frozen=True, eq=False)
class Lists:
    """What rankers are trained on: groups of a collection, read by the student and by those that read otherwise."""

    collection: Collection
    groups: Groups
    reader: Reader
    negatives: int = 1  # of a row; all of them where it has fewer
    others: Mapping[str, Reader] = field(default_factory=dict)  # by model: those with ids or lengths of their own

    def __len__(self) -> int:
        return len(self.groups)

    @cached_property
    def digest(self) -> str:
        return files.digest([self.collection.digest, self.groups.digest])

    @cached_property
    def tokens(self) -> int:
        """Of all rows, each text of a batch once: from the first of them."""
        some = range(min(MEASURED, len(self)))
        return round(tokens(Batches(self, seed=0).at(some)) / len(some) * len(self))


class Batches:
    """Rows by their place in the stream; negatives are drawn anew in every epoch, for a row as if it were alone.

    A batch: `query` and `passages`, each text once; `pairs` [P, 2] of rows of both, the positive of a list first;
    `group` [P], the list of each pair; `keys` [P, 16], what its score is kept by; `answers` [A, 2], what is judged to
    answer what; `sample_ids` [B], the lists' rows; `own`, the same texts in the ids of others.
    """

    def __init__(self, lists: Lists, seed: int):
        self.lists, self.seed, self.order = lists, seed, Order(seed, len(lists))

    def at(self, positions: Iterable[int], mask: None = None) -> dict:
        """`mask` is for language models."""
        places = [self.order.at(position) for position in positions]
        listed = [self._drawn(epoch, row) for epoch, row in places]
        return {**self._of(listed), "sample_ids": torch.tensor([row for _, row in places])}

    def _drawn(self, epoch: int, row: int) -> tuple[int, np.ndarray]:
        """(query, its positive and negatives), as numbers of the groups' ids."""
        groups = self.lists.groups
        count, end = int(groups.counts[row]), int(groups.ends[row])
        order = np.argsort(raw(count, self.seed, NEGATIVES, epoch, row), kind="stable")
        drawn = groups.negative[end - count : end][np.sort(order[: self.lists.negatives])]
        return int(groups.query[row]), np.concatenate([groups.positive[row : row + 1], drawn])

    def _of(self, listed: list[tuple[int, np.ndarray]]) -> dict:
        groups, collection, reader = self.lists.groups, self.lists.collection, self.lists.reader
        queries = _Once(groups.query_ids, collection.queries)
        passages = _Once(groups.document_ids, collection.documents)
        pairs = [(queries.row(query), passages.row(p)) for query, documents in listed for p in documents.tolist()]
        sizes = torch.tensor([len(documents) for _, documents in listed])
        texts = list(queries.texts), list(passages.texts)
        own = {name: {"query": other.query(texts[0]), "passages": other.passages(texts[1])}
               for name, other in self.lists.others.items()}  # fmt: skip
        return {
            "query": reader.query(texts[0]),
            "passages": reader.passages(texts[1]),
            "pairs": torch.tensor(pairs),
            "group": torch.arange(len(listed)).repeat_interleave(sizes),
            "keys": torch.from_numpy(pair_keys((texts[0][q], texts[1][p]) for q, p in pairs).copy()),
            "answers": torch.tensor(list(_answers(collection, queries, passages)), dtype=torch.long).view(-1, 2),
            "own": own,
        }


class _Once:
    """The texts of a batch, each once, in the order in which they first came."""

    def __init__(self, names: list[str], texts: Mapping[str, str]):
        self.names, self.source = names, texts
        self.texts: dict[str, int] = {}  # text -> row
        self.rows: dict[str, int] = {}  # id -> row

    def row(self, number: int) -> int:
        name = self.names[number]
        if name not in self.rows:
            self.rows[name] = self.texts.setdefault(self.source[name], len(self.texts))
        return self.rows[name]


def _answers(collection: Collection, queries: _Once, passages: _Once) -> Iterator[tuple[int, int]]:
    """(row of queries, row of passages) of all that is judged to answer."""
    for query, row in queries.rows.items():
        yield from ((row, passages.rows[name]) for name in collection.positives(query) if name in passages.rows)
